"""Turn a training graph into its evaluation graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from ..base import Pass, Promise, Selection
from ..edit import Edit
from ..program import Program

aten = torch.ops.aten

_COUNTS = (aten.add_.Tensor, aten.add_.Scalar)
_DROPOUTS = (
    *(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default),
    *(aten.dropout_.default, aten.feature_dropout_.default, aten.alpha_dropout_.default),
)
#: Their dropout between layers is noise of their own.
_RECURRENT = (
    *(aten.lstm.input, aten.lstm.data, aten.gru.input, aten.gru.data),
    *(aten.rnn_tanh.input, aten.rnn_tanh.data, aten.rnn_relu.input, aten.rnn_relu.data),
)


def _bypass(node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    node.graph.erase_node(node)  # one that works in place would outlive the clean-up of unused nodes


def _argument(name: str, value: object) -> Callable[[fx.Node], None]:
    def change(node: fx.Node) -> None:
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        position = names.index(name)
        if position < len(node.args):
            node.update_arg(position, value)  # type: ignore[arg-type]
        else:
            node.update_kwarg(name, value)  # type: ignore[arg-type]

    return change


def _from_running_statistics(name: str) -> Callable[[fx.Node], None]:
    """A norm that keeps no statistics normalises by its input's in evaluation, too."""
    change = _argument(name, False)

    def keep(node: fx.Node) -> None:
        if node.args[3] is not None:  # the running mean
            change(node)

    return keep


def _median(operator: Any, *rest: object) -> Callable[[fx.Node], None]:
    def change(node: fx.Node) -> None:
        node.target, node.args = operator, (node.args[0], *rest)

    return change


#: The median of the noise that a pass inserted. A model's own random numbers are its own affair.
_MEDIANS: dict[Any, Callable[[fx.Node], None]] = {
    aten.randn_like.default: _median(aten.zeros_like.default),
    aten.rand_like.default: _median(aten.full_like.default, 0.5),
}

#: What evaluation changes, operator by operator.
RULES: dict[Any, Callable[[fx.Node], None]] = {
    **dict.fromkeys(_DROPOUTS, _bypass),
    aten.scaled_dot_product_attention.default: _argument("dropout_p", 0.0),
    aten.batch_norm.default: _from_running_statistics("training"),
    aten.instance_norm.default: _from_running_statistics("use_input_stats"),
    **dict.fromkeys(_RECURRENT, _argument("train", False)),
}


def _rule(node: fx.Node) -> Callable[[fx.Node], None] | None:
    inserted = "lorafx_pass" in node.meta
    return RULES.get(node.target) or (_MEDIANS.get(node.target) if inserted else None)


def _inner(root: nn.Module, node: fx.Node) -> bool:
    """Whether ``node`` stands for an inner graph (the body of an autocast region, say) with something to change."""
    region = getattr(root, str(node.target), None) if node.op == "get_attr" else None
    if not isinstance(region, fx.GraphModule):
        return False
    graphs = [module.graph for module in region.modules() if isinstance(module, fx.GraphModule)]
    return any(inner.target in RULES for graph in graphs for inner in graph.nodes)


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

    def sites(self, program: Program) -> Selection:
        if program.stage == "eval":
            return Selection(())
        root = program.root
        return Selection(tuple(n for n in program.graph.nodes if _rule(n) is not None or _inner(root, n)))  # type: ignore

    def rewrite(self, edit: Edit, site: Any) -> None:
        rule = _rule(site)
        if rule is not None:
            rule(site)
            return
        # Under a name of its own: a module holds the training graph and the evaluation graph side by side.
        region = copy.deepcopy(getattr(edit.program.root, site.target))
        for module in (module for module in region.modules() if isinstance(module, fx.GraphModule)):
            for node in [node for node in module.graph.nodes if node.target in RULES]:
                RULES[node.target](node)
            module.graph.eliminate_dead_code()
            module.recompile()
        site.target = f"{site.target}_eval"
        edit.program.root.add_module(site.target, region)

    def finish(self, edit: Edit) -> None:
        edit.program.stage = "eval"
        # Counters of training steps: written, and read by nothing but what writes them.
        counts = [node for node in edit.program.graph.nodes if node.target in _COUNTS and not node.users]
        for node in counts:
            counter = node.args[0]
            if counter.op == "get_attr" and all(user in counts for user in counter.users):
                if edit.program.roles[counter.target] != "statistic":  # the base's belong to its checkpoint
                    edit.program.roles[counter.target] = "unread"
                edit.program.graph.erase_node(node)
        edit.program.graph.eliminate_dead_code()
