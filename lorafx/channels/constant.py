"""Which channels have one constant value.

Constants go forward: a zero row gives its bias, elementwise operators map it, a factor 0 absorbs.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..deferred.slices import nonzero, uniform
from ..deferred.tensor import value as value_of
from ..graph.constants import Constants
from ..graph.operands import argument, is_float, operator_of, rank_of
from ..graph.site import WEIGHT_OPS
from ..graph.tree import get_tensor
from .axes import Axes
from .axis import Array, Axis, axis_of
from .constant_mixing import NORMS, PRODUCTS, REDUCTIONS, combined, norm, product, reduction
from .grouped import grouped_reads, is_grouped
from .moves import MOVES
from .rules import CONVOLUTIONS, LINEARS, spread
from .table import ELEMENTWISE

aten = torch.ops.aten

_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
#: Operators that choose between two operands, and where these are among the arguments.
_CHOICES: dict[Any, tuple[int, int]] = {
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar), (1, 2)),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), (0, 2)),
}
_log = logging.getLogger(__name__)


class _Carried:
    """ConstantChannels, as what moves carry: what cannot be followed is forgotten."""

    def lose(self, axis: Axis, why: str) -> None:
        pass

    def rows(self, data: Array) -> None:
        pass

    def leave(self, data: Array) -> None:
        pass

    def step(self, data: Array) -> None:
        pass

    def hold(self, data: Array) -> None:
        pass

    def among(self, axis: Axis, value: float | None) -> Axis:
        return axis if value is None else Axis(axis.dims, np.where(axis.data == value, axis.data, np.nan))

    def fixed(self, size: int) -> Array:
        return np.full(size, np.nan)

    def squash(self, axis: Axis, dim: int, why: str) -> Axis | None:
        if len(axis.dims) == 1:
            return None
        data = np.moveaxis(axis.data, axis.dims.index(dim), 0)
        return Axis(tuple(d for d in axis.dims if d != dim), np.where((data == data[:1]).all(0), data[0], np.nan))

    def alike(self, axes: list[Axis], why: str) -> Axis:
        data = np.stack([axis.data for axis in axes])
        return Axis(axes[0].dims, np.where((data == data[:1]).all(0), data[0], np.nan))


class ConstantChannels:
    """For every axis of every value, the constant that each of its channels is; NaN where it has none.

    Attributes:
        axes: the axes of the program
        constants: its constant nodes
        known: the facts about each node, in its axes
        experts: whose rows the facts are about, where rows are sorted by expert
    """

    experts = slice(None)

    def __init__(self, axes: Axes):
        self.axes = axes
        self.constants = Constants(axes.program.root)
        self.known: dict[fx.Node, Any] = {}
        for node in axes.program.graph.nodes:
            self.known[node] = self._visit(node)

    def of(self, value: object) -> list[Axis]:
        """The facts about a value, in the axes its labels have."""
        return self.known[value] if isinstance(value, fx.Node) else []

    def vector(self, node: fx.Node) -> Array | None:
        """The value of a node all of whose channels are constant, with a dimension for each of the value's, of size 1
        where it is repeated; None where any channel is not."""
        value = node.meta.get("val")
        known = self.of(node) if isinstance(value, Tensor) and value.is_floating_point() else []
        for axis in known:
            if axis.data.size and not np.isnan(axis.data).any():
                sizes = dict(zip(axis.dims, axis.data.shape, strict=True))
                return axis.data.reshape([sizes.get(dim, 1) for dim in range(rank_of(node))])
        return None

    def among(self, experts: slice, nodes: list[fx.Node]) -> ConstantChannels:
        """The facts about ``nodes``, in graph order, in the rows of these experts alone."""
        result = copy.copy(self)
        result.experts, result.known = experts, dict(self.known)
        for node in nodes:
            result.known[node] = result._visit(node)
        return result

    def _visit(self, node: fx.Node) -> Any:
        labels = self.axes.known[node]
        if not labels or node.op not in ("get_attr", "call_function"):
            return labels
        several = isinstance(labels[0], list)
        if node in self.axes.changing:
            found = []
        else:
            try:
                found = self._found(node, labels)
            except Exception as error:
                _log.warning("%s: no constants of %s: %s: %s", node.name, node.target, type(error).__name__, error)
                found = []
        if several:
            return [_matched(part, own) for part, own in zip(labels, found or [[] for _ in labels], strict=True)]
        return _matched(labels, found)

    def _found(self, node: fx.Node, labels: list[Axis]) -> Any:
        """What the operator makes constant; axes that it leaves out are unknown."""
        if node.op == "get_attr":
            value = get_tensor(self.axes.program.root, str(node.target))
            return [Axis(axis.dims, _uniform(value, axis.dims[0])) for axis in labels]
        if node.target in MOVES:
            moved = MOVES[node.target](_Carried(), node, self.of)
            return moved if isinstance(node.meta["val"], (list, tuple)) or is_float(node) else []
        if node.target in ELEMENTWISE:
            return [Axis(axis.dims, self._elementwise(node, axis)) for axis in labels]
        if node.target is aten.scaled_dot_product_attention.default:
            return [Axis(axis.dims, self._attention(node, axis)) for axis in labels]
        if node.target in (*PRODUCTS, *REDUCTIONS, *NORMS) and is_float(node):
            mixed = product if node.target in PRODUCTS else reduction if node.target in REDUCTIONS else norm
            return [Axis(axis.dims, np.where(np.isfinite(axis.data), axis.data, np.nan)) for axis in mixed(self, node)]
        last = self._computed(node)
        return [Axis((_place(node),), np.where(np.isfinite(last), last, np.nan))] if last is not None else []

    def _computed(self, node: fx.Node) -> Array | None:
        if node.target in LINEARS:
            return self._linear(node)
        if node.target in CONVOLUTIONS:
            return self._convolution(node)
        if node.target is aten.batch_norm.default:
            return self._batch_norm(node)
        if is_grouped(node):
            return self._grouped(node)
        if node.target is aten.embedding.default:
            weight = self.matrix(node.args[0])
            return None if weight is None else _uniform(weight, 1)
        return None

    def weight(self, value: object) -> Tensor | None:
        """The value of a constant operand in fp64, or None when it is computed from inputs."""
        if not isinstance(value, fx.Node) or self.constants.reads(value) is None:
            return None
        return self.constants.value(value, torch.float64)

    def matrix(self, value: object) -> Tensor | None:
        """The value of a constant operand in a dtype of its own, not necessarily computed yet; None as above."""
        if isinstance(value, fx.Node) and value.op == "get_attr" and self.constants.reads(value) is not None:
            return self.constants.value(value)
        return self.weight(value)

    def has_plain_bias(self, node: fx.Node) -> bool:
        """Whether a linear or addmm node has no bias, or adds a constant vector unscaled."""
        bias = operands(node)[2]
        if node.target is aten.addmm.default and (argument(node, "beta") != 1 or argument(node, "alpha") != 1):
            return False
        shift = self.weight(bias) if bias is not None else None
        return bias is None or (shift is not None and shift.dim() == 1)

    def free(self, node: fx.Node) -> Array | None:
        """Which channels along the last dimension of its input a weight operator can do without, read or not: those
        that are 0, and any constant, where the operator's bias can absorb it (:meth:`absorbs`).
        """
        value = operands(node)[0] if node.target in LINEARS else node.args[0]
        dim = 1 if node.target in CONVOLUTIONS else rank_of(value) - 1
        known = axis_of(self.of(value), dim)
        if known is None:
            return None
        return ~np.isnan(known.data) if self.absorbs(node) else known.data == 0

    def absorbs(self, node: fx.Node) -> bool:
        """Whether constant channels of the node's input can go into its bias.

        Not through a convolution's padding, nor where experts give them different factors, nor where one matrix reads
        several heads, which may have different constants.
        """
        if node.target not in LINEARS:
            return False
        value, weight, _ = operands(node)
        known = axis_of(self.of(value), rank_of(value) - 1)
        plain = known is not None and len(known.dims) == 1 and self.has_plain_bias(node)
        return plain and isinstance(weight, fx.Node) and self.constants.reads(weight) is not None

    def _linear(self, node: fx.Node) -> Array | None:
        value, weight, bias = operands(node)
        matrix, shift = self.matrix(weight), self.weight(bias) if bias is not None else None
        entering = axis_of(self.of(value), rank_of(value) - 1)
        if matrix is None or not self.has_plain_bias(node):
            return None
        matrix = WEIGHT_OPS[node.target].matrix(matrix)
        known = entering.data if entering is not None and len(entering.dims) == 1 else np.full(matrix.shape[1], np.nan)
        return combined(matrix, known, shift)

    def _convolution(self, node: fx.Node) -> Array | None:
        value, kernel, bias = node.args[0], node.args[1], argument(node, "bias")
        weight = self.matrix(kernel)
        shift = self.weight(bias) if bias is not None else None
        entering = axis_of(self.of(value), 1)
        if weight is None or argument(node, "groups") != 1 or (bias is not None and shift is None):
            return None
        known = entering.data if entering is not None and entering.dims == (1,) else np.full(weight.shape[1], np.nan)
        # The border is padded with zeros, so only a constant of 0 goes through a padded convolution.
        return combined(weight, np.where(known == 0, known, np.nan), shift)

    def _grouped(self, node: fx.Node) -> Array | None:
        # A constant other than 0 would differ from expert to expert.
        reads, entering = grouped_reads(self.constants, node, self.experts), axis_of(self.of(node.args[0]), 1)
        if reads is None:
            return None
        zero = entering.data == 0 if entering is not None and entering.dims == (1,) else np.zeros(reads.shape[1], bool)
        return np.where(nonzero(reads, 0, torch.from_numpy(~zero)).numpy(), np.nan, 0.0)

    def _batch_norm(self, node: fx.Node) -> Array | None:
        entering = axis_of(self.of(node.args[0]), 1)
        scale, shift, mean, variance = (None if arg is None else self.weight(arg) for arg in node.args[1:5])
        if entering is None or mean is None or variance is None or node.args[5]:
            return None
        factor = (scale if scale is not None else 1.0) / (variance + float(argument(node, "eps"))).sqrt()
        offset = shift if shift is not None else torch.zeros_like(mean)
        mapped = (torch.tensor(entering.data) - mean.cpu()) * factor.cpu() + offset.cpu()
        return torch.where(factor.cpu() == 0, offset.cpu(), mapped).numpy()

    def _attention(self, node: fx.Node, axis: Axis) -> Array:
        # A row of the mask may let nothing through, which gives 0 instead of an average: only 0 is sure to stay.
        value: Any = node.args[2]
        found = axis_of(self.of(value), rank_of(value) - 1)
        if found is None or found.dims != axis.dims or rank_of(value) != 4:
            return np.full(axis.data.shape, np.nan)
        data = np.repeat(found.data, axis.data.shape[0] // found.data.shape[0], axis=0)
        return np.where(data == 0, data, np.nan)

    def _elementwise(self, node: fx.Node, axis: Axis) -> Array:
        """The operator on what is constant; a factor 0 absorbs whatever it meets."""
        rank = rank_of(node)
        if node.target in _CHOICES:
            return self._choice(node, axis, rank)
        if not all(is_float(value) for value in (node, *node.all_input_nodes)):
            return _unknown(axis)
        facts = {value: self._along(value, axis, rank) for value in node.all_input_nodes}
        shaped = {value: torch.tensor(data) for value, data in facts.items()}
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda value: shaped[value])
        result = np.broadcast_to(operator_of(node)(*args, **kwargs).double().numpy(), axis.data.shape)
        unknown = [np.isnan(np.broadcast_to(data, axis.data.shape)) for data in facts.values()]
        result = np.where(np.any(unknown, axis=0) | ~np.isfinite(result), np.nan, result) if unknown else result
        if node.target in _PRODUCTS:
            zero = np.any([np.broadcast_to(data == 0, axis.data.shape) for data in facts.values()], axis=0)
            result = np.where(zero, 0.0, result)
        return result

    def _choice(self, node: fx.Node, axis: Axis, rank: int) -> Array:
        """A choice between two values is constant where both are the same constant, whichever is chosen."""
        chosen: list[Any] = [node.args[position] for position in _CHOICES[node.target]]
        ways = [
            self._along(way, axis, rank) if isinstance(way, fx.Node) else np.full([1] * len(axis.dims), float(way))
            for way in chosen
        ]
        first, second = (np.broadcast_to(way, axis.data.shape) for way in ways)
        return np.where(first == second, first, np.nan)

    def _along(self, value: fx.Node, axis: Axis, rank: int) -> Array:
        """What is known of ``value`` along an axis of a result of that rank."""
        meta: Tensor = value.meta["val"]
        if meta.numel() == 1 and (tensor := self.weight(value)) is not None:
            return value_of(tensor).double().cpu().numpy().reshape([1] * len(axis.dims))
        shift = rank - meta.dim()
        for found in (own.moved(lambda dim: dim + shift) for own in self.of(value)):
            if set(found.dims) <= set(axis.dims):
                return spread(found, axis.dims)
        return np.full([1] * len(axis.dims), np.nan)


def operands(node: fx.Node) -> tuple[Any, Any, Any]:
    """Input, weight and bias of a linear or addmm node."""
    if node.target is aten.addmm.default:
        return node.args[1], node.args[2], node.args[0]
    return node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None


def _place(node: fx.Node) -> int:
    return 1 if node.target in (*CONVOLUTIONS, aten.batch_norm.default) else rank_of(node) - 1


def _unknown(axis: Axis) -> Array:
    return np.full(axis.data.shape, np.nan)


def _matched(labels: list[Axis], facts: list[Axis]) -> list[Axis]:
    """One axis of facts for each axis of labels, unknown where there is none of its dimensions and shape."""
    by_dims = {axis.dims: axis.data for axis in facts}
    return [
        Axis(axis.dims, found)
        if (found := by_dims.get(axis.dims)) is not None and found.shape == axis.data.shape
        else Axis(axis.dims, _unknown(axis))
        for axis in labels
    ]


def _uniform(value: Tensor, dim: int) -> Array:
    """For each position along ``dim`` the one value found there, NaN where there are several."""
    if value.is_meta or not value.is_floating_point():
        return np.full(value.shape[dim], np.nan)
    return uniform(value.detach(), dim).numpy()
