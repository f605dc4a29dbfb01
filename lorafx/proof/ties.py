"""Whether a program chooses among equal values, which each runtime orders in a way of its own.

``topk`` says nothing about which of equal values it takes. Where the last one taken equals the first one left (scores
that a ReLU made 0, say, as in the indexers of sparse attention), torch and ONNX Runtime are both right and differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..graph.inner import inner_graph
from ..graph.site import module_path
from ..models.tokenizers import length_limit, pad_token
from ..parity.inputs import SHAPES, Generator
from ..public import Program
from .open import open_runner

aten = torch.ops.aten


def chosen_among_equals(program: Program) -> str:
    """A line on a choice of ``program`` among equal values, on inputs of the usual shapes; empty when it makes none."""
    nodes = [*_nodes(program.root, program.graph)]
    if not nodes:
        return ""
    runner = open_runner(program)
    limit, pad = length_limit(program.config), pad_token(program.config)
    shapes = (*SHAPES, *(() if limit is None else ((1, min(limit, 80)),)))
    with _Choices() as choices:
        for batch in Generator(runner.inputs, 0, pad, False, limit).batches(shapes):
            if not runner.outside(batch.values):
                runner(batch.values)
    if not any(choices.tied):
        return ""
    # A graph runs its operators in their order, once for each batch.
    node = nodes[next(place for place, count in enumerate(choices.tied) if count) % len(nodes)]
    times = f"{sum(choices.tied)} of {choices.rows} times"
    where = module_path(node, "the model")
    return f"{where} picks some of several equal values ({times}), which each runtime orders in its own way"


def _nodes(root: nn.Module, graph: fx.Graph) -> Iterator[fx.Node]:
    """The choices of a graph and of those inside it, in the order in which they run."""
    for node in graph.nodes:
        if node.target is aten.topk.default:
            yield node
        elif node.op == "call_function":
            inner = (inner_graph(root, given) for given in node.args)
            for module in (module for module in inner if module is not None):
                yield from _nodes(module, module.graph)


class _Choices(TorchDispatchMode):
    """While it is entered, counts the choices where the last value taken equals the first one left, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.tied: list[int] = []
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = func(*args, **(kwargs or {}))
        if func is aten.topk.default:
            values, count, axis = args[0], args[1], args[2] if len(args) > 2 else -1
            most = values.sort(axis, descending=True).values.narrow(
                axis, count - 1, min(2, values.shape[axis] - count + 1)
            )
            last, left = most.select(axis, 0), most.select(axis, -1)
            tied = (last == left) & left.isfinite() if count < values.shape[axis] else torch.zeros_like(last).bool()
            self.tied.append(int(tied.sum()))
            self.rows += tied.numel()
        return given
