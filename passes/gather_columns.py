"""Read only the columns that a weight uses: zero columns over a residual stream cost a gather instead of a matmul."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import fx

from ..base import Pass, Promise, option
from ..channels.axes import Axes, stuck
from ..channels.axis import axis_of
from ..channels.constant import operands
from ..channels.removal import Widths
from ..channels.table import RULES
from ..graph.edit import Edit, aliases
from ..graph.facts import Gathered
from ..graph.program import Program
from ..graph.selection import Selection
from ..graph.site import is_tensor_node, module_path

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
        return f"{len(self.kept)} columns of {self.value}: {', '.join(map(_weight, self.uses))}"

    def pays(self, cost: float) -> bool:
        """Whether the multiply-adds saved cost more than the gather."""
        outputs = [int(use.meta["val"].shape[-1]) for use in self.uses]
        return pays(int(self.value.meta["val"].shape[-1]), len(self.kept), outputs, cost)


@dataclass(frozen=True)
class GatherColumns(Pass):
    """Read only the columns that a weight uses.

    Before: ``y = W x``, columns of W zero where x has channels that others need
    After: ``y = W[:, kept] x[..., kept]``; weights that use the same columns of x share one gather

    Linear and addmm nodes, each the only reader of its weight. Only channels that can never be removed are skipped,
    those of a residual stream. Zero columns over removable channels are left to dead-channels: if they are still there
    a width was asked for (``round_to``, ``uniform``), and a gather would undo that behind the user's back.
    A checkpoint cannot hold the result; ``never`` keeps it whole.

    Keeps: the outputs, up to rounding (sums run over fewer terms). Does nothing to a program in training form, or
    where no column is zero, or (``auto``) where the gather costs more than the multiply-adds it saves.
    Source: column sparsity as a smaller dense product; the costs are measured (``benchmarks/gather.py``).
    """

    promise: ClassVar[Promise] = Promise.CLOSE

    when: Literal["auto", "always", "never"] = option("auto", "gather where it pays, wherever it can be done, or never")
    cost: float = option(
        CPU_COST, "of a gathered element, in multiply-adds: about 275 on a CPU, 2000 on a GPU", least=0
    )
    round_to: int = option(1, "gather a multiple of so many columns, for the hardware", least=1)

    def sites(self, program: Program) -> Selection[Gather]:
        if self.when == "never" or program.stage != "eval" or program.device.type == "meta":
            return Selection(())
        found = gathers(program, self.round_to)
        taken = found if self.when == "always" else [gather for gather in found if gather.pays(self.cost)]
        return Selection(tuple(taken))

    def rewrite(self, edit: Edit, site: Gather) -> None:
        first, index = site.uses[0], torch.tensor(site.kept)
        name = edit.constant(f"{module_path(first, 'gathered')}.columns", index)
        columns = edit.tensor(name)
        with edit.before(first):
            chosen = edit.call(aten.index_select.default, site.value, -1, columns)
        for use in site.uses:
            edit.feed(use, site.value, chosen)
            weight, dim = _weight(use), _columns(use)
            old = edit.program.tensor(weight).detach()
            edit.set_tensor(weight, old.index_select(dim, index.to(old.device)).contiguous())
            Gathered(weight, dim, old.shape[dim], len(site.kept)).note(edit)


def pays(width: int, kept: int, outputs: Sequence[int], cost: float = CPU_COST) -> bool:
    """Whether gathering ``kept`` of ``width`` columns once is cheaper than multiplying all of them into ``outputs``.

    Per token; how many there are is not known, and both sides grow with them alike.
    """
    return (width - kept) * sum(outputs) > kept * cost


def gathers(program: Program, round_to: int = 1) -> list[Gather]:
    """All that could be gathered, in graph order; of each value a multiple of ``round_to`` columns."""
    candidates = [node for node in program.graph.nodes if _is_candidate(program, node)]
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


def _is_candidate(program: Program, node: fx.Node) -> bool:
    """A product with a weight of its own that has zero columns."""
    if node.target not in (aten.linear.default, aten.addmm.default):
        return False
    value, weight, _ = operands(node)
    if not is_tensor_node(weight) or not isinstance(value, fx.Node) or value is weight:
        return False
    readers = [user for name in aliases(program.root, str(weight.target)) for user in _readers(program, name)]
    return readers == [node] and bool(_zero(program, node).any())


def _readers(program: Program, name: str) -> list[fx.Node]:
    return [user for node in program.graph.find_nodes(op="get_attr", target=name) for user in node.users]


def _zero(program: Program, node: fx.Node) -> np.ndarray[Any, Any]:
    """For each column of a product's weight, whether it is zero."""
    return (program.tensor(_weight(node)) == 0).all(1 - _columns(node)).cpu().numpy()


def _pinned(axes: Axes, held: np.ndarray[Any, Any], value: fx.Node) -> np.ndarray[Any, Any]:
    """For each channel of a value, whether it can never be removed."""
    last = value.meta["val"].dim() - 1
    labels = axis_of(axes.axes(value), last)
    if labels is None:  # no tensor of the program gives it its width
        return np.ones(value.meta["val"].shape[last], bool)
    return held[labels.data] if labels.dims == (last,) else np.zeros(value.meta["val"].shape[last], bool)


def _weight(node: fx.Node) -> str:
    return str(operands(node)[1].target)


def _columns(node: fx.Node) -> int:
    """The dimension of the weight that runs over the input: a linear's is (out, in), an addmm's (in, out)."""
    return 1 if node.target is aten.linear.default else 0
