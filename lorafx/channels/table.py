"""The table of operators whose channels can be followed. A new operator is one word here, or one rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from .axes import Axes, flat
from .axis import Array, Axis, Known
from .grouped import GROUPED, grouped
from .mixing import attention, layer_norm, normalised, pooling, product, reduction
from .moves import MOVES, overloads
from .rules import CONVOLUTIONS, Rule, addmm, batch_norm, convolution, elementwise, embedding, linear

aten = torch.ops.aten


class Labels:
    """Labels as the thing that moves carry."""

    def __init__(self, axes: Axes, node: fx.Node):
        self.found, self.node = axes, node

    def lose(self, axis: Axis, why: str) -> None:
        self.found.pin(axis.data, why)

    def squash(self, axis: Axis, dim: int, why: str) -> Axis | None:
        place = axis.dims.index(dim)
        if len(axis.dims) == 1 or place == len(axis.dims) - 1:
            self.found.pin(axis.data, why)
            return None
        # Heads among the rows of a batch: all heads keep the same channels, and no head goes.
        data = np.moveaxis(axis.data, place, 0)
        self.found.tie(data[:1], data)
        self.found.reads(self.node, data[:1], data)
        self.found.hold(axis, dim, why)
        return Axis(tuple(d for d in axis.dims if d != dim), data[0])

    def rows(self, data: Array) -> None:
        self.found.rows(data)

    def leave(self, data: Array) -> None:
        self.found.leave(data)

    def step(self, data: Array) -> None:
        self.found.tie(data[..., :1], data)

    def hold(self, data: Array) -> None:
        self.found.hold_rows(data)

    def among(self, axis: Axis, value: float | None) -> Axis:
        return axis

    def fixed(self, size: int) -> Array:
        labels = self.found.new(size)
        self.found.pin(labels, "positions of a value without channels")
        return labels

    def alike(self, axes: list[Axis], why: str) -> Axis:
        for axis in axes[1:]:
            self.found.same(axes[0].data, axis.data)
        return axes[0]


def _moved(move: Any) -> Rule:
    def rule(axes: Axes, node: fx.Node) -> Known:
        return move(Labels(axes, node), node, axes.axes)

    return rule


def nothing(axes: Axes, node: fx.Node) -> Known:
    """A value that has none of the channels it reads: a size, a range."""
    for value in node.all_input_nodes:
        for axis in flat(axes.known[value]):
            axes.leave(axis.data)
    return []


def shaped_like(axes: Axes, node: fx.Node) -> Known:
    """A value of the shape of another, whatever it holds."""
    return axes.axes(node.args[0])


_ELEMENTWISE = """
add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar mul.Tensor mul.Scalar div.Tensor div.Scalar pow.Tensor_Scalar
pow.Scalar pow.Tensor_Tensor neg.default abs.default exp.default log.default sqrt.default rsqrt.default
reciprocal.default tanh.default sigmoid.default relu.default gelu.default silu.default mish.default softplus.default
elu.default leaky_relu.default hardtanh.default hardswish.default hardsigmoid.default relu6.default celu.default
selu.default clamp.default clamp_min.default clamp_max.default erf.default sin.default cos.default logit.default
square.default where.self where.ScalarOther where.ScalarSelf where.Scalar masked_fill.Scalar masked_fill.Tensor
maximum.default minimum.default max.other min.other sign.default floor.default ceil.default round.default ge.Scalar
gt.Scalar le.Scalar lt.Scalar ne.Scalar eq.Scalar ge.Tensor gt.Tensor le.Tensor lt.Tensor ne.Tensor eq.Tensor
__and__.Tensor __or__.Tensor logical_and.default logical_or.default logical_not.default bitwise_not.default
bitwise_and.Tensor bitwise_or.Tensor addcmul.default addcdiv.default lerp.Scalar lerp.Tensor
"""
_NORMALISED = "softmax.int _softmax.default log_softmax.int cumsum.default"
_REDUCTIONS = "mean.dim sum.dim_IntList amax.default amin.default any.dim all.dim"
_POOLING = "max_pool2d.default avg_pool2d.default adaptive_avg_pool2d.default max_pool1d.default avg_pool1d.default"
_NOTHING = """
sym_size.int arange.default arange.start arange.start_step full.default zeros.default ones.default new_ones.default
new_zeros.default new_full.default new_empty.default empty.memory_format scalar_tensor.default
_assert_tensor_metadata.default sym_constrain_range.default _assert_scalar.default
"""
_LIKE = "zeros_like.default ones_like.default full_like.default empty_like.default rand_like.default randn_like.default"

ELEMENTWISE = frozenset(overloads(_ELEMENTWISE))
#: Operators that compute the channels of a row together.
WITHIN_ROWS = frozenset(overloads(f"{_NORMALISED} {_REDUCTIONS} layer_norm.default rms_norm.default"))

#: What the analysis knows. Any other operator pins what it reads.
RULES: dict[Any, Rule] = {
    **{target: _moved(move) for target, move in MOVES.items()},
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(overloads(_NORMALISED), normalised),
    **dict.fromkeys(overloads(_REDUCTIONS), reduction),
    **dict.fromkeys(overloads(_POOLING), pooling),
    **dict.fromkeys(overloads(_NOTHING), nothing),
    **dict.fromkeys(overloads(_LIKE), shaped_like),
    **dict.fromkeys(CONVOLUTIONS, convolution),
    **dict.fromkeys(overloads("bmm.default matmul.default mm.default"), product),
    aten.linear.default: linear,
    aten.addmm.default: addmm,
    aten.embedding.default: embedding,
    aten.batch_norm.default: batch_norm,
    **dict.fromkeys(overloads("layer_norm.default rms_norm.default"), layer_norm),
    aten.scaled_dot_product_attention.default: attention,
    **dict.fromkeys(GROUPED, grouped),
}
