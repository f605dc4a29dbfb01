"""Compare folded weights with the operators they replace: column by column, to the last place.

A comparison of whole models in low precision cannot see one wrong number in one weight. So for every weight that
replaced a region of the graph, the region's own operators are run in fp64 on unit vectors, which gives columns of the
exact map; the column in the written weight must be that one, rounded once. Weights that nothing was folded into must
have the bits they had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from ..affine.regions import Region
from ..affine.worth import worth_folding
from ..deferred.programs import deferring
from ..deferred.tensor import chosen_from, deferred, forget, passing_tiles, value
from ..errors import ParityError
from ..graph.constants import Constants
from ..graph.operands import node_at, rank_of
from ..graph.precision import coarsest, tolerance
from ..graph.site import WEIGHT_OPS, is_tensor_node
from ..graph.tree import has_tensor
from ..parity.comparison import Case, Comparison, difference
from ..passes.fold_constants import FoldConstants
from ..passes.to_eval import ToEval
from ..pipeline import run
from ..public import Program

#: How many columns of each folded weight are checked, in all rows, spread evenly.
COLUMNS = 8
#: What fp64 rounds off in sums of 10,000 terms and a few operators, as a share of the largest.
_FP64 = 1e-12


@dataclass(frozen=True)
class TensorProof:
    """What was checked, and how close it is.

    Attributes:
        folded: weights some of whose columns were recomputed
        unchanged: weights found to be the base's, bit by bit
        left: weights that are neither (computed outside a region of their own, or cut in memory)
        largest: the largest distance of a folded weight from the exact value, in units of its last place
        cases: the result for each tensor that was checked
        made_of: the tensors that each folded weight was composed from
    """

    folded: int
    unchanged: int
    left: tuple[str, ...]
    largest: float
    cases: tuple[Case, ...]
    made_of: Mapping[str, tuple[str, ...]]

    def comparison(self, reference: Program, label: str) -> Comparison:
        """The cases as a comparison of the weights called ``label`` with ``reference``'s."""
        lowest = coarsest(value.dtype for value in reference.root.parameters())
        name = f"{reference.name} program"
        return Comparison(name, label, lowest, tolerance(lowest), self.cases, checked="tensors")

    def __str__(self) -> str:
        first = f"({self.left[0]}{', …' if len(self.left) > 1 else ''})" if self.left else ""
        left = f", {len(self.left)} {first} compared in their blocks, or with the whole, only" if self.left else ""
        return (
            f"{self.folded} folded weights within {self.largest:.2f} of the last place in {COLUMNS} columns each, "
            f"{self.unchanged} others bit by bit as they were{left}"
        )


def prove_tensors(reference: Program, folded: Program, written: Mapping[str, Tensor]) -> TensorProof:
    """Compare the weights in ``written`` (by their names in ``folded``) with what ``reference`` computes.

    Raises:
        ParityError: a weight is further from the exact one than rounding explains, or changed when it should not have
    """
    base = run(deferring(reference), (ToEval(), FoldConstants()), check=False)
    nodes = {node.name: node for node in folded.graph.nodes}
    largest, done, cases, made_of = 0.0, set[int](), list[Case](), dict[str, tuple[str, ...]]()
    for region in (region for group in worth_folding(base) for region in group.regions):
        assert region.carrier is not None
        weight = _weight_of(nodes.get(region.carrier.name))
        kept = _kept(region, folded.tensor(weight)) if weight is not None and weight in written else None
        if weight is None or kept is None:
            continue
        distance, case = _distance(base, region, weight, written[weight], kept)
        largest = max(largest, distance)
        cases.append(case)
        made_of[weight] = tuple(sorted(region.reads))
        for tensor in (written[weight], *map(base.tensor, sorted(region.reads))):
            forget(tensor)
        done.add(id(folded.tensor(weight)))
    unchanged, left = 0, []
    seen = set(done)
    for name, tensor in written.items():
        if id(folded.tensor(name)) in seen:
            continue
        seen.add(id(folded.tensor(name)))
        if has_tensor(reference.root, name) and _same(reference.tensor(name), folded.tensor(name), tensor):
            unchanged += 1
            cases.append(Case("every bit", name, 0.0))
        else:
            left.append(name)
    return TensorProof(len(done), unchanged, tuple(left), largest, tuple(cases), made_of)


def _weight_of(node: fx.Node | None) -> str | None:
    use = WEIGHT_OPS.get(node.target) if node is not None else None
    weight = node.args[use.weight] if node is not None and use is not None else None
    return str(weight.target) if isinstance(weight, fx.Node) and is_tensor_node(weight) else None


def _kept(region: Region, folded: Tensor) -> tuple[Tensor, Tensor] | None:
    """Which outputs and which inputs of the region's map are in its weight; None where that is not known, and where the
    map is not one of vectors (a convolution's)."""
    assert region.carrier is not None
    use = WEIGHT_OPS[region.carrier.target]
    full = node_at(region.carrier, use.weight).meta["val"].shape
    kept = chosen_from(folded, full) if region.origin.kind in ("value", "onehot") and len(full) == 2 else None
    if kept is None:
        return None
    first, second = (kept.get(dim, torch.arange(full[dim])) for dim in (0, 1))
    return (second, first) if use.transposed else (first, second)


def _distance(
    base: Program, region: Region, name: str, written: Tensor, kept: tuple[Tensor, Tensor]
) -> tuple[float, Case]:
    """How far columns of a weight are from the exact ones: in units of the weight's last place, and in numbers."""
    assert region.carrier is not None
    use = WEIGHT_OPS[region.carrier.target]
    outputs, inputs = kept
    features = use.size(node_at(region.carrier, use.weight).meta["val"].shape)[1]
    count = len(inputs)
    places = torch.linspace(0, count - 1, min(COLUMNS, count), dtype=torch.float64).round().long().unique()
    columns = inputs[places]
    exact, scale = _columns(base, region, columns, features)
    exact = exact.index_select(1, outputs)
    stored = use.matrix(written).index_select(1, places).double().t()
    kind = torch.finfo(written.dtype)
    place = (exact.abs() * kind.eps).clamp(min=kind.smallest_normal * kind.eps)
    distance = float((((stored - exact).abs() - _FP64 * scale).clamp(min=0.0) / place).max().detach())
    # A number rounded once is off by at most half of its last place; `not` also finds NaN.
    if not distance <= 0.5 + _FP64:
        raise ParityError(
            f"{name}: a folded weight is {distance:.3g} units of the last place from what the operators compute; "
            "please report this model"
        )
    return distance, difference(f"{len(columns)} columns", name, exact, stored)


def _columns(base: Program, region: Region, columns: Tensor, features: int) -> tuple[Tensor, float]:
    """The region's operators on unit vectors in fp64, its offset taken off: (columns, out); and the largest number on
    the way to it."""
    if region.origin.kind == "onehot":
        given, none = columns, None
    else:
        given = torch.zeros(len(columns), features, dtype=torch.float64)
        given[torch.arange(len(columns)), columns] = 1.0
        none = torch.zeros(1, features, dtype=torch.float64)
    found = _run(base, region, given, columns)
    scale = float(found.abs().max())
    return (found if none is None or not region.shifts else found - _run(base, region, none, None)), scale


def _run(base: Program, region: Region, given: Tensor, columns: Tensor | None) -> Tensor:
    """The value of the region's last node in fp64 when its origin is ``given``; a tensor is dropped after its use.

    ``columns`` are the places of the ones when ``given`` are unit vectors; without, it is zero.
    """
    known: dict[fx.Node, Any] = {region.origin.node: given}

    def operand(node: fx.Node) -> Any:
        return known[node] if node in known else _constant(base, node)

    for node in base.graph.nodes:
        if node in region.nodes and node not in known:
            short = _read_off(base, node, region.origin.node, columns)
            if short is not None:
                known[node] = short
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
            known[node] = node.target(*_in_double(args), **_in_double(kwargs))
    return known[region.root].reshape(len(given), -1)


def _read_off(base: Program, node: fx.Node, origin: fx.Node, columns: Tensor | None) -> Tensor | None:
    """What an operator that applies a stored matrix gives for unit vectors: these ``columns`` of it (zero without), and
    its bias.

    The same numbers as the operator's, without the matrix in fp64: a table of a large vocabulary is gigabytes. None for
    any other operator.
    """
    use = WEIGHT_OPS.get(node.target)
    plain = use is not None and (use.kind == "embedding" or len(node.args) <= 3) and not node.kwargs
    if use is None or not plain or node.args[use.input] is not origin:
        return None
    weight = node_at(node, use.weight)
    if not is_tensor_node(weight) or rank_of(weight) != 2:
        return None
    matrix = use.matrix(value(base.tensor(str(weight.target))))
    if columns is None:
        found = torch.zeros(1, len(matrix), dtype=torch.float64)
    else:
        found = matrix.index_select(1, columns).double().t()
    bias = node.args[use.bias] if use.bias is not None and use.bias < len(node.args) else None
    return found if bias is None else found + _constant(base, node_at(node, use.bias or 0))


def _constant(base: Program, node: fx.Node) -> Tensor:
    """A tensor of the program, or a value that operators compute from tensors alone, in fp64."""
    return value(Constants(base.root).value(node, torch.float64))


def _in_double(values: Any) -> Any:
    """The same arguments, with dtypes that would round replaced."""
    return map_aggregate(
        values, lambda one: torch.float64 if isinstance(one, torch.dtype) and one.is_floating_point else one
    )


def _same(before: Tensor, folded: Tensor, written: Tensor) -> bool:
    """Whether a tensor was written with the bits it had before, those that ``folded`` has; looked at in tiles."""
    kept = chosen_from(folded, before.shape)
    if kept is None or written.dtype != before.dtype or written.shape != folded.shape:
        return False
    held: Tensor = deferred(before.detach()) if kept else before
    for dim, index in kept.items():
        held = held.index_select(dim, index)
    return all(torch.equal(_bits(x), _bits(y)) for x, y in _side_by_side(held, written))


def _side_by_side(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The tiles of a tensor, with the same rows of another one."""
    if not a.dim():
        a, b = a.reshape(1), b.reshape(1)
    place = 0
    for tile in passing_tiles(a):
        rows = b.narrow(0, place, len(tile))
        yield tile, rows
        forget(rows)
        place += len(tile)


def _bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)
