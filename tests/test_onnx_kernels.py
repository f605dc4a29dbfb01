"""Operators that are put apart for ONNX Runtime: the same function, and left apart when a session loads them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from lorafx.onnx_kernels import unfuse_skip_norms

WIDTH = 48
GENERATOR = np.random.default_rng(0)


def norm(outputs: list[str], bias: bool = True, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """A model of one fused norm with these outputs."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    names = ["scale", "shift", *(["bias"] if bias else [])]
    inputs = ["x", "skip", *names]
    node = helper.make_node("SkipLayerNormalization", inputs, outputs, domain="com.microsoft", epsilon=1e-3)
    values = [onnx.numpy_helper.from_array(GENERATOR.normal(size=WIDTH).astype(kind), name) for name in names]
    given = [helper.make_tensor_value_info(name, dtype, ["batch", "length", WIDTH]) for name in ("x", "skip")]
    shapes = {"y": WIDTH, "total": WIDTH, "mean": 1}
    made = [helper.make_tensor_value_info(n, dtype, ["batch", "length", shapes[n]]) for n in outputs if n]
    graph = helper.make_graph([node], "one", given, made, values)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def results(model: onnx.ModelProto) -> list[Any]:
    places = np.arange(2 * 5 * WIDTH, dtype=np.float32).reshape(2, 5, WIDTH)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": np.cos(places), "skip": np.sin(places / 7)}))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [["y"], ["y", "", "", "total"]])
def test_apart_is_the_same_function(outputs: list[str], bias: bool) -> None:
    fused = norm(outputs, bias)
    model = ir.from_proto(fused)
    assert unfuse_skip_norms(model) == 1
    apart = ir.to_proto(model)
    onnx.checker.check_model(apart)
    assert Counter(node.op_type for node in apart.graph.node) == {"Sum": 1, "LayerNormalization": 1}
    assert [value.name for value in apart.graph.output] == [value.name for value in fused.graph.output]
    for ours, theirs in zip(results(apart), results(fused), strict=True):
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()  # fp32, sums in another order


def test_a_session_leaves_them_apart(tmp_path: Path) -> None:
    model = ir.from_proto(norm(["y"]))
    unfuse_skip_norms(model)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    loaded = {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}
    assert loaded == {"Sum", "LayerNormalization"}


def test_statistics_that_are_read_and_half_precision_stay_fused() -> None:
    for fused in (norm(["y", "mean"]), norm(["y"], dtype=TensorProto.FLOAT16)):
        assert unfuse_skip_norms(ir.from_proto(fused)) == 0
