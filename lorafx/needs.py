"""Which channels anybody needs.

Needs go backward: a weight operator needs the channels that its needed outputs read through a weight that is not 0, and
no constant one (that goes into the bias). A channel that nobody needs is dead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .axes import Array, Axes, axis_of
from .axis_moves import rank_of
from .channels import CONVOLUTIONS, Facts, operands
from .grouped import GROUPED, grouped_reads, is_grouped

aten = torch.ops.aten


def needed(axes: Axes, facts: Facts) -> Array:
    """For every channel class, whether anybody needs it."""
    need = np.zeros(axes.count, bool)
    if axes.reasons:
        need[axes.channel[np.fromiter(axes.reasons, int)]] = True
    return grown(axes, facts, need, list(axes.program.graph.nodes))


def grown(axes: Axes, facts: Facts, need: Array, nodes: list[fx.Node]) -> Array:
    """``need``, and what the operators among ``nodes`` need to compute it."""
    readers = [(node, _sink(node), _reads(facts, node)) for node in reversed(nodes) if _sink(node) is not None]
    while True:
        before = need.copy()
        for node, sink, reads in readers:
            sink(axes, facts, need, node, reads)
        if np.array_equal(before, need):
            return need


def _sink(node: fx.Node) -> Any:
    return _SINKS.get(node.target) or _SINKS.get(str(node.target))


def _mark(axes: Axes, need: Array, labels: Array) -> None:
    need[axes.channel[labels.ravel()]] = True


def _reads(facts: Facts, node: fx.Node) -> Tensor | None:
    """Which outputs of a weight operator read which inputs (out, in); None when the weight is not known."""
    if node.target in (aten.linear.default, aten.addmm.default):
        weight = facts.weight(operands(node)[1])
        return None if weight is None else (weight if node.target is aten.linear.default else weight.t()) != 0
    if node.target in CONVOLUTIONS:
        weight = facts.weight(node.args[1])
        return None if weight is None else (weight != 0).flatten(2).any(2)
    return grouped_reads(facts.constants, node, facts.experts)


def _weight_needs(axes: Axes, facts: Facts, need: Array, node: fx.Node, reads: Tensor | None) -> None:
    value = operands(node)[0] if node.target in (aten.linear.default, aten.addmm.default) else node.args[0]
    convolution = node.target in CONVOLUTIONS
    dim = 1 if convolution else rank_of(value) - 1
    entering, leaving = (
        axis_of(axes.axes(value), dim),
        axis_of(axes.axes(node), 1 if convolution else rank_of(node) - 1),
    )
    if entering is None:
        return
    if convolution and entering.data.size != (reads.shape[1] if reads is not None else -1):
        return  # depthwise: input and output are one channel
    wanted = np.ones(entering.data.shape[-1], bool)
    if reads is not None:
        live = (
            torch.from_numpy(need[axes.channel[leaving.data]])
            if leaving is not None
            else torch.ones(1, dtype=torch.bool)
        )
        wanted = reads[live.to(reads.device)].any(0).cpu().numpy()
    known = axis_of(facts.of(value), dim)
    if known is not None and known.dims == entering.dims:
        # A convolution's padding shows beside a constant, and experts give it different factors, unless it is 0.
        free = known.data == 0 if convolution or is_grouped(node) else ~np.isnan(known.data)
        wanted = wanted & ~free
    _mark(axes, need, entering.data[np.broadcast_to(wanted, entering.data.shape)])


def _attention_needs(axes: Axes, facts: Facts, need: Array, node: fx.Node, reads: Tensor | None) -> None:
    query, key = node.args[:2]
    count = query.meta["val"].shape[1]  # type: ignore[union-attr]
    result = axis_of(axes.axes(node), 3)
    if result is None or not isinstance(count, int):
        return
    live = np.asarray(need[axes.channel[result.data]].any(axis=1))
    labels = heads_of(axes, query, count)
    if labels is None:
        return
    wanted = np.broadcast_to(live[:, None], labels.shape).copy()
    for operand in (query, key):
        found = axis_of(facts.of(operand), 3)
        if found is not None and found.dims == (1, 3):
            wanted &= np.repeat(found.data, count // found.data.shape[0], axis=0) != 0
    _mark(axes, need, labels[wanted])


def heads_of(axes: Axes, value: Any, count: int) -> Array | None:
    """The labels (heads, channels) of a query, or None where they are not of heads (and pinned)."""
    axis = axis_of(axes.axes(value), 3)
    return axis.data if axis is not None and axis.dims == (1, 3) else None


def _product_needs(axes: Axes, facts: Facts, need: Array, node: fx.Node, reads: Tensor | None) -> None:
    a, b = node.args[:2]
    for value, other, dim, twin in ((a, b, rank_of(a) - 1, rank_of(b) - 2), (b, a, rank_of(b) - 2, rank_of(a) - 1)):
        axis, found = axis_of(axes.axes(value), dim), axis_of(facts.of(other), twin)
        if axis is not None:
            zero = found is not None and found.data.shape == axis.data.shape
            _mark(axes, need, axis.data[found.data != 0] if zero else axis.data)  # type: ignore[union-attr]


_SINKS: dict[Any, Any] = {
    aten.linear.default: _weight_needs,
    aten.addmm.default: _weight_needs,
    **dict.fromkeys((*CONVOLUTIONS, *GROUPED), _weight_needs),
    aten.scaled_dot_product_attention.default: _attention_needs,
    **dict.fromkeys((aten.bmm.default, aten.matmul.default, aten.mm.default), _product_needs),
}
