"""Rules for elementwise operators and weights: which are one, which are tied, which must stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.operands import argument, rank_of, value_of
from .axes import Axes, sizes_of
from .axis import Array, Axis, Known, axis_of
from .views import squeezed

aten = torch.ops.aten

#: Operators whose channels are the second dimension of values and weights.
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
#: Operators with a matrix and a bias on the last dimension.
LINEARS = (aten.linear.default, aten.addmm.default)

Rule = Callable[[Axes, fx.Node], Known]


# ---- elementwise


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [value for value in node.all_input_nodes if isinstance(value.meta.get("val"), Tensor)]


def elementwise(axes: Axes, node: fx.Node) -> Known:
    """Entries at one place are one channel; a vector broadcast over rows is tied to every row."""
    rank, sizes = rank_of(node), sizes_of(node)
    result: list[Axis] = []
    bare: list[tuple[int, ...]] = []
    for value in _tensors(node):
        shape = value.meta["val"].shape
        shift = rank - len(shape)
        own = [axis.moved(lambda dim: dim + shift) for axis in axes.axes(value)]  # noqa: B023  (used at once)
        repeated = {d + shift for d, size in enumerate(shape) if is_one(size) and sizes[d + shift] != 1}
        own = squeezed(_Pins(axes), own, repeated, f"{node.target} repeats it")
        labelled = {dim for axis in own for dim in axis.dims}
        bare.append(tuple(d + shift for d, size in enumerate(shape) if not is_one(size) and d + shift not in labelled))
        for axis in own:
            join(axes, node, result, axis)
    for dims in bare:
        for axis in result:
            for dim in set(dims) & set(axis.dims):
                axes.hold(axis, dim, f"{node.target} with a value that has positions there")
    return result


class _Pins:
    """An axis that is only repeated stays."""

    def __init__(self, axes: Axes):
        self._axes = axes

    def lose(self, axis: Axis, why: str) -> None:
        self._axes.pin(axis.data, why)


def is_one(size: Any) -> bool:
    """Whether a dimension of that size is broadcast."""
    return isinstance(size, int) and size == 1


def join(axes: Axes, node: fx.Node, result: list[Axis], axis: Axis) -> None:
    """Add an operand's axis to those of the result of an elementwise ``node``."""
    shared = [other for other in result if set(other.dims) & set(axis.dims)]
    if not shared:
        result.append(axis)
    elif len(shared) == 1 and shared[0].dims == axis.dims:
        axes.same(shared[0].data, axis.data)
    elif len(shared) == 1 and set(axis.dims) < set(shared[0].dims):
        _broadcast(axes, node, shared[0], axis)
    elif len(shared) == 1 and set(shared[0].dims) < set(axis.dims):
        _broadcast(axes, node, axis, shared[0])
        result[result.index(shared[0])] = axis
    else:
        for other in (axis, *shared):
            axes.pin(other.data, str(node.target))


def _broadcast(axes: Axes, node: fx.Node, wide: Axis, narrow: Axis) -> None:
    axes.broadcast(wide.data, spread(narrow, wide.dims))
    axes.reads(node, wide.data, spread(narrow, wide.dims))


def spread(axis: Axis, dims: tuple[int, ...]) -> Array:
    """The data of ``axis`` with dimensions of size 1 for those of ``dims`` it lacks."""
    return axis.data.reshape([axis.data.shape[axis.dims.index(dim)] if dim in axis.dims else 1 for dim in dims])


# ---- weights


def contract(axes: Axes, node: fx.Node, axis: Axis | None, dim: int, labels: Array, why: str) -> None:
    """The channels of ``axis`` along ``dim`` of an operand meet ``labels``."""
    if axis is None or axis.dims[-1] != dim or axis.data.shape[-1] != labels.size:
        for data in (labels, *([axis.data] if axis is not None else [])):
            axes.pin(data, why)
        return
    axes.contract(node, axis.data)
    axes.contract(node, labels)
    if len(axis.dims) == 1:
        axes.same(axis.data, labels)
    else:
        # One matrix for every head: all keep the same channels, and heads are no longer told apart.
        axes.tie(axis.data, labels)
        for other in axis.dims[:-1]:
            axes.hold(axis, other, why)


def matrix_labels(axes: Axes, node: object, dim: int) -> Array:
    """The labels of a weight along one dimension; fresh ones, which stay, where it has none."""
    axis = axis_of(axes.axes(node), dim)
    if axis is not None and len(axis.dims) == 1:
        return axis.data
    fresh = axes.new(_size(node, dim))
    for labels in (fresh, *([axis.data] if axis is not None else [])):
        axes.pin(labels, "a weight whose channels are not known")
    return fresh


def _size(node: object, dim: int) -> int:
    size = value_of(node).shape[dim]
    return size if isinstance(size, int) else 1


def linear(axes: Axes, node: fx.Node) -> Known:
    """``y = W x + b``: the columns of W are the channels that enter, its rows and b those that leave."""
    value, weight = node.args[:2]
    return affine(axes, node, value, matrix_labels(axes, weight, 1), matrix_labels(axes, weight, 0), node.args[2:3])


def addmm(axes: Axes, node: fx.Node) -> Known:
    """The same with the weight stored (in, out)."""
    bias, value, weight = node.args[:3]
    if argument(node, "beta") != 1 or argument(node, "alpha") != 1:
        return []  # its factors are not part of the weight and the bias that others would change
    return affine(axes, node, value, matrix_labels(axes, weight, 0), matrix_labels(axes, weight, 1), (bias,))


def affine(axes: Axes, node: fx.Node, value: Any, ins: Array, outs: Array, bias: tuple[Any, ...]) -> Known:
    """A weight with channels ``ins`` and ``outs`` on the last dimension of ``value``."""
    last = rank_of(value) - 1
    found = axes.axes(value)
    axis = axis_of(found, last)
    contract(axes, node, axis, last, ins, f"{node.target} of a value whose channels are not known")
    for shift in bias:
        held = axis_of(axes.axes(shift), rank_of(shift) - 1) if isinstance(shift, fx.Node) else None
        if held is not None and held.dims == (rank_of(shift) - 1,):
            axes.same(outs, held.data)
        elif held is not None or (isinstance(shift, fx.Node) and not is_one(shift.meta["val"].shape[-1])):
            axes.pin(outs, "its bias has positions there")
    rest = [other for other in found if other is not axis]
    return [*rest, Axis((rank_of(node) - 1,), outs)] if outs.size > 1 else rest


def convolution(axes: Axes, node: fx.Node) -> Known:
    """Channels of the kernel are those of the values; a depthwise one keeps them. Other dimensions are positions."""
    value, weight = node.args[:2]
    if rank_of(value) != rank_of(weight):
        return []  # without a batch the channels come first
    bias = argument(node, "bias")
    ins, outs = matrix_labels(axes, weight, 1), matrix_labels(axes, weight, 0)
    entering, groups = axis_of(axes.axes(value), 1), argument(node, "groups")
    along = entering if entering is not None and entering.dims == (1,) else None
    if groups == 1:
        contract(axes, node, along, 1, ins, "convolution of a value whose channels are not known")
    elif along is not None and ins.size == 1 and groups == outs.size == along.data.size:
        axes.same(along.data, outs)
    else:
        for labels in (ins, outs):
            axes.pin(labels, "grouped convolution")
    for axis in axes.axes(bias):
        axes.same(outs, axis.data)
    return [Axis((1,), outs)] if outs.size > 1 else []


def embedding(axes: Axes, node: fx.Node) -> Known:
    """The columns of a table are the channels that leave; its rows are looked up by number."""
    axes.pin(matrix_labels(axes, node.args[0], 0), "rows of a table are looked up by number")
    for axis in axes.axes(node.args[1]):
        axes.pin(axis.data, "numbers of rows of a table")
    columns = axis_of(axes.axes(node.args[0]), 1)
    return [Axis((rank_of(node) - 1,), columns.data)] if columns is not None else []


def batch_norm(axes: Axes, node: fx.Node) -> Known:
    """All parameters run along the channels."""
    channels = axis_of(axes.axes(node.args[0]), 1)
    if channels is None or len(channels.dims) > 1:
        return []
    for operand in node.args[1:5]:
        for axis in axes.axes(operand):
            axes.same(channels.data, axis.data)
    return [channels]
