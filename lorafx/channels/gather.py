"""Columns that a weight does not use, over channels that must stay: what could be gathered instead of multiplied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from ..graph.operands import value_of
from ..graph.program import Program
from ..graph.site import is_tensor_node
from ..graph.tensors import TensorIndex
from .axes import Axes, stuck
from .axis import Array, axis_of
from .constant import LINEARS, operands
from .removal import Widths
from .table import RULES

aten = torch.ops.aten

#: How many multiply-adds of a GEMM take as long as gathering one element: in fp32 on a CPU (ONNX Runtime 1.31, one
#: thread, 64 tokens), in fp16 on a GPU (H200, 512 to 16,384 tokens); `python -m benchmarks.gather`. The fused operators
#: of the CPU provider stay as they are behind a gather. Projections with columns of their own are no longer packed into
#: one product, which costs nothing: packed ones were no faster (benchmarks/RESULTS.md).
CPU_COST, GPU_COST = 275.0, 2000.0


@dataclass(frozen=True)
class Gather:
    """Operators that read the same columns of one value.

    Attributes:
        value: what they read
        kept: the columns they use
        uses: the operators, in graph order
    """

    value: fx.Node
    kept: tuple[int, ...]
    uses: tuple[fx.Node, ...]

    def __str__(self) -> str:
        return f"{len(self.kept)} columns of {self.value}: {', '.join(map(weight_of, self.uses))}"

    def pays(self, cost: float) -> bool:
        """Whether the multiply-adds saved cost more than the gather."""
        width, *outputs = (int(value_of(node).shape[-1]) for node in (self.value, *self.uses))
        return pays(width, len(self.kept), outputs, cost)


def pays(width: int, kept: int, outputs: Sequence[int], cost: float = CPU_COST) -> bool:
    """Whether gathering ``kept`` of ``width`` columns once is cheaper than multiplying all of them into ``outputs``.

    Per token; how many there are is not known, and both sides grow with them alike.
    """
    return (width - kept) * sum(outputs) > kept * cost


def gathers(program: Program, round_to: int = 1) -> list[Gather]:
    """Everything that could be gathered, in graph order; a multiple of ``round_to`` columns of each value."""
    index = TensorIndex(program.root, program.graph)
    candidates = [node for node in program.graph.nodes if _is_candidate(program, index, node)]
    if not candidates:
        return []
    axes = Axes(program, RULES)
    held = stuck(axes)
    groups: dict[tuple[fx.Node, tuple[int, ...]], list[fx.Node]] = defaultdict(list)
    for node in candidates:
        value = operands(node)[0]
        skipped = _zero(program, node) & _pinned(axes, held, value)
        wanted = Widths(round_to).of(int((~skipped).sum()), len(skipped))
        # Used columns sort before skipped ones, which fill up to a multiple.
        kept = np.sort(np.argsort(skipped, kind="stable")[:wanted])
        if len(kept) < len(skipped):
            groups[value, tuple(kept.tolist())].append(node)
    return [Gather(value, kept, tuple(uses)) for (value, kept), uses in groups.items()]


def _is_candidate(program: Program, index: TensorIndex, node: fx.Node) -> bool:
    """A product with a weight of its own that has zero columns."""
    if node.target not in LINEARS:
        return False
    value, weight, _ = operands(node)
    if not is_tensor_node(weight) or not isinstance(value, fx.Node) or value is weight:
        return False
    readers = [user for name in index.names(str(weight.target)) for read in index.nodes(name) for user in read.users]
    return readers == [node] and bool(_zero(program, node).any())


def _zero(program: Program, node: fx.Node) -> Array:
    """For each column of a product's weight, whether it is zero."""
    return (program.tensor(weight_of(node)) == 0).all(1 - column_dim(node)).cpu().numpy()


def _pinned(axes: Axes, held: Array, value: fx.Node) -> Array:
    """For each channel of a value, whether it can never be removed."""
    shape = value_of(value).shape
    labels = axis_of(axes.axes(value), len(shape) - 1)
    if labels is None:  # no tensor of the program gives it its width
        return np.ones(shape[-1], bool)
    return held[labels.data] if len(labels.dims) == 1 else np.zeros(shape[-1], bool)


def weight_of(node: fx.Node) -> str:
    """The name of the weight of a product."""
    return str(operands(node)[1].target)


def column_dim(node: fx.Node) -> int:
    """The dimension of the weight that runs over the input: a linear's is (out, in), an addmm's (in, out)."""
    return 1 if node.target is aten.linear.default else 0
