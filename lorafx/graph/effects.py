"""What a graph changes in place: an analysis must forget what it knew about such values."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx, nn

from .inner import body, inner_graph
from .operands import argument
from .tree import get_tensor, has_tensor

aten = torch.ops.aten

#: In the meta of an operator that puts new keys or values behind a past: the index of the tensor in the cache. Whoever
#: calls the model gets its value, though no output reads it while passes run.
CACHED = "lorafx_cached"

#: Operators whose result may be their operand's memory though their schema does not say so.
_SHARING = (
    operator.getitem,
    aten._unsafe_view.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
)


def written(root: nn.Module, graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes whose values some operator of ``graph`` changes in place, including all that share their memory; its
    tensors and inner graphs are those of ``root``."""
    return frozenset(writers(root, graph))


def writers(root: nn.Module, graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node whose value is changed in place, the nodes that write into its memory."""
    writing = {node: operands for node in graph.nodes if (operands := writes(root, node))}
    if not writing:
        return {}
    memory, found = _memories(root, graph), dict[int, list[fx.Node]]()
    for node, operands in writing.items():
        for part in {memory[operand] for operand in operands}:
            found.setdefault(part, []).append(node)
    return {node: found[part] for node, part in memory.items() if part in found}


def writes(root: nn.Module, node: fx.Node) -> list[fx.Node]:
    """The operands that a node writes to: itself, or in the inner graphs that it calls."""
    called = body(root, node)
    if called is not None:
        changed = written(called.module, called.module.graph)
        return [operand for inside, operand in called.operands if inside in changed and isinstance(operand, fx.Node)]
    graphs = [module for value in node.all_input_nodes if (module := inner_graph(root, value)) is not None]
    if any(_writes(inside) for module in graphs for inside in module.graph.nodes):
        # Which of several graphs gets which operand is not known.
        return [value for value in node.all_input_nodes if inner_graph(root, value) is None]
    return _writes(node)


def _memories(root: nn.Module, graph: fx.Graph) -> dict[fx.Node, int]:
    """The number of the memory that each node's value lies in, as far as is known."""
    import networkx as nx  # few graphs write to anything, and it is slow to load

    shared = nx.Graph()
    readers: dict[object, fx.Node] = {}
    for node in graph.nodes:
        shared.add_node(node)
        if node.op == "get_attr":
            name = str(node.target)
            tensor = id(get_tensor(root, name)) if has_tensor(root, name) else name
            shared.add_edge(node, readers.setdefault(tensor, node))
        shared.add_edges_from((node, operand) for operand in (*sharing(node), *_given(root, node)))
    return {node: number for number, part in enumerate(nx.connected_components(shared)) for node in part}


def _given(root: nn.Module, node: fx.Node) -> list[fx.Node]:
    """The operands whose memory the result of an inner graph may be."""
    called = body(root, node)
    if called is None:
        return []
    memory = _memories(called.module, called.module.graph)
    results = {memory[result] for result in called.module.graph.output_node().all_input_nodes}
    return [
        operand for inside, operand in called.operands if memory[inside] in results and isinstance(operand, fx.Node)
    ]


def has_effect(node: fx.Node) -> bool:
    """Whether running the node does more than give a value, so that it stays even if the value is unused: it writes, it
    asserts, it draws from the random numbers of others. Attention draws none where nothing is dropped."""
    attention = node.target is aten.scaled_dot_product_attention.default
    return node.is_impure() and not (attention and argument(node, "dropout_p") == 0.0)


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


@functools.cache  # each access to ``_schema`` makes a new object
def _aliased(target: Any) -> tuple[tuple[int, str, bool], ...]:
    """Place and name of each aliased argument of an operator, and whether the operator writes to it."""
    arguments = enumerate(target._schema.arguments)
    return tuple((place, a.name, a.alias_info.is_write) for place, a in arguments if a.alias_info is not None)
