"""Constants through operators that mix channels: products of values, reductions, norms."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from ..deferred.slices import nonzero
from ..deferred.tensor import value as value_of
from ..graph.operands import argument, operator_of, rank_of
from .axis import Array, Axis, axis_of
from .mixing import dims_of

aten = torch.ops.aten

PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
#: Reductions that map a constant to a constant, and one that maps 0 to 0.
_OF_ALL = (aten.mean.dim, aten.amax.default, aten.amin.default)
REDUCTIONS = (*_OF_ALL, aten.sum.dim_IntList)
NORMS = (aten.layer_norm.default, aten.rms_norm.default)


class Facts(Protocol):
    """The constants found so far."""

    def of(self, value: object) -> list[Axis]:
        """The facts about a value, in the axes its labels have."""
        ...

    def weight(self, value: object) -> Tensor | None:
        """The value of a constant operand in fp64; None when it is computed from inputs."""
        ...

    def matrix(self, value: object) -> Tensor | None:
        """The same in a dtype of its own, not necessarily computed yet."""
        ...


def combined(matrix: Tensor, known: Array, shift: Tensor | None) -> Array:
    """The outputs of a weight (out, in, …) that read constants alone: their values. Of a kernel only 0 is constant."""
    constant = torch.tensor(known)
    free = constant.isnan()
    depends = nonzero(matrix, 0, free)
    result = torch.where(depends, torch.nan, torch.zeros(len(depends), dtype=torch.float64))
    alone = (~depends & nonzero(matrix, 0, ~free)).nonzero().flatten()
    if len(alone):
        rows = value_of(matrix.index_select(0, alone.to(matrix.device))).double().cpu()
        rows = rows.flatten(2).sum(2) if rows.dim() > 2 else rows
        result[alone] = rows @ torch.where(free, 0.0, constant)
    return (result if shift is None else result + value_of(shift).cpu()).numpy()


def product(facts: Facts, node: fx.Node) -> list[Axis]:
    """A product with a weight; or of two values: where a row of the first or a column of the second is 0, it is 0."""
    a, b = node.args[:2]
    rank = rank_of(node)
    matrix = facts.matrix(b) if rank_of(b) == 2 else None
    if matrix is not None:
        entering = axis_of(facts.of(a), rank_of(a) - 1)
        alone = entering is not None and len(entering.dims) == 1
        known = entering.data if entering is not None and alone else np.full(matrix.shape[0], np.nan)
        return [Axis((rank - 1,), combined(matrix.t(), known, None))]
    if not rank_of(a) == rank_of(b) == rank:
        return []
    found = []
    for value, contracted in ((a, rank - 1), (b, rank - 2)):
        for axis in facts.of(value):
            if contracted not in axis.dims:
                found.append(Axis(axis.dims, np.where(axis.data == 0, 0.0, np.nan)))
    return found


def reduction(facts: Facts, node: fx.Node) -> list[Axis]:
    """A sum, mean or extreme over what repeats a channel."""
    over = dims_of(node, 1)
    keep = bool(argument(node, "keepdim"))
    found = []
    for axis in facts.of(node.args[0]):
        if set(axis.dims) & over:
            continue
        data = axis.data if node.target in _OF_ALL else np.where(axis.data == 0, 0.0, np.nan)
        kept = Axis(axis.dims, data)
        found.append(kept if keep else kept.moved(lambda dim: dim - sum(gone < dim for gone in over)))
    return found


def norm(facts: Facts, node: fx.Node) -> list[Axis]:
    """A norm over the last dimension of one vector."""
    value: Any = node.args[0]
    last = rank_of(value) - 1
    axis = axis_of(facts.of(value), last)
    if axis is None or axis.dims != (last,) or np.isnan(axis.data).any() or argument(node, "eps") is None:
        return []
    learned = {}
    for name in ("weight", "bias") if node.target is aten.layer_norm.default else ("weight",):
        given = argument(node, name)
        learned[name] = facts.weight(given) if given is not None else None
        if given is not None and learned[name] is None:
            return []
    sizes = argument(node, "normalized_shape")
    if len(sizes) != 1:
        return []
    normalise, vector = operator_of(node), torch.tensor(axis.data)
    parts = {name: part.cpu() if part is not None else None for name, part in learned.items()}
    return [Axis((last,), normalise(vector, sizes, **parts, eps=argument(node, "eps")).numpy())]
