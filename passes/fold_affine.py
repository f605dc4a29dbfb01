"""Fold every affine region around a weight into that weight."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from ..affine import AffineAnalysis, Region, carrier_features
from ..base import Pass, Promise, Selection
from ..edit import Edit, aliases
from ..program import Program
from ..site import WEIGHT_OPS, module_path
from ..tree import get_tensor


@dataclass(frozen=True)
class Group:
    """The regions whose carriers use one weight. They fold together, so that a shared weight stays shared if it can."""

    weight: str
    regions: tuple[Region, ...]

    def __str__(self) -> str:
        return f"{self.weight}: {', '.join(sorted({r for region in self.regions for r in region.reads} - {self.weight}))}"


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Fold every affine region around a weight into that weight.

    Before: ``y = g ⊙ (W x + b) + B (s · A x)`` — any operators that are affine in one tensor
    After: ``y = W' x + b'``

    Factors are composed in fp64 and rounded once, to the weight's dtype. A region folds only if nothing outside reads
    its inner values and if the numbers it reads become fewer; so factorised layers stay, and so does the base model.

    Keeps: the outputs, up to rounding. Does nothing where no region shrinks.
    Source: linear algebra; for LoRA it is W' = W + s B A (Hu et al. 2021, arXiv 2106.09685, section 4.1).
    """

    promise: ClassVar[Promise] = Promise.CLOSE
    fixed_point: ClassVar[bool] = True

    def sites(self, program: Program) -> Selection:
        analysis = AffineAnalysis(program.root)
        groups: dict[str, list[Region]] = defaultdict(list)
        taken: set[fx.Node] = set()
        for node in program.graph.nodes:
            region = next((r for r in analysis.regions(node) if _shrinks(program, r)), None)
            if region is not None and region.carrier is not None and not region.nodes & taken:
                taken |= region.nodes
                groups[str(_weight(region.carrier).target)].append(region)
        return Selection(tuple(Group(name, tuple(found)) for name, found in groups.items()))  # type: ignore[arg-type]

    def rewrite(self, edit: Edit, site: Any) -> None:
        carriers = {region.carrier for region in site.regions}
        nodes = edit.program.graph.find_nodes(op="get_attr", target=site.weight)
        readers = {user for node in nodes for user in node.users}
        one_map = len({region.key for region in site.regions}) == 1
        shared = one_map and readers <= carriers
        names: dict[Any, str] = {}
        for region in site.regions:
            if region.key not in names:
                names[region.key] = _store(edit, region, site.weight, shared)
            _rewire(edit, region, names[region.key])
        edit.program.graph.eliminate_dead_code()


def _weight(carrier: fx.Node) -> fx.Node:
    weight = carrier.args[WEIGHT_OPS[carrier.target].weight]
    assert isinstance(weight, fx.Node)
    return weight


def _shrinks(program: Program, region: Region) -> bool:
    """Closed (inner values are read inside only), led by a carrier of the map's size, and reading fewer numbers after."""
    carrier = region.carrier
    if carrier is None or len(region.nodes) < 2 or not _closed(region):
        return False
    if region.root.meta["val"].dtype != carrier.meta["val"].dtype or not _spans(region):
        return False
    use, weight = WEIGHT_OPS[carrier.target], get_tensor(program.root, str(_weight(carrier).target))
    if region.shifts and use.bias is None:
        return False
    before = sum(get_tensor(program.root, name).numel() for name in region.reads)
    return before > weight.numel() + (use.size(weight.shape)[0] if region.shifts else 0)


def _closed(region: Region) -> bool:
    return all(user in region.nodes for node in region.nodes if node is not region.root for user in node.users)


def _spans(region: Region) -> bool:
    """Whether the carrier's weight has the size of the whole map."""
    assert region.carrier is not None
    out = carrier_features(region.carrier)
    widths = {node.meta["val"].shape[region.axis] for node, _ in region.bypass if node.target in WEIGHT_OPS}
    return region.root.meta["val"].shape[region.axis] == out and widths <= {out}


def _bias(carrier: fx.Node) -> fx.Node | None:
    use = WEIGHT_OPS[carrier.target]
    bias = carrier.args[use.bias] if use.bias is not None and len(carrier.args) > use.bias else None
    return bias if isinstance(bias, fx.Node) else None


def _pack(kind: str, matrix: Tensor, like: Tensor) -> Tensor:
    stored = matrix.t() if kind in ("addmm", "embedding") else matrix
    return stored.reshape(like.shape).to(like.dtype).contiguous()


def _store(edit: Edit, region: Region, weight: str, shared: bool) -> str:
    """Write the composed weight (and bias); under the old names if every reader moves along, else under the module's."""
    assert region.carrier is not None
    old = edit.program.tensor(weight)
    matrix, offset = region.evaluate()
    assert matrix is not None and matrix.dim() == 2
    value = _pack(WEIGHT_OPS[region.carrier.target].kind, matrix, old)
    module = module_path(region.carrier, weight.rpartition(".")[0])
    name = weight if shared else f"{module}.weight"
    for alias in aliases(edit.program.root, weight) if shared else [name]:
        edit.set_tensor(alias, value, edit.program.roles.get(weight, "base"))
    if offset is not None:
        bias = _bias(region.carrier)
        edit.set_tensor(str(bias.target) if bias is not None else f"{module}.bias", offset.to(old.dtype), "base")
    return name


def _rewire(edit: Edit, region: Region, name: str) -> None:
    carrier = region.carrier
    assert carrier is not None
    use = WEIGHT_OPS[carrier.target]
    offset_name = f"{module_path(carrier, name.rpartition('.')[0])}.bias"
    carrier.update_arg(use.weight, edit.tensor(name))
    if use.bias is not None and _bias(carrier) is None and offset_name in edit.program.roles:
        arguments = [*carrier.args, *[None] * (use.bias + 1 - len(carrier.args))]
        arguments[use.bias] = edit.tensor(offset_name)
        carrier.args = tuple(arguments)
    for node, kept in region.bypass:
        node.replace_all_uses_with(kept)
