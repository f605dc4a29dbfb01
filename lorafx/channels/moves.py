"""Operators that only move channels about: the same move for labels and for facts about channels.

Each function takes the axes of the operands and gives those of the result. What a move cannot follow it passes to the
``Carrier``, which handles it: labels are pinned or tied, facts are forgotten.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from ..graph.operands import argument, dimension, rank_of, value_of
from .axis import Axis, axis_of
from .views import Carrier, Move, expand, view

aten = torch.ops.aten


def _identity(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    _leave(carrier, [axis for other in node.args[1:] for axis in known(other)])  # ``type_as`` looks at its type
    return known(node.args[0])


def _leave(carrier: Carrier, axes: list[Axis]) -> None:
    for axis in axes:
        carrier.leave(axis.data)


# ---- order


def _transpose(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    given: Any = node.args[1:3] or (0, 1)  # ``t`` has no dimensions among its arguments
    a, b = (int(dim) % rank_of(node) for dim in given)
    return [_reordered(carrier, node, axis, lambda dim: {a: b, b: a}.get(dim, dim)) for axis in known(node.args[0])]


def _permute(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    rank, dims = rank_of(node), argument(node, "dims")
    order = [int(dim) % rank for dim in dims]
    return [_reordered(carrier, node, axis, order.index) for axis in known(node.args[0])]


def _reordered(carrier: Carrier, node: fx.Node, axis: Axis, place: Callable[[int], int]) -> Axis:
    """The axis after its dimensions changed places, perhaps with each other.

    Heads may keep different channels, side by side in each: with the channels in front there is no such place for
    them, so all heads keep the same ones then. Groups of heads may keep different heads: all stay then.
    """
    result, places = axis.moved(place), [place(dim) for dim in axis.dims]
    if places == sorted(places):
        return result
    if len(places) == 2:
        carrier.step(result.data)
    elif places[-1] == max(places):
        carrier.hold(result.data)
    else:
        carrier.lose(axis, str(node.target))
    return result


def _repeat(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    """Copies one after the other, along old dimensions and new ones before them."""
    value, times = node.args[0], argument(node, "repeats")
    shift = len(times) - rank_of(value)
    result = []
    for axis in known(value):
        copies: Any = [times[dim + shift] for dim in axis.dims]
        if all(isinstance(count, int) and count > 0 for count in copies):
            result.append(Axis(tuple(dim + shift for dim in axis.dims), np.tile(axis.data, copies)))
        else:
            carrier.lose(axis, str(node.target))
    return result


def _repeat_interleave(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    """Every entry along a dimension several times in a row."""
    value, times = node.args[:2]
    dim: Any = argument(node, "dim")
    if not isinstance(times, int) or times < 1 or dim is None or argument(node, "output_size") is not None:
        return []
    return [
        Axis(axis.dims, np.repeat(axis.data, times, axis.dims.index(dim % rank_of(value))))
        if dim % rank_of(value) in axis.dims
        else axis
        for axis in known(value)
    ]


def _flip(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    dims: Any = node.args[1]
    turned = {dim % rank_of(node) for dim in dims}
    return [
        Axis(axis.dims, np.flip(axis.data, tuple(place for place, dim in enumerate(axis.dims) if dim in turned)).copy())
        for axis in known(node.args[0])
    ]


def _pad(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    """Axes that are padded are followed no further; the others pass."""
    amounts: Any = node.args[1]
    rank = rank_of(node)
    touched = {
        rank - 1 - place for place in range(len(amounts) // 2) if tuple(amounts[2 * place : 2 * place + 2]) != (0, 0)
    }
    constant = node.target is aten.constant_pad_nd.default or argument(node, "mode") == "constant"
    value = float(argument(node, "value") or 0.0) if constant else None
    passing = [axis for axis in known(node.args[0]) if not touched & set(axis.dims)]
    return [carrier.among(axis, value) for axis in passing] if touched else passing


# ---- parts


def part(carrier: Carrier, axes: list[Axis], dim: int, index: slice | int, why: str) -> list[Axis]:
    """The axes of a slice or, for a number, of one position along ``dim``, which is then gone."""
    result = []
    for axis in axes:
        if dim in axis.dims:
            place = axis.dims.index(dim)
            data = axis.data[(slice(None),) * place + (index,)]
            carrier.leave(axis.data[~np.isin(axis.data, data)])
            dims = axis.dims if isinstance(index, slice) else tuple(d for d in axis.dims if d != dim)
            if dims and data.size:
                result.append(Axis(dims, data))
            elif data.size:
                carrier.lose(Axis((0,), data.reshape(1)), why)
        else:
            result.append(axis)
    return result if isinstance(index, slice) else [axis.moved(lambda d: d - (d > dim)) for axis in result]


def slice_bounds(node: fx.Node, size: int) -> tuple[int, int, int] | None:
    """Start, end and step of a slice of a dimension of fixed size; None when they are not numbers."""
    start, end, step = (argument(node, name) for name in ("start", "end", "step"))
    if not all(value is None or isinstance(value, int) for value in (start, end, step)):
        return None
    return slice(start, end, step).indices(size)


def _slice(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    axes, dim = known(node.args[0]), dimension(node, rank_of(node))
    axis = axis_of(axes, dim)
    if axis is None:
        return axes
    place = axis.dims.index(dim)
    size = axis.data.shape[place]
    bounds = slice_bounds(node, size)
    whole = place == len(axis.dims) - 1 and keeps_period(bounds, size) if bounds is not None else False
    if bounds is None or (bounds[2] != 1 and not whole):
        carrier.lose(axis, str(node.target))
        return [other for other in axes if other is not axis]
    if bounds[2] != 1:
        carrier.step(axis.data.reshape(*axis.data.shape[:-1], -1, bounds[2]))
    return part(carrier, axes, dim, slice(*bounds), str(node.target))


def keeps_period(bounds: tuple[int, int, int], size: int) -> bool:
    """Whether a slice with a step takes whole periods, to the end.

    It then still does so when whole periods are gone, and its literals need no change.
    """
    start, end, step = bounds
    return size % step == 0 and start < step and end > size - step + start


def _select(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    axes, index = known(node.args[0]), argument(node, "index")
    dim = dimension(node, rank_of(node.args[0]))
    axis = axis_of(axes, dim)
    if axis is not None and not isinstance(index, int):
        carrier.lose(axis, str(node.target))
        axes = [other for other in axes if other is not axis]
    return part(carrier, axes, dim, index if isinstance(index, int) else 0, str(node.target))


def pieces(node: fx.Node) -> tuple[int, list[Any]]:
    """The dimension that a split, chunk or unbind cuts, and the sizes of its pieces."""
    value = value_of(node.args[0])
    dim = dimension(node, value.dim())
    if node.target is aten.unbind.int:
        return dim, [1] * value.shape[dim]
    return dim, [piece.shape[dim] for piece in node.meta["val"]]


def _split(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    axes = known(node.args[0])
    dim, sizes = pieces(node)
    axis = axis_of(axes, dim)
    if axis is not None and not all(isinstance(size, int) for size in sizes):
        carrier.lose(axis, str(node.target))
        axes, axis = [other for other in axes if other is not axis], None
    result, start = [], 0
    for size in sizes:
        index = start if node.target is aten.unbind.int else slice(start, start + size)
        whole = axis is None and isinstance(index, slice)
        result.append(list(axes) if whole else part(carrier, axes, dim, index, str(node.target)))
        start = start + size if axis is not None else 0
    return result


def _getitem(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    value, index = known(node.args[0]), node.args[1]
    if not (value and isinstance(value[0], list) and isinstance(index, int)):
        return []
    _leave(carrier, [axis for part in value for axis in part])
    return value[index]


# ---- together


def _cat(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    values: Any = node.args[0]
    dim = dimension(node, rank_of(node))
    return [*_along(carrier, node, values, dim, known), *_beside(carrier, node, values, {dim}, known)]


def _along(carrier: Carrier, node: fx.Node, values: Any, dim: int, known: Any) -> list[Axis]:
    """The axis that runs through the parts, one after the other; a part without channels has positions that stay."""
    along = [axis_of(known(value), dim) for value in values]
    first = next((axis for axis in along if axis is not None), None)
    sizes = [value.meta["val"].shape[dim] for value in values]
    if first is None:
        return []
    alike = all(axis is None or axis.dims == first.dims for axis in along)
    whole = all(axis is not None for axis in along) or len(first.dims) == 1
    if not alike or not whole or not all(isinstance(size, int) for size in sizes):
        for axis in along:
            if axis is not None:
                carrier.lose(axis, str(node.target))
        return []
    place = first.dims.index(dim)
    parts = [axis.data if axis else carrier.fixed(size) for axis, size in zip(along, sizes, strict=True)]
    return [Axis(first.dims, np.concatenate(parts, place))]


def _beside(carrier: Carrier, node: fx.Node, values: Any, skipped: set[int], known: Any) -> list[Axis]:
    """The other axes of values that are put together: alike in all of them, or lost."""
    others = [[axis for axis in known(value) if not skipped & set(axis.dims)] for value in values]
    result = []
    for first in others[0]:
        found = (axis_of(axes, first.dims[0]) for axes in others[1:])
        twins = [twin for twin in found if twin is not None and twin.dims == first.dims]
        if len(twins) == len(others) - 1:
            result.append(carrier.alike([first, *twins], str(node.target)))
    return result  # what is in none of these is unaccounted for, and so pinned


def _stack(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    values: Any = node.args[0]
    new = dimension(node, rank_of(node))
    return [axis.moved(lambda dim: dim + (dim >= new)) for axis in _beside(carrier, node, values, set(), known)]


_VIEWS = """
view.default reshape.default _unsafe_view.default flatten.using_ints unflatten.int unsqueeze.default squeeze.default
squeeze.dim squeeze.dims
"""
_IDENTITIES = """
contiguous.default clone.default detach.default alias.default dropout.default to.dtype to.device to.dtype_layout
to.other type_as.default _to_copy.default lift_fresh_copy.default feature_dropout.default
"""


def overloads(names: str) -> list[Any]:
    """The ATen operators of these names; those this torch does not have are left out."""
    found = []
    for name in names.split():
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(aten, packet, None), overload, None)
        found += [operator] if operator is not None else []
    return found


#: Every operator that only moves channels.
MOVES: dict[Any, Move] = {
    **dict.fromkeys(overloads(_VIEWS), view),
    **dict.fromkeys(overloads(_IDENTITIES), _identity),
    **dict.fromkeys(overloads("transpose.int t.default"), _transpose),
    aten.permute.default: _permute,
    aten.expand.default: expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    **dict.fromkeys(overloads("split.Tensor split_with_sizes.default chunk.default unbind.int"), _split),
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.flip.default: _flip,
    **dict.fromkeys(overloads("constant_pad_nd.default pad.default"), _pad),
    operator.getitem: _getitem,
}
