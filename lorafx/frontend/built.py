"""Constants that a model's code builds in place: computed once, at capture.

Folding evaluates what operators compute from tensors alone, but not where one of them writes into a value, whose later
readers see something else. Where everything such a value is built from belongs to the trace, it is built here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph.constants import operands_first
from ..graph.effects import written
from ..graph.operands import operator_of
from ..graph.tree import get_tensor, has_tensor, put_tensor


def build(root: nn.Module, graph: fx.Graph, names: Iterable[str]) -> None:
    """Replace values that ``graph`` builds in place, from nothing but the tensors ``names`` of ``root``, by tensors.

    ``names`` are those that the tracer lifted; tensors that the model holds by name may change in training.
    """
    changed = written(root, graph)
    if not changed:
        return
    fixed = _fixed(graph, changed, frozenset(names))
    after = _after(graph, changed & fixed)
    kept = [node for node in graph.nodes if node in after & fixed and any(user not in fixed for user in node.users)]
    if not kept or not all(isinstance(node.meta.get("val"), Tensor) for node in kept):
        return
    values = _computed(root, graph, fixed)
    for number, node in enumerate(kept):
        name = f"built_tensor_{number}"
        assert not has_tensor(root, name), "a capture builds once"
        put_tensor(root, name, values[node].clone(), persistent=False)
        with graph.inserting_before(node):
            read = graph.get_attr(name)
        # The operators that a later analysis propagates shapes through see the size that it has.
        read.meta = {**node.meta, "val": node.meta["val"].fake_mode.from_tensor(values[node], static_shapes=True)}
        node.replace_all_uses_with(read, delete_user_cb=lambda user: user not in fixed)
    for node in reversed(graph.nodes):  # checks of their sizes, too
        if node in after & fixed and not node.users:
            graph.erase_node(node)


def _fixed(graph: fx.Graph, changed: frozenset[fx.Node], names: frozenset[str]) -> frozenset[fx.Node]:
    """The nodes that compute the same in each call: what they write is not seen outside of the call, and their memory
    is their own."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        lifted = node.op == "get_attr" and str(node.target) in names and node not in changed
        if lifted or (_is_repeatable(node) and found.issuperset(node.all_input_nodes)):
            found.add(node)
    # Not a value that something else writes to, now or through a view.
    while loose := {n for n in found & changed if any(user not in found and user in changed for user in n.users)}:
        found -= {node for node in graph.nodes if node in found and loose & set(operands_first(node, _operands))}
    return frozenset(found)


def _is_repeatable(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded not in node.target.tags
    return node.op == "call_function" and getattr(node.target, "__module__", "") == operator.getitem.__module__


def _operands(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes


def _after(graph: fx.Graph, changed: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """What is computed from ``changed``, itself included."""
    found = set(changed)
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def _computed(root: nn.Module, graph: fx.Graph, fixed: frozenset[fx.Node]) -> dict[fx.Node, Any]:
    """The values of the nodes after all of them ran, in the graph's order."""
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node in fixed and node.op == "get_attr":
                values[node] = get_tensor(root, str(node.target)).clone()
            elif node in fixed:
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = operator_of(node)(*args, **kwargs)
    return values
