"""Running a graph whose tensors do not fit into memory together: those of one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.call import flatten
from ..graph.program import Program
from ..graph.segments import CompiledGraph, Segment, compile_graph
from ..graph.tree import get_tensor, has_tensor, persistent, put_tensor
from .tensor import forget, is_deferred, value


def run_by_block(graph: CompiledGraph, root: nn.Module, inputs: list[Any]) -> tuple[Any, ...]:
    """The flat outputs of ``graph`` over ``root``. What a block reads is computed before it runs and given up after it.

    Tensors of mapped files that are not deferred give their memory back, and are read anew when needed.
    """
    return graph.by_segment(inputs, partial(run_segment, root))


def run_segment(root: nn.Module, segment: Segment, taken: list[Any]) -> tuple[Any, ...]:
    """What one segment gives of the values it takes; ``root`` has its tensors as they were afterwards."""
    held = {name: get_tensor(root, name) for name in segment.tensors if has_tensor(root, name)}
    made: dict[int, Tensor] = {}
    try:
        for name, tensor in held.items():
            if is_deferred(tensor):
                there = made[id(tensor)] if id(tensor) in made else made.setdefault(id(tensor), value(tensor))
                _put(root, name, there)
        return segment.function(root, *taken)
    finally:
        for name, tensor in held.items():
            if is_deferred(tensor):
                _put(root, name, tensor)
            forget(tensor)


def handed_on(
    program: Program, inputs: Mapping[str, Any], instead: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the blocks of a program hand on to others, and which block does, by the names of the nodes.

    Values of the names in ``instead`` are handed on as they are there, unless they have another shape here.
    """
    found: dict[str, Any] = {}
    places: dict[str, str] = {}
    others = instead or {}

    def run(segment: Segment, taken: list[Any]) -> tuple[Any, ...]:
        named = zip(segment.takes, taken, strict=True)
        held = [others[name] if alike(value, others.get(name)) else value for name, value in named]
        result = run_segment(program.root, segment, held)
        found.update(zip(segment.gives, result, strict=True))
        places.update(dict.fromkeys(segment.gives, segment.block))
        return result

    with torch.no_grad():
        compile_graph(program.graph).by_segment(flatten(program, inputs), run)
    return found, places


def alike(a: Any, b: Any) -> bool:
    """Whether both are tensors of one shape."""
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape


def alike_by_block(program: Program, other: Program, equal: Callable[[Any, Any], bool]) -> bool:
    """Whether each block of ``other`` gives what that of ``program`` gives, on the example and on what ``program``
    hands to it; both in evaluation form. What has another shape goes on within ``other`` and is not compared."""
    expected, _ = handed_on(program, program.example)
    given, _ = handed_on(other, program.example, expected)
    ends = {node.name for node in other.graph.output_node().all_input_nodes if node.op == "call_function"}
    shared = [name for name, value in given.items() if alike(value, expected.get(name))]
    return ends <= {*shared} and all(equal(expected[name], given[name]) for name in shared)


def _put(root: nn.Module, name: str, tensor: Tensor) -> None:
    parameter = isinstance(get_tensor(root, name), nn.Parameter) and not isinstance(tensor, nn.Parameter)
    put_tensor(root, name, nn.Parameter(tensor, False) if parameter else tensor, persistent(root, name))
