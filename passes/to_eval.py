"""Turn a training graph into its evaluation graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ..base import Pass, Promise
from ..graph.edit import Edit
from ..graph.evaluation import change, changing, settle
from ..graph.program import Program
from ..graph.selection import Selection


@dataclass(frozen=True)
class ToEval(Pass):
    """Turn a training graph into its evaluation graph.

    Before: ``y = dropout(x, 0.1, True)``, attention with ``dropout_p = 0.1``, batch norm in training, a gate's noise.
    After: ``y = x``, ``dropout_p = 0``, batch norm from its running statistics, the median of the noise.

    Keeps: the evaluation outputs, bit by bit: those of the model's own ``eval()``. Does nothing to a graph in
    evaluation form.
    Source: torch.nn semantics of ``Module.eval``.
    """

    promise: ClassVar[Promise] = Promise.EXACT

    def sites(self, program: Program) -> Selection[fx.Node]:
        return Selection(changing(program))

    def rewrite(self, edit: Edit, site: fx.Node) -> None:
        change(edit.program, site)

    def finish(self, edit: Edit) -> None:
        settle(edit.program)
