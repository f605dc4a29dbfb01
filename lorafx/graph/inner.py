"""Inner graphs: the body of a region without gradients, say, which a node of the graph around it calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .operands import operator_of


@dataclass(frozen=True)
class Body:
    """An inner graph that a node calls, and what the node gives its inputs.

    Attributes:
        module: the graph, with those inside it below
        operands: the inputs of the graph, each with what stands for it in the node's arguments
    """

    module: fx.GraphModule
    operands: tuple[tuple[fx.Node, Any], ...]


def body(root: nn.Module, node: fx.Node) -> Body | None:
    """What a node that calls one inner graph of ``root`` runs; None of any other node."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    graphs = [(place, inner_graph(root, value)) for place, value in enumerate(node.args)]
    found = [(place, module) for place, module in graphs if module is not None]
    if len(found) != 1 or node.kwargs:
        return None
    ((place, module),) = found
    inputs, given = module.graph.find_nodes(op="placeholder"), node.args[place + 1 :]
    return Body(module, tuple(zip(inputs, given, strict=True))) if len(inputs) == len(given) else None


def inner_graph(root: nn.Module, value: object) -> fx.GraphModule | None:
    """The inner graph that a node stands for; None when it stands for anything else."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    module: Any = root
    for part in str(value.target).split("."):
        module = module._modules.get(part) if isinstance(module, nn.Module) else None
    return module if isinstance(module, fx.GraphModule) else None


def interpret(graph: fx.Graph, inputs: Sequence[Any], convert: Callable[[Any], Any]) -> Any:
    """What ``graph``, without tensors of its own, gives for ``inputs``, in order; ``convert`` sees every result."""
    values = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = convert(operator_of(node)(*args, **kwargs))
    return fx.map_arg(graph.output_node().args[0], values.__getitem__)
