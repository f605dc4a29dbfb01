"""Turn a training graph into its evaluation graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ..base import Pass, Promise, Selection
from ..edit import Edit
from ..program import Program

aten = torch.ops.aten

_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)


def _bypass(node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]


def _argument(name: str, value: object) -> Callable[[fx.Node], None]:
    def change(node: fx.Node) -> None:
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        position = names.index(name)
        if position < len(node.args):
            node.update_arg(position, value)  # type: ignore[arg-type]
        else:
            node.update_kwarg(name, value)  # type: ignore[arg-type]

    return change


#: What evaluation changes, operator by operator.
RULES: dict[Any, Callable[[fx.Node], None]] = {
    **dict.fromkeys(_DROPOUTS, _bypass),
    aten.scaled_dot_product_attention.default: _argument("dropout_p", 0.0),
    aten.batch_norm.default: _argument("training", False),
}


@dataclass(frozen=True)
class ToEval(Pass):
    """Turn a training graph into its evaluation graph.

    Before: ``y = dropout(x, 0.1, True)``, attention with ``dropout_p = 0.1``, batch norm in training.
    After: ``y = x``, ``dropout_p = 0``, batch norm from its running statistics.

    Keeps: what the model's own ``eval()`` computes. Does nothing to a graph in evaluation form.
    Source: torch.nn semantics of ``Module.eval``.
    """

    promise: ClassVar[Promise] = Promise.EXACT

    def sites(self, program: Program) -> Selection:
        if program.stage == "eval":
            return Selection(())
        return Selection(tuple(node for node in program.graph.nodes if node.target in RULES))  # type: ignore[arg-type]

    def rewrite(self, edit: Edit, site: Any) -> None:
        RULES[site.target](site)

    def finish(self, edit: Edit) -> None:
        edit.program.stage = "eval"
        edit.program.graph.eliminate_dead_code()
