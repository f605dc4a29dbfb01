"""The product with the experts of a mixture: ``(rows, in) × (experts, in, out)``, the rows sorted by expert.

A third operand says where each expert's rows end. A channel is one for all experts: it goes when none needs it.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..deferred.tensor import passing_tiles
from ..graph.constants import Constants
from ..graph.operands import rank_of, value_of
from .axes import Axes
from .axis import Known, axis_of
from .rules import affine, matrix_labels

#: By name: transformers registers its own operator when its experts are first imported, and not in every version.
FALLBACK, KERNEL = "transformers.grouped_mm_fallback.default", "aten._grouped_mm.default"
GROUPED = (FALLBACK, KERNEL)
#: The kernel wants rows of its operands to begin at multiples of this many bytes.
_ALIGNED = 16


def is_grouped(node: fx.Node) -> bool:
    """Whether the node is such a product; the kernel has other forms too (batched, or with a bias)."""
    if str(node.target) not in GROUPED or _bias(node) is not None:
        return False
    return (rank_of(node.args[0]), rank_of(node.args[1])) == (2, 3) and offsets(node) is not None


def _bias(node: fx.Node) -> object:
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("bias")


def offsets(node: fx.Node) -> object:
    """The operand that says where each expert's rows end."""
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("offs")


def grouped(axes: Axes, node: fx.Node) -> Known:
    """The weight's second dimension are the channels that enter, its third those that leave; experts stay."""
    if not is_grouped(node):
        return []
    value, weight = node.args[:2]
    axes.pin(matrix_labels(axes, weight, 0), "experts are chosen by number")
    for axis in [*axes.axes(offsets(node)), *(axis for axis in axes.axes(value) if 0 in axis.dims)]:
        axes.pin(axis.data, "rows are sorted by expert")
    ins, outs = matrix_labels(axes, weight, 1), matrix_labels(axes, weight, 2)
    if str(node.target) == KERNEL:
        tensor = value_of(weight)
        axes.align(ins, _ALIGNED // tensor.element_size())
        if tensor.stride(2) == 1:
            axes.align(outs, _ALIGNED // tensor.element_size())
    return affine(axes, node, value, ins, outs, ())


def grouped_reads(constants: Constants, node: fx.Node, experts: slice) -> Tensor | None:
    """Which outputs read which inputs (out, in) in any of these experts; None when the weight is not known."""
    weight = node.args[1]
    if not is_grouped(node) or not isinstance(weight, fx.Node) or constants.reads(weight) is None:
        return None
    held = constants.value(weight)[experts]
    reads = torch.zeros(held.shape[1:], dtype=torch.bool, device=held.device)
    for tile in passing_tiles(held):
        reads |= (tile != 0).any(0)
    return reads.t()


def products(axes: Axes) -> dict[object, list[fx.Node]]:
    """The grouped products of a graph, in order, by the operand that says which rows are whose."""
    found: dict[object, list[fx.Node]] = {}
    for node in axes.program.graph.nodes:
        if is_grouped(node) and axis_of(axes.axes(node.args[1]), 0) is not None:  # one expert alone has no labels
            found.setdefault(offsets(node), []).append(node)
    return found
