"""What makes exports quicker finds what onnxscript finds, and leaves torch and onnxscript as they were."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
import pytest
import torch
from onnxscript import optimizer
from torch.onnx._internal.exporter._registration import ONNXRegistry

from lorafx.backends.quicker import quicker

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
rotary (float[2, 8] x) => (float[2, 4] y, float[2, 8] z)
<int64[1] zero = {0}, int64[1] half = {4}, int64[1] end = {8}, int64[1] axis = {1}>
{
    second = Slice(x, half, end, axis)
    first = Slice(x, zero, half, axis)
    turned = Neg(second)
    y = Add(first, turned)
    sines = Sin(x)
    z = Mul(sines, x)
}
"""


def optimised() -> list[str]:
    model = ir.from_onnx_text(TEXT)
    optimizer.optimize_ir(model)
    return [node.op_type for node in model.graph]


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry each time a graph's nodes are listed."""
    seen: list[int] = []
    walk = ir.Graph.__iter__

    def counted(self: ir.Graph) -> Iterator[ir.Node]:
        seen.append(len(self))
        return walk(self)

    monkeypatch.setattr(ir.Graph, "__iter__", counted)
    return seen


def test_the_same_is_found_without_a_walk_for_every_node(walks: list[int]) -> None:
    plain, before = optimised(), len(walks)
    assert "Split" in plain
    walks.clear()
    with quicker():
        assert optimised() == plain
    assert len(walks) < before
    walks.clear()
    assert optimised() == plain
    assert len(walks) == before, "onnxscript is as it was afterwards"


def test_a_table_of_operators_is_the_caller_s_own() -> None:
    sine = torch.ops.aten.sin.default
    plain = ONNXRegistry.from_torchlib()
    with quicker():
        first = ONNXRegistry.from_torchlib()
        first.register_op(sine, optimised)
        second = ONNXRegistry.from_torchlib()
    assert ONNXRegistry.from_torchlib().functions.keys() == second.functions.keys() == plain.functions.keys()
    assert len(first.get_decomps(sine)) == len(second.get_decomps(sine)) + 1
    names = [[entry.onnx_function.__name__ for entry in table.get_decomps(sine)] for table in (second, plain)]
    assert names[0] == names[1]
    assert second.opset_version == plain.opset_version
