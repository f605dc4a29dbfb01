"""What a graph changes in place: an analysis of values must not believe what it knew of them before."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

#: Operators whose result may be their operand's memory though their schema does not say so.
_SHARING = (
    operator.getitem,
    aten._unsafe_view.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
)


def written(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes whose values some operator of ``graph`` changes in place, whoever shares their memory included."""
    writers = [node for node in graph.nodes if _writes(node)]
    if not writers:
        return frozenset()
    import networkx as nx  # few graphs write to anything, and it is slow to load

    shared = nx.Graph()
    by_name: dict[str, fx.Node] = {}
    for node in graph.nodes:
        shared.add_node(node)
        if node.op == "get_attr":
            shared.add_edge(node, by_name.setdefault(str(node.target), node))
        shared.add_edges_from((node, operand) for operand in sharing(node))
    parts: dict[fx.Node, int] = {}
    for number, part in enumerate(nx.connected_components(shared)):
        parts.update(dict.fromkeys(part, number))
    touched = {parts[operand] for node in writers for operand in _writes(node)}
    return frozenset(node for node, part in parts.items() if part in touched)


def is_view(node: fx.Node) -> bool:
    """Whether the node's value may lie in an operand's memory."""
    return bool(sharing(node))


def _writes(node: fx.Node) -> list[fx.Node]:
    """The operands that the node writes to."""
    if node.target is aten.batch_norm.default:  # its schema does not say so
        running = node.args[3:5] if node.args[5] else ()
        return [value for value in running if isinstance(value, fx.Node)]
    return _operands(node, written=True)


def sharing(node: fx.Node) -> list[fx.Node]:
    """The operands whose memory the node's result may be."""
    if node.target in _SHARING:
        return list(node.all_input_nodes[:1])
    return _operands(node, written=False)


def _operands(node: fx.Node, *, written: bool) -> list[fx.Node]:
    """The operands whose memory the operator's schema declares to be shared, or to be written to."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    found: list[fx.Node] = []
    for position, name, writes in _aliased(node.target):
        if writes or not written:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(name)
            items = value if isinstance(value, (list, tuple)) else [value]
            found += [item for item in items if isinstance(item, fx.Node)]
    return found


@functools.cache  # a schema is made anew each time it is asked for
def _aliased(target: Any) -> tuple[tuple[int, str, bool], ...]:
    """Place and name of each aliased argument of an operator, and whether the operator writes to it."""
    arguments = enumerate(target._schema.arguments)
    return tuple((place, a.name, a.alias_info.is_write) for place, a in arguments if a.alias_info is not None)
