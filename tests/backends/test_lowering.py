"""Graphs that are lowered without a trace compute what they did, and become the ONNX graphs that they became."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.onnx._internal.exporter._decomp import get_onnx_implemented_overloads
from torch.onnx._internal.exporter._registration import ONNXRegistry

import lorafx
from lorafx.backends import lowering
from tests import zoo

TRANSLATED = frozenset(get_onnx_implemented_overloads(ONNXRegistry.from_torchlib()))


class Computes(nn.Module):
    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(x, y)


def traced(function: Callable[..., Any], size: int = 6) -> torch.export.ExportedProgram:
    inputs = (torch.randn(2, 4, size), torch.randn(2, 4, size))
    return torch.export.export(Computes(function).eval(), inputs, dynamic_shapes=({0: torch.export.Dim.AUTO},) * 2)


def written(x: Tensor, y: Tensor) -> Tensor:
    total = x * 2
    share = total.sum(-1, keepdim=True)
    total /= share
    return total * y


DIMS = ((0, 1), (1, -1), (0, 2), (-2, 2))
LOWERED = {
    "dropout": lambda x, y: nn.functional.dropout(x, 0.5, training=False) + y,
    "contiguous": lambda x, y: x.transpose(1, 2).contiguous().view(-1, 24).sum(0) + y.sum(),
    "reshape": lambda x, y: x.transpose(1, 2).reshape(-1, 24) @ y.reshape(24, -1),
    "flatten": lambda x, y: [
        h.flatten(a, b) for h in (x, y.transpose(1, 2)) for a, b in ((0, 1), (1, -1), (0, 2), (-2, 2))
    ],
    "square": lambda x, y: x.square() + y,
    "dtypes": lambda x, y: x.to(torch.float64).sum().to(torch.float32) + y.to(torch.float32).to(y.device),
    "chunks": lambda x, y: [part * y.sum() for part in x.chunk(4, -1)],
    "unequal chunks": lambda x, y: [part * y.sum() for part in x.chunk(5, -1)],
    "masks": lambda x, y: torch.where((x > 0).__and__(y > 0).__or__(x > y), x, y),
    "extremes": lambda x, y: torch.min(x, y) - torch.max(x, y),
    "writes": written,
    "a write read by both names": lambda x, y: (h := x * 2, g := h.add_(y), g + h)[-1],
}
#: In these, torch has to find out what is what.
LEFT = {
    "a write into a view": lambda x, y: (h := x * 2, h[:, 0].add_(1.0), h * y)[-1],
    "a write seen by a view": lambda x, y: (h := x * 2, v := h[:, 0], h.add_(y), v * 2)[-1],
    "a write through what gives its operand back": lambda x, y: (
        h := x * 2,
        nn.functional.dropout(h, 0.5, training=False).add_(y),
        h * 2,
    )[-1],
    "a write into what was written": lambda x, y: (x * 2).add_(y).clamp_(min=0.0),
    "a write into an input": lambda x, y: x.add_(y) * 2,
    "an operator made of views": lambda x, y: x.unflatten(-1, (2, 3)).sum() + y,
    "a result that is an operand": lambda x, y: (x + y, (x * 2).to(torch.float32)),
}


def outputs(exported: torch.export.ExportedProgram) -> list[Tensor]:
    torch.manual_seed(1)
    result = exported.module()(torch.randn(2, 4, 6), torch.randn(2, 4, 6))
    return [result] if isinstance(result, Tensor) else [*result]


@pytest.mark.parametrize("name", LOWERED)
def test_the_same_is_computed_by_operators_that_have_a_translation(name: str) -> None:
    exported = traced(LOWERED[name])
    before = outputs(exported)
    assert lowering.lower(exported, TRANSLATED)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(exported), strict=True))
    called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert {target for target in called if not callable(target) or target.__module__ != "_operator"} <= TRANSLATED


@pytest.mark.parametrize("name", LEFT)
def test_what_takes_a_trace_is_left_as_it_is(name: str) -> None:
    exported = traced(LEFT[name])
    before = str(exported.graph)
    assert not lowering.lower(exported, TRANSLATED)
    assert str(exported.graph) == before


@pytest.mark.parametrize("name", ["distilbert", "llama", "clip-vision"])
def test_the_same_onnx_graph_comes_of_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, lowered = zoo.captured(name), []
    lower = lowering.lower

    def noted(*args: Any) -> bool:
        lowered.append(lower(*args))
        return lowered[-1]

    monkeypatch.setattr("lorafx.backends.quicker.lower", noted)
    lorafx.export(program, tmp_path / "lowered", "onnx")
    assert lowered
    assert all(lowered)
    monkeypatch.setattr("lorafx.backends.quicker.lower", lambda *_: False)
    lorafx.export(program, tmp_path / "traced", "onnx")
    counts = []
    for folder in ("lowered", "traced"):
        (path,) = (tmp_path / folder).rglob("*.onnx")
        counts.append(Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node))
    assert counts[0] == counts[1]
