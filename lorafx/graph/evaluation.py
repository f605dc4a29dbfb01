"""The evaluation form of a graph: no dropout, no noise, norms from their running statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from .operands import set_argument
from .program import P, Program
from .site import INSERTED_BY

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
    value = node.args[0]
    assert isinstance(value, fx.Node), "dropout is of a value"
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)  # one that works in place would outlive the clean-up of unused nodes


def _argument(name: str, value: object) -> Callable[[fx.Node], None]:
    return lambda node: set_argument(node, name, value)


def _from_running_statistics(name: str) -> Callable[[fx.Node], None]:
    """A norm that keeps no statistics normalises by its input's in evaluation, too."""
    change = _argument(name, False)

    def keep(node: fx.Node) -> None:
        if node.args[3] is not None:  # the running mean
            change(node)

    return keep


def _median(operator: Any, *rest: Any) -> Callable[[fx.Node], None]:
    def change(node: fx.Node) -> None:
        node.target, node.args = operator, (node.args[0], *rest)

    return change


#: The median of the noise that a pass inserted. A model's own random numbers are left alone.
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
    inserted = INSERTED_BY in node.meta
    return RULES.get(node.target) or (_MEDIANS.get(node.target) if inserted else None)


def _inner(root: nn.Module, node: fx.Node) -> bool:
    """Whether ``node`` stands for an inner graph (the body of an autocast region, say) with something to change."""
    region = getattr(root, str(node.target), None) if node.op == "get_attr" else None
    if not isinstance(region, fx.GraphModule):
        return False
    graphs = [module.graph for module in region.modules() if isinstance(module, fx.GraphModule)]
    return any(inner.target in RULES for graph in graphs for inner in graph.nodes)


def evaluation_form(program: P) -> P:
    """The program's evaluation form: no dropout, no noise; the program itself when it is in that form already."""
    if program.stage == "eval":
        return program
    return own_evaluation_form(program)


def own_evaluation_form(program: P) -> P:
    """The program's evaluation form, with a graph and tree of its own, whatever form it is in."""
    result = program.copy()
    if program.stage == "eval":
        return result
    for node in changing(result):
        change(result, node)
    settle(result)
    return result


def changing(program: Program) -> tuple[fx.Node, ...]:
    """The nodes that evaluation changes; none in a program in evaluation form."""
    if program.stage == "eval":
        return ()
    return tuple(n for n in program.graph.nodes if _rule(n) is not None or _inner(program.root, n))


def change(program: Program, node: fx.Node) -> None:
    """Give one of those nodes its evaluation form."""
    rule = _rule(node)
    if rule is not None:
        rule(node)
        return
    # Under a name of its own: a module holds the training graph and the evaluation graph side by side.
    region = copy.deepcopy(getattr(program.root, str(node.target)))
    for module in (module for module in region.modules() if isinstance(module, fx.GraphModule)):
        for inner in [inner for inner in module.graph.nodes if inner.target in RULES]:
            RULES[inner.target](inner)
        module.graph.eliminate_dead_code()
        module.recompile()
    node.target = f"{node.target}_eval"
    program.root.add_module(node.target, region)


def settle(program: Program) -> None:
    """Note that the program is in evaluation form, and drop the counters of training steps that nothing else reads."""
    program.stage = "eval"
    counts = [node for node in program.graph.nodes if node.target in _COUNTS and not node.users]
    for node in counts:
        counter = node.args[0]
        if counter.op == "get_attr" and all(user in counts for user in counter.users):
            if program.roles[counter.target] != "statistic":  # the base's belong to its checkpoint
                program.roles[counter.target] = "unread"
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
