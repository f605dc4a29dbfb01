"""Running a graph whose tensors do not fit into memory together: those of one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..graph.call import flatten
from ..graph.program import Program
from ..graph.segments import CompiledGraph, Segment, compile_graph
from ..graph.tree import get_tensor, has_tensor, persistent, put_tensor
from .recipe import Recipe
from .tensor import chosen_or_computed, forget, is_deferred, passing_rows, recipe_of, value

#: Bytes of a matrix that is read in parts.
_LARGE = 1 << 28
#: A linear layer as graphs have it, and as modules do.
_LINEAR = (torch.ops.aten.linear.default, nn.functional.linear)


def run_by_block(graph: CompiledGraph, root: nn.Module, inputs: list[Any]) -> tuple[Any, ...]:
    """The flat outputs of ``graph`` over ``root``. What a block reads is computed before it runs and freed after it.

    Tensors of mapped files that are not deferred give their memory back, and are read again when needed.
    """
    return graph.by_segment(inputs, partial(run_segment, root))


def run_segment(
    root: nn.Module, segment: Segment, taken: list[Any], compute: Callable[[Tensor], Tensor] = value
) -> tuple[Any, ...]:
    """What one segment gives of the values it takes; ``root`` has its tensors as they were afterwards.

    A matrix that alone is as large as a block's (that of a vocabulary) is read a range of rows at a time.
    """
    held = {name: get_tensor(root, name) for name in segment.tensors if has_tensor(root, name)}
    made: dict[int, Tensor] = {}
    try:
        for name, tensor in held.items():
            if is_deferred(tensor):
                if id(tensor) not in made:
                    made[id(tensor)] = compute(tensor)
                    if recipe_of(tensor).there is None:  # what it was computed from is no longer needed
                        forget(tensor)
                _put(root, name, made[id(tensor)])
        with LargeInParts():
            return segment.function(root, *taken)
    finally:
        for name, tensor in held.items():
            if is_deferred(tensor):
                _put(root, name, tensor)
            forget(tensor)


class LargeInParts(TorchFunctionMode):
    """Apply a large matrix of a linear layer a range of rows at a time: little of its file is in memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        large = func in _LINEAR and len(args) > 1 and not kwargs and _is_large(args[1])
        if not large or torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        value, weight, bias = args if len(args) == 3 else (*args, None)
        parts, place = [], 0
        for rows in passing_rows(weight.detach()):
            own = None if bias is None else bias[place : place + len(rows)]
            parts.append(func(value, rows, own))
            place += len(rows)
        return torch.cat(parts, -1)


def _is_large(weight: Any) -> bool:
    return isinstance(weight, Tensor) and weight.device.type == "cpu" and weight.numel() * weight.itemsize > _LARGE


def handed_on(
    program: Program, inputs: Mapping[str, Any], instead: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values that the blocks of a program pass on to others, and the block of each, by the names of the nodes.

    For names in ``instead``, those values are passed on, unless they have another shape here.
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


def difference_by_block(program: Program, other: Program, equal: Callable[[Any, Any], bool]) -> str | None:
    """The first value that a block of ``other`` passes on and that differs from the one of that name in ``program``,
    with the block; None when all are equal. Both are in evaluation form.

    Runs on the example. Blocks of ``other`` get what those of ``program`` pass on; values of another shape stay within
    ``other`` and are not compared. The two take turns, and a weight that was chosen from one of ``program``'s is
    taken from that: each is computed once.
    """
    expected = _Steps(program)
    given = _Steps(other, expected.values)
    compared = set[str]()
    with torch.no_grad():
        for segment in given.segments:
            expected.go_on({*segment.gives})
            given.step(segment, expected.made)
            for name in segment.gives:
                if alike(given.values[name], expected.values.get(name)):
                    compared.add(name)
                    if not equal(expected.values[name], given.values[name]):
                        return f"{segment.block or 'outside blocks'}: {name}"
    ends = (node.name for node in other.graph.output_node().all_input_nodes if node.op == "call_function")
    return next((f"the output {name}" for name in ends if name not in compared), None)


class _Steps:
    """A program that runs a block at a time on its example, with the values ``instead`` where they fit."""

    def __init__(self, program: Program, instead: Mapping[str, Any] | None = None):
        graph = compile_graph(program.graph)
        names = [node.name for node in program.graph.find_nodes(op="placeholder")]
        self.segments = graph.segments
        self.values: dict[str, Any] = dict(zip(names, flatten(program, program.example), strict=True))
        #: The weights of the block that ran last, by how they are made.
        self.made: dict[Recipe, Tensor] = {}
        self._root = program.root
        self._instead = instead or {}
        self._left = iter(self.segments)
        self._given = {name for segment in self.segments for name in segment.gives}

    def go_on(self, names: set[str]) -> None:
        """Run until those of the values ``names`` that exist are computed."""
        while names & self._given - self.values.keys():
            self.made = {}
            self.step(next(self._left), self.made)

    def step(self, segment: Segment, made: dict[Recipe, Tensor]) -> None:
        """Run one segment. Its weights are chosen from those ``made``, or computed and added to them."""
        own = ((name, self.values[name], self._instead.get(name)) for name in segment.takes)
        taken = [other if alike(value, other) else value for _, value, other in own]
        given = run_segment(self._root, segment, taken, partial(chosen_or_computed, made))
        self.values.update(zip(segment.gives, given, strict=True))


def _put(root: nn.Module, name: str, tensor: Tensor) -> None:
    parameter = isinstance(get_tensor(root, name), nn.Parameter) and not isinstance(tensor, nn.Parameter)
    put_tensor(root, name, nn.Parameter(tensor, False) if parameter else tensor, persistent(root, name))
