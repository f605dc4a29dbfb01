"""Features from several places: maps joined side by side, rows of constants among them, and features moved to other
positions. Code that lays out its own features writes ``cat([A x, 1, B x])`` and ``zeros.scatter(-1, index, y)``, with
as many rows as its input has. Such constant rows, all alike, are evaluated from the operators that make them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.constants import Constants
from ..graph.operands import argument, dimension, same_size
from .regions import AffineAnalysis, Operand, Region
from .spread_rules import fixed, shape_of
from .values import joined, placed

aten = torch.ops.aten

#: Operators that fill a value of a given size, and the number they fill it with, where the operator fixes it.
_FILLED: dict[Any, float | None] = {
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), 0.0),
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), 1.0),
    **dict.fromkeys((aten.full.default, aten.full_like.default, aten.new_full.default), None),
}


@dataclass(frozen=True)
class Row(Operand):
    """The features (last axis) of a value whose rows are all alike, and whether all of them are 0."""

    zero: bool = False


def row(constants: Constants, node: fx.Node) -> Row | None:
    """The row that a value made of constants and sizes alone repeats; None where that is not known."""
    shape = shape_of(node)
    if not shape or not fixed(shape[-1:]):
        return None
    size = int(shape[-1])
    if node.target in _FILLED:
        filling: Any = _FILLED[node.target]
        filling = argument(node, "fill_value") if filling is None else filling
        if isinstance(filling, bool) or not isinstance(filling, (int, float)):
            return None
        dtype = node.meta["val"].dtype
        made = partial(torch.full, (size,), filling, dtype=torch.float64 if dtype.is_floating_point else dtype)
        return Row(made, frozenset(), ("row", filling, size), zero=filling == 0)
    value = node.args[0] if node.target is aten.expand.default else None
    if not isinstance(value, fx.Node) or any(str(length) != "1" for length in value.meta["val"].shape[:-1]):
        return None
    read = constants.reads(value)
    if read is None:
        return None
    return Row(partial(_expanded, constants, value, size), read, ("row", constants.key(value), size))


def _expanded(constants: Constants, value: fx.Node, size: int) -> Tensor:
    return constants.value(value, torch.float64).reshape(-1).expand(size)


def _own(node: fx.Node, reader: fx.Node) -> frozenset[fx.Node]:
    """A constant row's operator as a part of the region of its only reader."""
    return frozenset([node]) if set(node.users) == {reader} else frozenset()


# ---- side by side


@dataclass(frozen=True)
class _Part:
    """One operand of a join: a constant row, or a value that has regions."""

    node: fx.Node
    row: Row | None


def join(analysis: AffineAnalysis, node: fx.Node) -> Iterator[Region]:
    """Values of one origin joined along their features, rows of constants among them."""
    rank = len(shape_of(node) or ())
    axis = dimension(node, rank) if rank else 0
    place = -1 if axis == rank - 1 else axis
    tensors = argument(node, "tensors")
    if node.kwargs or not isinstance(tensors, (list, tuple)) or place not in (-1, 1) or not _floats(node, *tensors):
        return
    parts = [_Part(n, row(analysis.constants, n) if place == -1 else None) for n in tensors]
    values = [part.node for part in parts if part.row is None]
    if not values or not all(fixed([part.node.meta["val"].shape[place]]) for part in parts):
        return
    for first in analysis.inputs(values[0], place):
        found = [first, *(_fellow(analysis, first, value) for value in values[1:])]
        regions = [region for region in found if region is not None]
        if len(regions) == len(values):
            yield _joined(analysis, node, first, parts, regions)


def _floats(*nodes: fx.Node) -> bool:
    """Whether all values are floating-point numbers of one dtype: a join would cast others."""
    values = [node.meta.get("val") for node in nodes]
    kinds = {value.dtype if isinstance(value, Tensor) and value.is_floating_point() else None for value in values}
    return len(kinds) == 1 and None not in kinds


def _fellow(analysis: AffineAnalysis, first: Region, value: fx.Node) -> Region | None:
    found = analysis.inputs(value, first.axis)
    return next((region for region in found if region.origin == first.origin and region.axis == first.axis), None)


def _joined(
    analysis: AffineAnalysis, node: fx.Node, first: Region, parts: list[_Part], regions: list[Region]
) -> Region:
    left, rows = iter(regions), [part.row for part in parts]
    shifts = any(region.shifts for region in regions) or any(row is not None and not row.zero for row in rows)
    keys = [part.row.key if part.row is not None else next(left).key for part in parts]
    own = [_own(part.node, node) for part in parts if part.row is not None]
    sizes = [int(part.node.meta["val"].shape[first.axis]) for part in parts]
    return replace(
        first,
        root=node,
        nodes=frozenset([node]).union(*(region.nodes for region in regions), *own),
        reads=frozenset[str]().union(*(part.reads for part in (*regions, *rows) if part is not None)),
        carrier=None,
        bypass=None,
        key=("joined", *keys),
        parts=tuple(regions),
        compose=partial(joined, [None if row is None else row.value for row in rows], sizes, analysis.device),
        shifts=shifts,
        groups=1,
    )


# ---- elsewhere


def scatter(analysis: AffineAnalysis, node: fx.Node) -> Iterator[Region]:
    """Each feature of a value written over another one of a row of constants: the same one in every row."""
    base, index, value = node.args[0], node.args[2], node.args[3]
    if not (isinstance(base, fx.Node) and isinstance(index, fx.Node) and isinstance(value, fx.Node)) or node.kwargs:
        return
    last = len(node.meta["val"].shape) - 1
    under, places = row(analysis.constants, base), row(analysis.constants, index)
    if under is None or places is None or dimension(node, last + 1) != last or not _floats(node, base, value):
        return
    # The index says how much of the value is written, and into how many of the rows.
    shapes = [operand.meta["val"].shape for operand in (index, value)]
    if not _alike(*shapes) or not _alike(shapes[0][:-1], node.meta["val"].shape[:-1]) or not _apart(places.value):
        return
    reads = under.reads | places.reads
    for inner in analysis.inputs(value, -1):
        yield replace(
            inner,
            root=node,
            nodes=inner.nodes | {node} | _own(base, node) | _own(index, node),
            reads=inner.reads | reads,
            bypass=None if inner.bypass is None else (*inner.bypass, (node, node, 3)),
            key=("scatter", under.key, places.key, inner.key),
            parts=(inner,),
            compose=partial(placed, under.value, places.value, inner.shifts or not under.zero),
            shifts=inner.shifts or not under.zero,
            groups=1,
        )


def _alike(left: Any, right: Any) -> bool:
    return len(left) == len(right) and all(map(same_size, left, right))


def _apart(places: Callable[[], Tensor]) -> bool:
    """Whether no two features are written to the same place: which of them would stay is not defined."""
    found = places()
    return not found.is_meta and len(found.unique()) == len(found)
