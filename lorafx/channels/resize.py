"""Make the literals in a graph match its tensors again after channels were removed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx

from ..graph.edit import Edit
from ..graph.operands import argument, declared_arguments, dimension, rank_of, value_of
from .axes import Axes, flat
from .axis import Axis, axis_of
from .moves import pieces, slice_bounds
from .removal import Removal
from .rules import CONVOLUTIONS

aten = torch.ops.aten

_SHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default)
#: Views, which need suitable strides.
_VIEWS = (aten.view.default, aten._unsafe_view.default)
_CUTS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


def resize(edit: Edit, axes: Axes, removal: Removal) -> None:
    """Rewrite sizes, slices, splits and scales that the removal changed, and recompute the values' shapes."""
    loosen(edit.program.graph)
    for node in list(edit.program.graph.nodes):
        if node.op != "call_function" or not _loses(node, axes, removal):
            continue
        if node.target in _SHAPES:
            _shape(node, _sizes(axes.known[node], removal))
        elif node.target is aten.unflatten.int:
            _unflatten(node, _sizes(axes.known[node], removal))
        elif node.target in _CUTS:
            _pieces(node, axes, removal)
        elif node.target is aten.slice.Tensor:
            _slice(node, axes, removal)
        elif node.target is aten.select.int:
            _select(node, axes, removal)
        elif node.target is aten.scaled_dot_product_attention.default:
            _scale(node)
        elif node.target in CONVOLUTIONS:
            _groups(node, axes, removal)
    edit.recompute()


def loosen(graph: fx.Graph) -> None:
    """Turn views into reshapes: a value that changed, or one computed from it, may have other strides."""
    for node in graph.nodes:
        if node.target in _VIEWS:
            node.target = aten.reshape.default


def _loses(node: fx.Node, axes: Axes, removal: Removal) -> bool:
    """Whether any channel of what the node reads or gives goes; literals of other nodes are as they should be."""
    touched = [axis for value in (node, *node.all_input_nodes) for axis in flat(axes.known.get(value, []))]
    return not all(removal.stays(axis.data).all() for axis in touched)


def _sizes(known: Any, removal: Removal) -> dict[int, int]:
    """The new size of every dimension that has labels."""
    return {dim: size for axis in known for dim, size in zip(axis.dims, removal.shape(axis), strict=True)}


def _shape(node: fx.Node, sizes: dict[int, int]) -> None:
    shape: Any = node.args[1]
    node.update_arg(1, [sizes.get(d, size) if _fixed(size) else size for d, size in enumerate(shape)])


def _fixed(size: Any) -> bool:
    return isinstance(size, int) and size != -1


def _unflatten(node: fx.Node, sizes: dict[int, int]) -> None:
    first, shape = dimension(node, rank_of(node.args[0])), argument(node, "sizes")
    new = [sizes.get(first + i, size) if _fixed(size) else size for i, size in enumerate(shape)]
    node.update_arg(2, new)


def _along(axis: Axis, dim: int, removal: Removal) -> list[bool]:
    """For each position along ``dim``, whether anything of it stays."""
    kept = removal.stays(axis.data)
    others = tuple(i for i, own in enumerate(axis.dims) if own != dim)
    return np.any(kept, axis=others).reshape(-1).tolist()


def _inside(axis: Axis, dim: int, start: int, end: int, removal: Removal) -> int:
    """How wide the part from ``start`` to ``end`` along ``dim`` is afterwards."""
    if start >= end:
        return 0
    place = axis.dims.index(dim)
    part = axis.data[(slice(None),) * place + (slice(start, end),)]
    return removal.shape(Axis(axis.dims, part))[place]


def _pieces(node: fx.Node, axes: Axes, removal: Removal) -> None:
    dim, sizes = pieces(node)
    axis = axis_of(axes.axes(node.args[0]), dim)
    if axis is None:
        return
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    new = [_inside(axis, dim, start, start + size, removal) for start, size in zip(starts, sizes, strict=True)]
    if new != sizes:
        node.target, node.args = aten.split_with_sizes.default, (node.args[0], new, dim)


def _slice(node: fx.Node, axes: Axes, removal: Removal) -> None:
    value = node.args[0]
    dim = dimension(node, rank_of(value))
    axis = axis_of(axes.axes(value), dim)
    if axis is None:
        return
    bounds = slice_bounds(node, axis.data.shape[axis.dims.index(dim)])
    if bounds is not None and bounds[2] == 1:  # one with a step takes whole periods, to the end, as before
        start, end, _ = bounds
        first = _inside(axis, dim, 0, start, removal)
        node.args = (value, dim, first, first + _inside(axis, dim, start, end, removal))


def _select(node: fx.Node, axes: Axes, removal: Removal) -> None:
    value, index = node.args[0], argument(node, "index")
    dim = dimension(node, rank_of(value))
    axis = axis_of(axes.axes(value), dim)
    if axis is not None and isinstance(index, int):
        position = index % axis.data.shape[axis.dims.index(dim)]
        node.update_arg(2, sum(_along(axis, dim, removal)[:position]))


def _scale(node: fx.Node) -> None:
    """Attention divides by the root of its width unless given a scale: give it the one it had."""
    if argument(node, "scale") is None:
        node.update_kwarg("scale", 1 / math.sqrt(value_of(node.args[0]).shape[-1]))


def _groups(node: fx.Node, axes: Axes, removal: Removal) -> None:
    if argument(node, "groups") != 1:
        axis = axis_of(axes.known[node], 1)
        if axis is not None:
            defaults = [declared.default_value for declared in declared_arguments(node)]
            node.args = (*node.args, *defaults[len(node.args) : 7])
            node.update_arg(6, removal.shape(axis)[0])
            node.kwargs = {}
