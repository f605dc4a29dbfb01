"""From a graph to a Python function over a module's tensors; block by block when activations are to be recomputed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils.checkpoint import checkpoint as recompute

from .site import block_of, module_path


def function_of(graph: fx.Graph) -> Callable[..., tuple[Any, ...]]:
    """The graph as a function ``(self, *inputs) -> outputs``; ``get_attr`` nodes read attributes of ``self``."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<lorafx graph>", "exec"), namespace)
    return namespace["forward"]


def interpreted(graph: fx.Graph) -> Callable[..., tuple[Any, ...]]:
    """What :func:`function_of` gives, node by node, nothing compiled: each run takes as long, and the first begins at
    once. A graph that calls more than functions is compiled all the same."""
    last = {operand: node for node in graph.nodes for operand in node.all_input_nodes}
    spent: dict[fx.Node, list[fx.Node]] = {}
    for operand, node in last.items():
        spent.setdefault(node, []).append(operand)
    if any(node.op in ("call_method", "call_module") for node in graph.nodes):
        return function_of(graph)

    def run(module: Any, *inputs: Any) -> tuple[Any, ...]:
        values: dict[fx.Node, Any] = {}
        given, value = iter(inputs), values.__getitem__
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = attrgetter(str(node.target))(module)
            elif node.op == "output":
                result: Any = fx.map_arg(node.args[0], value)
                return result
            else:
                target: Any = node.target
                values[node] = target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))
            for operand in spent.get(node, ()):
                del values[operand]
        raise AssertionError("a graph ends in its output")

    return run


@dataclass(frozen=True)
class Segment:
    """A run of nodes of one block: the values and the tensors it takes, the values later segments read, its function.

    ``tensors`` are names of attributes that the function reads of its module.
    """

    block: str
    takes: tuple[str, ...]
    tensors: tuple[str, ...]
    gives: tuple[str, ...]
    function: Callable[..., tuple[Any, ...]]


@dataclass
class CompiledGraph:
    """A graph ready to run over a module: ``compiled(module, inputs)`` gives the flat outputs.

    Attributes:
        graph: the graph
        seldom: whether it runs a few times only, so that compiling it takes longer than all of them
        whole: the graph as one function
        device: where the graph makes its ranges and masks, the device of the capture; None when it makes none
    """

    # ``whole`` and ``device`` are made at once, not on first use: torch.compile could not trace that.
    graph: fx.Graph
    seldom: bool = False
    whole: Callable[..., tuple[Any, ...]] = field(init=False)
    device: torch.device | None = field(init=False)
    _moved: dict[torch.device, CompiledGraph] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.whole = (interpreted if self.seldom else function_of)(self.graph)
        self.device = next((device for node in self.graph.nodes for device in _devices(node)), None)

    def __call__(
        self,
        module: Any,
        inputs: list[Any],
        *,
        checkpoint: bool = False,
        units: Mapping[str, Callable[..., Any]] | None = None,
        states: dict[str, Any] | None = None,
    ) -> tuple[Any, ...]:
        """The flat outputs. ``units`` run the segments of some blocks: ``units[block](function, *values taken)``;
        ``states`` gets what the blocks of :attr:`streams` pass on."""
        device = next((value.device for value in inputs if isinstance(value, Tensor)), None)
        if device is not None and self.device not in (None, device):
            return self.on(device)(module, inputs, checkpoint=checkpoint, units=units, states=states)
        if checkpoint or units or states is not None:
            return self.by_segment(inputs, partial(_run, module, units or {}, checkpoint), states)
        return self.whole(module, *inputs)

    def by_segment(
        self,
        inputs: list[Any],
        run: Callable[[Segment, list[Any]], tuple[Any, ...]],
        states: dict[str, Any] | None = None,
    ) -> tuple[Any, ...]:
        """The flat outputs, one segment after another: ``run`` computes what one gives of the values it takes."""
        names = [node.name for node in self.graph.find_nodes(op="placeholder")]
        values: dict[str, Any] = dict(zip(names, inputs, strict=True))
        for segment in self.segments:
            given = run(segment, [values[name] for name in segment.takes])
            values.update(zip(segment.gives, given, strict=True))
        if states is not None:
            states.update({block: values[name] for block, name in self.streams.items()})
        (result,) = self.graph.output_node().args
        assert isinstance(result, tuple | list)  # a program's outputs are a flat list of values (Program.signature)
        return tuple(values[value.name] if isinstance(value, fx.Node) else value for value in result)

    def on(self, device: torch.device) -> CompiledGraph:
        """The same graph for tensors on ``device``."""
        if device not in self._moved:
            self._moved[device] = CompiledGraph(_on_device(self.graph, device), self.seldom)
        return self._moved[device]

    @cached_property
    def segments(self) -> list[Segment]:
        """The graph cut where execution passes from one block to another."""
        runs: list[tuple[str, list[fx.Node]]] = []
        for node in self.graph.nodes:
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            block = block_path(node)
            if runs and (runs[-1][0] == block or "nn_module_stack" not in node.meta):
                runs[-1][1].append(node)
            else:
                runs.append((block, [node]))
        return [_segment(block, nodes) for block, nodes in runs]

    @cached_property
    def streams(self) -> dict[str, str]:
        """The hidden states that each block hands on to others, (rows, tokens, channels), by the block's path: the last
        such value that it computes, as the node's name."""
        hidden = {node.name for node in self.graph.nodes if _is_hidden(node.meta.get("val"))}
        given = [(segment.block, name) for segment in self.segments for name in segment.gives if name in hidden]
        return {block: name for block, name in given if block}


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()


def _devices(node: fx.Node) -> list[torch.device]:
    return [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, torch.device)]


def _on_device(graph: fx.Graph, device: torch.device) -> fx.Graph:
    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    result = fx.Graph()
    result.output(result.graph_copy(graph, {}))
    for node in result.nodes:
        if _devices(node):
            node.args, node.kwargs = map_aggregate(node.args, moved), map_aggregate(node.kwargs, moved)
    return result


def _run(
    module: Any, units: Mapping[str, Callable[..., Any]], checkpoint: bool, segment: Segment, taken: list[Any]
) -> tuple[Any, ...]:
    """What a segment gives; a block's activations are computed again in the backward pass if ``checkpoint``."""
    function: Callable[..., Any] = partial(segment.function, module)
    if checkpoint and segment.block:
        function = partial(recompute, function, use_reentrant=False)
    unit = units.get(segment.block)
    return function(*taken) if unit is None else unit(function, *taken)


def compile_graph(graph: fx.Graph, *, seldom: bool = False) -> CompiledGraph:
    """The graph as something that runs; without being compiled if it is to run ``seldom``."""
    return CompiledGraph(graph, seldom)


def block_path(node: fx.Node) -> str:
    """The path of the block that ran ``node`` (``encoder.layer.3``), or the empty string outside blocks."""
    path = module_path(node, "")
    number = block_of(path)
    if number is None:
        return ""
    parts = path.split(".")
    return ".".join(parts[: parts.index(str(number)) + 1])


def _segment(block: str, nodes: list[fx.Node]) -> Segment:
    inside = set(nodes)
    takes = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside and n.op != "get_attr")
    gives = [node for node in nodes if any(user not in inside for user in node.users)]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in takes}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    for node in nodes:
        copied(node)
    graph.output(tuple(copies[node] for node in gives))
    tensors = dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr"))
    return Segment(
        block, tuple(n.name for n in takes), tuple(tensors), tuple(n.name for n in gives), function_of(graph)
    )
