"""Which channels are needed.

Needs go backward: a weight operator needs the channels that its needed outputs read through a weight that is not 0, and
not a constant one (that goes into the bias). A channel that nothing needs is dead.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..deferred.slices import nonzero
from ..graph.operands import rank_of
from ..graph.site import WEIGHT_OPS
from .axes import Axes
from .axis import Array, axis_of
from .constant import ConstantChannels, operands
from .grouped import GROUPED, grouped_reads
from .rules import CONVOLUTIONS, LINEARS
from .table import WITHIN_ROWS

aten = torch.ops.aten
_log = logging.getLogger(__name__)


def needed_channels(axes: Axes, facts: ConstantChannels) -> Array:
    """For every channel class, whether it is needed."""
    return grown(axes, facts, axes.pinned, list(axes.program.graph.nodes))


def grown(axes: Axes, facts: ConstantChannels, need: Array, nodes: list[fx.Node]) -> Array:
    """``need``, and what the operators among ``nodes`` need to compute it.

    What an operator contracts is needed, unless one of the functions below says less.
    """
    need = need.copy()
    readers = []
    for node in reversed(nodes):
        contracted = axes.contracted.get(node)
        if contracted is not None:
            reader = _READERS.get(node.target) or _READERS.get(str(node.target)) or _all
            readers.append((node, reader, _reads(facts, node)))
        if node in axes.read:
            readers.append((node, _repeated, None))
    while True:
        before = need.copy()
        for node, reader, reads in readers:
            try:
                reader(axes, facts, need, node, reads)
            except Exception as error:
                _log.warning("%s: %s needs all it reads: %s: %s", node.name, node.target, type(error).__name__, error)
                _all(axes, facts, need, node, reads)
        if np.array_equal(before, need):
            return need


def _all(axes: Axes, facts: ConstantChannels, need: Array, node: fx.Node, reads: Tensor | None) -> None:
    for labels in axes.contracted.get(node, ()):
        _mark(axes, need, labels)


def _repeated(axes: Axes, facts: ConstantChannels, need: Array, node: fx.Node, reads: Tensor | None) -> None:
    """An entry that the result repeats for other channels is needed where one of these is."""
    for result, operand in axes.read[node]:
        result, operand = np.broadcast_arrays(result, operand)
        _mark(axes, need, operand[need[axes.channel[result]]])


def _row_needs(axes: Axes, facts: ConstantChannels, need: Array, node: fx.Node, reads: Tensor | None) -> None:
    """Channels are taken together in each row: one that is needed needs the others."""
    for labels in axes.contracted[node]:
        live = np.any(need[axes.channel[labels]], axis=-1, keepdims=True)
        _mark(axes, need, labels[np.broadcast_to(live, labels.shape)])


def _mark(axes: Axes, need: Array, labels: Array) -> None:
    need[axes.channel[labels.ravel()]] = True


def _reads(facts: ConstantChannels, node: fx.Node) -> Tensor | None:
    """A tensor (out, in, …) that is not 0 where an output of a weight operator reads an input: the weight itself, or
    that of all experts. None when the weight is not known."""
    if node.target in LINEARS:
        weight = facts.matrix(operands(node)[1])
        return None if weight is None else WEIGHT_OPS[node.target].matrix(weight)
    if node.target in CONVOLUTIONS:
        return facts.matrix(node.args[1])
    return grouped_reads(facts.constants, node, facts.experts)


def _weight_needs(axes: Axes, facts: ConstantChannels, need: Array, node: fx.Node, reads: Tensor | None) -> None:
    """A weight's needed outputs need the channels they read through a number that is not 0."""
    value = operands(node)[0] if node.target in LINEARS else node.args[0]
    convolution = node.target in CONVOLUTIONS
    dim = 1 if convolution else rank_of(value) - 1
    leaving = axis_of(axes.axes(node), 1 if convolution else rank_of(node) - 1)
    entering = axis_of(axes.axes(value), dim)
    if entering is None or reads is None or reads.shape[1] != entering.data.shape[-1]:
        _all(axes, facts, need, node, reads)  # whatever else it contracts is pinned
        return
    live = need[axes.channel[leaving.data]] if leaving is not None else np.ones(reads.shape[0], bool)
    wanted = np.broadcast_to(nonzero(reads, 1, torch.from_numpy(live)).numpy(), entering.data.shape)
    free = facts.free(node)
    if free is not None and free.shape == wanted.shape:
        wanted = wanted & ~free
    _mark(axes, need, entering.data[wanted])


def _attention_needs(axes: Axes, facts: ConstantChannels, need: Array, node: fx.Node, reads: Tensor | None) -> None:
    """A head with a needed channel needs its query and key, channel by channel unless one of them is 0."""
    result = axis_of(axes.axes(node), 3)
    if rank_of(node) != 4 or result is None or result.dims != (1, 3):
        _all(axes, facts, need, node, reads)
        return
    live = np.any(need[axes.channel[result.data]], axis=1)
    for labels in axes.contracted[node]:  # of query and key, with one row a head
        wanted = np.broadcast_to(live[:, None], labels.shape).copy()
        for operand in node.args[:2]:
            found = axis_of(facts.of(operand), 3)
            if found is not None and found.dims == (1, 3):
                wanted &= np.repeat(found.data, len(labels) // found.data.shape[0], axis=0) != 0
        _mark(axes, need, labels[wanted])


def _product_needs(axes: Axes, facts: ConstantChannels, need: Array, node: fx.Node, reads: Tensor | None) -> None:
    """Channels that meet are needed, unless those of the other side are 0."""
    a, b = node.args[:2]
    if rank_of(b) not in (2, rank_of(a)):
        _all(axes, facts, need, node, reads)
        return
    for value, other, dim, twin in ((a, b, rank_of(a) - 1, rank_of(b) - 2), (b, a, rank_of(b) - 2, rank_of(a) - 1)):
        axis, found = axis_of(axes.axes(value), dim), axis_of(facts.of(other), twin)
        if axis is not None:
            known = found if found is not None and found.data.shape == axis.data.shape else None
            _mark(axes, need, axis.data if known is None else axis.data[known.data != 0])


#: What operators need of what they contract; any other needs all of it.
_READERS: dict[Any, Any] = {
    **dict.fromkeys((*LINEARS, *CONVOLUTIONS, *GROUPED), _weight_needs),
    aten.scaled_dot_product_attention.default: _attention_needs,
    **dict.fromkeys((aten.bmm.default, aten.matmul.default, aten.mm.default), _product_needs),
    **dict.fromkeys(WITHIN_ROWS, _row_needs),
}
