"""Rules for operators that mix channels: attention, products of activations, norms and reductions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from ..graph.operands import argument, rank_of, value_of
from .axes import Axes
from .axis import Array, Axis, Known, axis_of
from .rules import affine, is_one, join, matrix_labels

aten = torch.ops.aten

# ---- attention and products of activations


def heads(axes: Axes, value: fx.Node, count: int) -> Array:
    """The labels of a value (batch, heads, length, channels) as an array (heads, channels)."""
    _, rows, _, channels = value_of(value).shape
    axis = axis_of(axes.axes(value), 3)
    if axis is None:
        data = axes.new(rows, channels)
        axes.pin(data, "attention over channels that are not known")
    elif axis.dims == (1, 3):
        data = axis.data
    else:
        axes.pin(axis.data, "attention over channels that are not of heads")
        data = np.broadcast_to(axis.data.reshape(-1, channels)[-1], (rows, channels))
    return np.repeat(data, count // data.shape[0], axis=0) if data.shape[0] < count else data


def attention(axes: Axes, node: fx.Node) -> Known:
    """Query and key meet channel by channel within each head; the channels of the value leave.

    Positions, of tokens or of a batch, that are channels of something (learned queries) are not accounted for, and so
    pinned.
    """
    operands: Any = node.args[:3]
    if any(rank_of(operand) != 4 for operand in operands):
        return _attention_without_heads(axes, node)
    counts = [operand.meta["val"].shape[1] for operand in operands]
    count = counts[0]
    if not all(isinstance(own, int) and own <= count and count % own == 0 for own in counts):
        return []
    q, k, v = (heads(axes, operand, count) for operand in operands)
    axes.contract(node, q)
    axes.contract(node, k)
    axes.same(q, k)
    # A head is one row of query, key and value, whatever number of channels each has.
    axes.same_rows(q, v)
    mask = argument(node, "attn_mask")
    if isinstance(mask, fx.Node):
        if mask.meta["val"].dim() > 2 and not is_one(mask.meta["val"].shape[-3]):  # with or without a batch
            axes.hold_rows(v)
        for axis in axes.axes(mask):
            axes.pin(axis.data, "an attention mask")
    return [Axis((1, 3), v)]


def _attention_without_heads(axes: Axes, node: fx.Node) -> Known:
    """Attention over values that were never split into heads: their last dimensions are those of one head."""
    query, key, value = (axis_of(axes.axes(operand), rank_of(operand) - 1) for operand in node.args[:3])
    if query is None or key is None or len(query.dims) + len(key.dims) != 2:
        return []
    axes.contract(node, query.data)
    axes.same(query.data, key.data)
    return [value] if value is not None and len(value.dims) == 1 else []


def product(axes: Axes, node: fx.Node) -> Known:
    """The last dimension of one value meets the second to last of another."""
    a, b = node.args[:2]
    rank = rank_of(a)
    if rank_of(b) == 2 and rank >= 2:
        return affine(axes, node, a, matrix_labels(axes, b, 0), matrix_labels(axes, b, 1), ())
    if rank_of(b) != rank or rank < 2:
        return []
    left, right = axis_of(axes.axes(a), rank - 1), axis_of(axes.axes(b), rank - 2)
    inner = (left, right)
    if left is not None and right is not None and _alike_batches(left, right, rank):
        axes.contract(node, left.data)
        axes.contract(node, right.data)
        axes.same(left.data, right.data)
    else:
        for axis in inner:
            if axis is not None:
                axes.pin(axis.data, f"{node.target} with a value that has positions there")
    result: list[Axis] = []
    for value, last in ((a, rank - 2), (b, rank - 1)):
        for axis in axes.axes(value):
            for dim in axis.dims:
                if dim < rank - 2:
                    axes.hold(axis, dim, str(node.target))
            if last in axis.dims and all(axis is not other for other in inner):
                result.append(axis)
    return result


def _alike_batches(left: Axis, right: Axis, rank: int) -> bool:
    """Whether two contracted axes have the same dimensions besides the contracted ones, all of a batch."""
    batch = tuple(dim for dim in left.dims if dim != rank - 1)
    return batch == tuple(dim for dim in right.dims if dim != rank - 2) and all(dim < rank - 2 for dim in batch)


# ---- over a dimension


def dims_of(node: fx.Node, position: int) -> set[int]:
    """The dimensions that an argument names; all where it names none."""
    rank = rank_of(node.args[0])
    given = node.args[position] if len(node.args) > position else None
    chosen: Any = list(range(rank)) if given is None else given if isinstance(given, (list, tuple)) else [given]
    return {int(dim) % rank for dim in chosen}


def _whole(axes: Axes, node: fx.Node, found: list[Axis], over: set[int], why: str) -> None:
    """Channels along ``over`` are computed together: inside a row all stay or all go, elsewhere all stay."""
    for axis in found:
        if not set(axis.dims) & over:
            continue
        if axis.dims[-1] in over and len(axis.dims) > 1 and not set(axis.dims[:-1]) & over:
            axes.tie(axis.data[..., :1], axis.data)
            axes.contract(node, axis.data)
        else:
            axes.pin(axis.data, why)


def normalised(axes: Axes, node: fx.Node) -> Known:
    """Softmax and similar operators: the same sizes, computed over one dimension."""
    found = axes.axes(node.args[0])
    _whole(axes, node, found, dims_of(node, 1), f"{node.target} runs over it")
    return found


def layer_norm(axes: Axes, node: fx.Node) -> Known:
    """A norm over the last dimensions: its channels stay, or go with their row."""
    found, rank = axes.axes(node.args[0]), rank_of(node)
    inner = rank - len(argument(node, "normalized_shape"))
    _whole(axes, node, found, set(range(inner, rank)), "a norm runs over it")
    result = list(found)
    operands = [argument(node, "weight")]
    operands += [argument(node, "bias")] if node.target is aten.layer_norm.default else []  # an RMS norm has none
    for operand in operands:
        for axis in axes.axes(operand):
            there = axis.moved(lambda dim: dim + inner)
            if any(axis_of(found, dim) is None for dim in (rank - 1, *there.dims)):
                axes.pin(axis.data, "a norm over channels that are not known")
            join(axes, node, result, there)
    return result


def reduction(axes: Axes, node: fx.Node) -> Known:
    """A sum, mean or extreme over dimensions."""
    found, over = axes.axes(node.args[0]), dims_of(node, 1)
    _whole(axes, node, found, over, f"{node.target} runs over it")
    keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    result = []
    for axis in found:
        gone = set(axis.dims) & over
        if gone == {axis.dims[-1]} and len(axis.dims) > 1:
            axis = Axis(axis.dims[:-1], axis.data[..., 0])
        elif gone:
            continue
        result.append(axis if keep else axis.moved(lambda dim: dim - sum(o < dim for o in over)))
    return result


def pooling(axes: Axes, node: fx.Node) -> Known:
    """Pooling over space keeps the channels, which come second where there is a batch."""
    spatial = 2 if "2d" in str(node.target) else 1
    return [axis for axis in axes.axes(node.args[0]) if axis.dims == (1,) and rank_of(node) == spatial + 2]
