"""Insert low-rank branches whose A and B all blocks share, with scalings u, v of each block's own (Tied-LoRA)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from ..base import Promise, option
from ..errors import NoSitesError, UsageError
from ..graph.edit import Edit
from ..graph.program import Program
from ..graph.selection import Miss, Selection
from ..graph.site import Site
from ..graph.state import MethodState
from ..methods.low_rank import LowRank, kaiming
from ..methods.ties import place_in_block, value_read

aten = torch.ops.aten
_FACTORS = ("A", "B", "u", "v")


@dataclass(frozen=True)
class TiedLoRA(LowRank):
    """Insert low-rank branches whose A and B all blocks share, with scalings u, v of each block's own (Tied-LoRA).

    Before: ``y_l = W_l x + b_l``
    After: ``y_l = W_l x + b_l + v_l ⊙ B (s · u_l ⊙ A drop(x))``

    Weights at one place of every block, of one shape, share A (rank, in) and B (out, rank); u_l (rank) and v_l (out)
    are a block's own. Projections named by ``fuse`` stand for the paper's fused one: those of one module that read the
    same value share A and u_l too (a cross-attention's key and value, but not its query, which reads another). A ~
    N(0, 0.2²), u = v = 1, and the first of B, v, A, u that trains starts at 0, so that the branch is 0 and learns.

    Keeps: the outputs, bit by bit, since one factor is 0. Does nothing where no target matches (and says so).
    Source: Tied-LoRA, arXiv 2311.09578; ``scale`` 1, the normal A and its deviation as in the authors' framework.
    """

    promise: ClassVar[Promise] = Promise.EXACT
    unhandled: ClassVar[dict[str, str]] = {
        "stack": "tied-lora shares A and B between one matrix a block, and a stack has many, each with its own outputs"
    }

    rank: int = option(8, "rank of the update", least=1)
    scale: float = option(1.0, "the branch is multiplied by this", above=0)
    train: tuple[str, ...] = option(("A", "B", "u", "v"), "which of A, B, u, v train; the others keep their start")
    init: Literal["normal", "kaiming"] = option("normal", "initial values of A (and of a frozen B)")
    deviation: float = option(0.2, "standard deviation of normal initial values", above=0)
    scaling_rate: float | None = option(None, "learning rate of u and v", least=0, unset="that of the training")
    fuse: tuple[str, ...] = option(
        ("attn.query", "attn.key", "attn.value"), "roles or module names that share A and u inside a block"
    )

    def rank_of(self, site: Site) -> int:
        return self.checked_rank(self.rank, site)

    def scale_of(self, site: Site) -> float:
        return self.scale

    def sites(self, program: Program) -> Selection[Site]:
        unknown = sorted(set(self.train) - set(_FACTORS))
        if unknown or not self.train:
            raise UsageError(f"tied-lora: train = {list(self.train)}; name one or more of A, B, u, v")
        found = self.uses(program)
        weights = {(site.module, site.out_features, site.in_features): site for site in found.taken}
        users = Counter(map(place_in_block, weights.values()))
        taken = tuple(site for site in found.taken if users[place_in_block(site)] > 1)
        alone = [Miss(s, "no other block has a weight of its place and shape") for s in found.taken if s not in taken]
        if found.taken and not taken and not self.allow_empty:
            raise NoSitesError(f"tied-lora: none of {len(alone)} weights has a partner of its shape in another block")
        return Selection(taken, (*found.missed, *alone))

    def factor_a(self, edit: Edit, site: Site, shape: tuple[int, ...]) -> fx.Node:
        return self._factor(edit, site, "A", "lora_A.weight", shape, f"tied_lora.{self._input_group(edit, site)}")

    def factor_b(self, edit: Edit, site: Site, shape: tuple[int, ...]) -> fx.Node:
        return self._factor(edit, site, "B", "lora_B.weight", shape, f"tied_lora.{_plain(place_in_block(site))}")

    def each_rank(self, edit: Edit, site: Site, ranks: int) -> fx.Node:
        owner = f"tied_lora.{self._input_group(edit, site)}.block_{site.block}"
        return self._factor(edit, site, "u", "lora_u", (ranks,), owner)

    def leave(self, edit: Edit, site: Site, delta: fx.Node) -> fx.Node:
        return edit.call(aten.mul.Tensor, delta, self._factor(edit, site, "v", "lora_v", (site.out_features,), None))

    def _input_group(self, edit: Edit, site: Site) -> str:
        """What shares A: the weights at one place, or the fused projections of one module that read one value."""
        place = place_in_block(site)
        if not self._fused(edit.program, site):
            return _plain(place)
        module = site.module.rpartition(".")[0]
        near = [other for other in edit.program.sites() if other.module.rpartition(".")[0] == module]
        beside = [s for s in near if self._fused(edit.program, s) and s.in_features == site.in_features]
        together = [other.module for other in beside if value_read(other) is value_read(site)]
        names = [name.rpartition(".")[2] for name in together] if len(together) < len(beside) else []
        parent = place.rsplit(".", 2)[0]  # without the projection's own name, and its shape
        return _plain("_".join([f"{parent}.fused_{site.in_features}", *names]))

    def _fused(self, program: Program, site: Site) -> bool:
        named = any(site.role == name or f".{site.module}".endswith(f".{name}") for name in self.fuse)
        return named and program.roles.get(site.parameter) != "adapter"

    def _factor(
        self, edit: Edit, site: Site, name: str, short: str, shape: tuple[int, ...], owner: str | None
    ) -> fx.Node:
        zero = next(factor for factor in ("B", "v", "A", "u") if factor in self.train)

        def start(value: Tensor) -> None:
            if name == zero:
                value.zero_()
            elif name in ("u", "v"):
                value.fill_(1.0)
            elif self.init == "kaiming":
                kaiming(value)
            else:
                nn.init.normal_(value, std=self.deviation)

        node = edit.parameter(site, short, shape, start, owner=owner)
        edit.program.tensor(str(node.target)).requires_grad_(name in self.train)
        return node

    def optimiser(self) -> Mapping[str, Mapping[str, float]]:
        rate = {} if self.scaling_rate is None else {"lr": self.scaling_rate}
        return {name: {"weight_decay": 0.0, **rate} for name in ("lora_u", "lora_v")}

    def describe(self, state: MethodState) -> Mapping[str, Any]:
        tensors = {id(value): value for site in state.sites for value in site.tensors.values()}
        own = sum(value.numel() for value in tensors.values() if value.requires_grad)
        untied = sum(site["lora_A"].numel() + site["lora_B"].numel() for site in state.sites)
        share = {"trained": own, "untied LoRA of this rank": untied, "share": own / untied}
        groups: dict[int, list[str]] = {}
        for site in state.sites:
            groups.setdefault(id(site["lora_A"]), []).append(site.module)
        rows = [{"modules that share A": len(modules), "first": modules[0]} for modules in groups.values()]
        return {"Tied parameters": [share], "Tie groups": rows}


def _plain(place: str) -> str:
    return place.replace(".", "_")


TiedLora = TiedLoRA  # the name up to version 0.1
