"""What operators that mix channels say of them: attention, products of activations, norms and reductions."""

from __future__ import annotations

import numpy as np
from torch import fx

from .axes import Array, Axes, Axis, Known, axis_of
from .axis_moves import rank_of
from .axis_rules import affine, is_one, join, matrix_labels, pinned

# ---- attention and products of activations


def heads(axes: Axes, value: fx.Node, count: int) -> Array:
    """The labels of a value (batch, heads, length, channels) as an array (heads, channels)."""
    rows, channels = (value.meta["val"].shape[dim] for dim in (1, 3))
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
    """Query and key meet channel by channel within each head; the channels of the value leave."""
    query, key, value = node.args[:3]
    count = query.meta["val"].shape[1]  # type: ignore[union-attr]
    if not isinstance(count, int):
        return pinned(axes, node, "attention with a free number of heads")
    q, k, v = (heads(axes, operand, count) for operand in (query, key, value))  # type: ignore[arg-type]
    axes.same(q, k)
    # A head is one row of query, key and value, whatever number of channels each has.
    axes.same_rows(q, v)
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if isinstance(mask, fx.Node):
        if mask.meta["val"].dim() == 4 and not is_one(mask.meta["val"].shape[1]):
            axes.hold_rows(v)
        for axis in axes.axes(mask):
            axes.pin(axis.data, "an attention mask")
    return [Axis((1, 3), v)]


def product(axes: Axes, node: fx.Node) -> Known:
    """The last dimension of one value meets the last but one of another."""
    a, b = node.args[:2]
    rank = rank_of(a)
    if rank_of(b) == 2 and rank >= 2:
        return affine(axes, node, a, matrix_labels(axes, b, 0), matrix_labels(axes, b, 1), ())
    if rank_of(b) != rank:
        return pinned(axes, node, f"{node.target} of different ranks")
    inner = axis_of(axes.axes(a), rank - 1), axis_of(axes.axes(b), rank - 2)
    shapes = [tuple(dim if dim < rank - 2 else rank for dim in axis.dims) if axis else None for axis in inner]
    if None not in shapes and shapes[0] == shapes[1]:
        axes.same(inner[0].data, inner[1].data)  # type: ignore[union-attr]
    else:
        for axis in inner:
            if axis is not None:
                axes.pin(axis.data, f"{node.target} with a value that has positions there")
    result = []
    for value, last in ((a, rank - 2), (b, rank - 1)):
        for axis in axes.axes(value):
            if axis in inner:
                _hold_batch(axes, axis, rank, str(node.target))
            elif last in axis.dims or max(axis.dims) < rank - 2:
                _hold_batch(axes, axis, rank, str(node.target))
                kept = axis_of([axis], last)
                if kept is not None:
                    result.append(axis)
    return result


def _hold_batch(axes: Axes, axis: Axis, rank: int, why: str) -> None:
    for dim in axis.dims:
        if dim < rank - 2:
            axes.hold(axis, dim, why)


# ---- over a dimension


def _dims(node: fx.Node, position: int) -> set[int]:
    rank = rank_of(node.args[0])
    given = node.args[position] if len(node.args) > position else None
    chosen = list(range(rank)) if given is None else given if isinstance(given, (list, tuple)) else [given]
    return {int(dim) % rank for dim in chosen}  # type: ignore[arg-type]


def _whole(axes: Axes, found: list[Axis], over: set[int], why: str) -> None:
    """Channels along ``over`` are taken together: in a row all stay or all go, elsewhere all stay."""
    for axis in found:
        if not set(axis.dims) & over:
            continue
        if axis.dims[-1] in over and len(axis.dims) > 1 and not set(axis.dims[:-1]) & over:
            axes.tie(axis.data[..., :1], axis.data)
        else:
            axes.pin(axis.data, why)


def normalised(axes: Axes, node: fx.Node) -> Known:
    """Softmax and its kind: the same sizes, computed over one dimension."""
    found = axes.axes(node.args[0])
    _whole(axes, found, _dims(node, 1), f"{node.target} runs over it")
    return found


def layer_norm(axes: Axes, node: fx.Node) -> Known:
    """A norm over the last dimensions: its channels stay, or go with their row."""
    found, rank = axes.axes(node.args[0]), rank_of(node)
    over = set(range(rank - len(node.args[1]), rank))  # type: ignore[arg-type]
    _whole(axes, found, over, "a norm runs over it")
    result = list(found)
    for operand in node.args[2:4]:
        for axis in axes.axes(operand):
            if axis_of(found, rank - 1) is None:
                axes.pin(axis.data, "a norm over channels that are not known")
            join(axes, result, axis.moved(lambda dim: dim + rank - len(node.args[1])), "a norm")  # type: ignore
    return result


def reduction(axes: Axes, node: fx.Node) -> Known:
    """A sum, mean or extreme over dimensions."""
    found, over = axes.axes(node.args[0]), _dims(node, 1)
    _whole(axes, found, over, f"{node.target} runs over it")
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
    """Pooling over space keeps the channels."""
    return [axis for axis in axes.axes(node.args[0]) if axis.dims == (1,)]
