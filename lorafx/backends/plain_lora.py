"""Any adapter as plain LoRA: however a low-rank branch is computed, it has one A and one B.

Gates, tied scalings and masks are constants once training is over, so the branch beside a weight is affine: its map
from the input to the narrowest value is A, from there to the result B. Ranks that compute nothing are left out.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..affine.regions import AffineAnalysis, Region
from ..affine.rules import RULES
from ..affine.values import dense
from ..errors import UsageError
from ..graph.site import INSERTED_BY, Site
from ..graph.tree import get_tensor, named_tensors, put_tensor
from ..pipeline import rewrite, to_eval
from ..public import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Factors:
    """The update of one weight, ``B A``: ``a`` (rank, in) and ``b`` (out, rank), fp64; rank 0 when it is none."""

    module: str
    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """How many ranks compute something."""
        return self.a.shape[0]


def factors(program: Program) -> list[Factors]:
    """The update of every linear weight that has one, in graph order.

    Raises:
        UsageError: something was inserted that is not a low-rank branch beside a linear weight (a gate on the weight)
    """
    final = to_eval(program)
    analysis = AffineAnalysis(final.root, RULES)
    found: dict[str, Factors] = {}
    read: set[str] = set()
    for site in final.sites():
        branches = [_branch(analysis, site, delta) for delta in _deltas(site)]
        for down, up in branches:
            read |= down.reads | up.reads
        if branches and site.module not in found:
            a = torch.cat([_matrix(down) for down, _ in branches])
            b = torch.cat([_matrix(up) for _, up in branches], dim=1)
            works = a.any(1) & b.any(0)
            found[site.module] = Factors(site.module, a[works], b[:, works])
    others = sorted(set(final.names("adapter", "gate")) - read)
    if others:
        raise UsageError(f"{others[0]} belongs to no low-rank update of a linear weight; fold the program instead")
    return list(found.values())


def as_lora(program: Program) -> Program:
    """A program of the same function in which every update is a plain LoRA adapter, as small as its rank allows.

    Raises:
        UsageError: an update that is not of low rank, or a program that was folded or captured elsewhere
    """
    from ..passes.lora import Lora

    if program.captured is None or program.origin is not None:
        raise UsageError("a folded program has no adapters left; use the program before fold()")
    updates = [update for update in factors(program) if update.rank]
    if not updates:
        raise UsageError("every rank of every adapter computes nothing: there is no adapter to write")
    rank = Counter(update.rank for update in updates).most_common(1)[0][0]
    other = {re.escape(update.module): update.rank for update in updates if update.rank != rank}
    step = Lora(
        targets=tuple(update.module for update in updates),
        rank=rank,
        alpha=float(rank),
        rank_pattern=other,
        alpha_pattern={key: float(value) for key, value in other.items()},
    )
    result = rewrite(program.captured, [step], check=False)
    taken: dict[int, Tensor] = {}  # a tied tensor stays one
    for name, value in named_tensors(program.root):
        if name in program.captured.roles:
            put_tensor(result.root, name, taken.setdefault(id(value), _taken_over(value)))
    for entry in result.history[-1].inserted:
        update = next(update for update in updates if update.module == entry.module)
        for short, value in (("lora_A", update.a), ("lora_B", update.b)):
            with torch.no_grad():
                get_tensor(result.root, entry.tensors[short]).copy_(value)
    return dataclasses.replace(result, captured=program.captured)


def _taken_over(value: Tensor) -> Tensor:
    return nn.Parameter(value.detach(), value.requires_grad) if isinstance(value, nn.Parameter) else value


def _deltas(site: Site) -> Iterator[fx.Node]:
    """What passes added to the result of a weight of the base."""
    node = site.node
    while node is not None:
        added = [user for user in node.users if _adds(user, node)]
        yield from (delta for user in added if isinstance(delta := user.args[1], fx.Node))
        node = added[0] if added else None


def _adds(user: fx.Node, node: fx.Node) -> bool:
    return INSERTED_BY in user.meta and user.target is aten.add.Tensor and user.args[0] is node


def _branch(analysis: AffineAnalysis, site: Site, delta: fx.Node) -> tuple[Region, Region]:
    """The maps from a site's input to the narrowest value of its branch, and from there to the result."""
    pairs = [
        (down, up)
        for up in analysis.regions(delta)
        if up.origin.kind == "value" and up.carrier is not None
        for down in analysis.regions(up.origin.node)
        if down.origin.kind == "value" and down.origin.node is site.input and down.carrier is not None
    ]
    if not pairs or any(region.shifts for region in pairs[0]):
        raise UsageError(f"what was added at {site.module} is not a low-rank update of a linear weight; fold instead")
    return min(pairs, key=lambda pair: int(pair[0].root.meta["val"].shape[-1]))


def _matrix(region: Region) -> Tensor:
    matrix, _ = region.evaluate()
    width = int(region.root.meta["val"].shape[-1])
    return dense(matrix, width, torch.device("cpu")).cpu()
