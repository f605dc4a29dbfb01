"""What a file says beside its graph, as other tools read it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnxruntime import InferenceSession

from lorafx.backends.onnx_statements import leave_out

WIDTH = 6


def graph_of(*outputs: str, more: tuple[onnx.NodeProto, ...] = ()) -> onnx.ModelProto:
    """A norm without a mean, as ONNX Runtime's fusions write it."""
    norm = helper.make_node("SimplifiedLayerNormalization", ["x", "scale"], [*outputs], axis=-1, epsilon=1e-3)
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", WIDTH])
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", None]) for name in outputs]
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [WIDTH], np.linspace(0.5, 2.0, WIDTH, dtype=np.float32))
    graph = helper.make_graph([norm, *more], "norm", [given], made, [scale])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    session: Any = InferenceSession(model.SerializeToString())
    x = np.random.default_rng(0).normal(size=(2, 3, WIDTH)).astype(np.float32)
    return session.run(None, {"x": x})


def said(model: onnx.ModelProto) -> onnx.ModelProto:
    read = ir.from_proto(model)
    leave_out(read)
    return ir.to_proto(read)


def test_a_norm_has_the_name_that_onnx_knows() -> None:
    before = graph_of("y")
    with pytest.raises(onnx.checker.ValidationError, match="No Op registered for SimplifiedLayerNormalization"):
        onnx.checker.check_model(before, full_check=True)
    after = said(before)
    onnx.checker.check_model(after, full_check=True)
    assert [node.op_type for node in after.graph.node] == ["RMSNormalization"]
    assert after.opset_import[0].version == 23
    assert np.array_equal(run(before)[0], run(after)[0]), "one kernel under two names"


def test_one_whose_statistic_is_read_stays() -> None:
    before = graph_of("y", "inverse")
    after = said(before)
    assert [node.op_type for node in after.graph.node] == ["SimplifiedLayerNormalization"]
    assert all(np.array_equal(one, other) for one, other in zip(run(before), run(after), strict=True))


def test_a_graph_that_the_newer_version_reads_otherwise_stays() -> None:
    group = helper.make_node("GroupNormalization", ["x", "scale", "scale"], ["z"], num_groups=3)
    after = said(graph_of("y", more=(group,)))
    assert after.opset_import[0].version == 20
    assert after.graph.node[0].op_type == "SimplifiedLayerNormalization"
