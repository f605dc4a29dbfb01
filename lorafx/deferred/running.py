"""Running a graph whose tensors do not fit into memory together: those of one block at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ..graph.segments import CompiledGraph, Segment
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


def _put(root: nn.Module, name: str, tensor: Tensor) -> None:
    parameter = isinstance(get_tensor(root, name), nn.Parameter) and not isinstance(tensor, nn.Parameter)
    put_tensor(root, name, nn.Parameter(tensor, False) if parameter else tensor, persistent(root, name))
