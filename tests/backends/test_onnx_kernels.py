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

from lorafx.backends.onnx_kernels import (
    drop_idle_reshapes,
    turn_weights,
    turn_weights_once,
    unfuse_batch_transposes,
    unfuse_mixed_norms,
    unfuse_skip_norms,
)
from lorafx.backends.onnx_statements import leave_out

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


@pytest.mark.parametrize("bias", [True, False])
def test_norms_whose_scale_is_of_another_dtype_are_put_apart(bias: bool) -> None:
    """ONNX Runtime refuses the fused one, and the standard operator for the norm alone."""
    half, single = TensorProto.FLOAT16, TensorProto.FLOAT
    inputs = ["x", "skip", "scale", *(["bias"] if bias else [])]
    node = helper.make_node("SkipSimplifiedLayerNormalization", inputs, ["y", "", "", "total"], domain="com.microsoft")
    scale, added = (GENERATOR.normal(size=WIDTH) for _ in range(2))
    values = {"scale": scale.astype(np.float32), "bias": added.astype(np.float16)}
    given = [helper.make_tensor_value_info(name, half, ["batch", "length", WIDTH]) for name in ("x", "skip")]
    made = [helper.make_tensor_value_info(*one, ["batch", "length", WIDTH]) for one in (("y", single), ("total", half))]
    held = [onnx.numpy_helper.from_array(values[name], name) for name in inputs[2:]]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    fused = helper.make_model(helper.make_graph([node], "one", given, made, held), opset_imports=opsets, ir_version=10)
    model = ir.from_proto(fused)
    assert unfuse_mixed_norms(model) == 1
    leave_out(model)
    x, skip = (GENERATOR.normal(size=(2, 5, WIDTH)).astype(np.float16) for _ in range(2))
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    results: list[Any] = list(session.run(None, {"x": x, "skip": skip}))
    y, total = results
    exact = x.astype(np.float64) + skip + (values["bias"].astype(np.float64) if bias else 0)
    wanted = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-12) * scale
    assert (y.dtype, total.dtype) == (np.float32, np.float16)
    assert np.abs(y - wanted).max() < 4e-3 * np.abs(wanted).max()  # sums of three rounded to fp16


def test_norms_of_one_dtype_stay_fused() -> None:
    assert unfuse_mixed_norms(ir.from_proto(norm(["y"], dtype=TensorProto.FLOAT16))) == 0


# ---- products


def product(side: str, ranks: tuple[int, int]) -> onnx.ModelProto:
    """A product whose operand ``side`` has its batch where the rows are: 3-D, the other one 2-D or 3-D."""
    sizes = {"A": ["rows", "batch", 4], "B": [4, "batch", 5]}
    plain = {"A": ["batch", "rows", 4], "B": ["batch", 4, 5]}
    shapes = [sizes["A"] if side == "A" else plain["A"], sizes["B"] if side == "B" else plain["B"]]
    shapes = [shape[-rank:] for shape, rank in zip(shapes, ranks, strict=True)]
    flags = {f"transBatch{side}": 1, "alpha": 0.5}
    node = helper.make_node("FusedMatMul", ["a", "b"], ["y"], domain="com.microsoft", **flags)
    kind = TensorProto.FLOAT
    given = [helper.make_tensor_value_info(name, kind, shape) for name, shape in zip("ab", shapes, strict=True)]
    graph = helper.make_graph([node], "one", given, [helper.make_tensor_value_info("y", kind, [None, None, 5])])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize(("side", "ranks"), [("A", (3, 2)), ("B", (2, 3))])
def test_operands_of_two_ranks_are_transposed_apart(side: str, ranks: tuple[int, int]) -> None:
    fused = product(side, ranks)
    a = GENERATOR.normal(size=(3, 2, 4) if side == "A" else (3, 4)).astype(np.float32)
    b = GENERATOR.normal(size=(4, 5) if side == "A" else (4, 2, 5)).astype(np.float32)
    turned = (a.transpose(1, 0, 2), b) if side == "A" else (a, b.transpose(1, 0, 2))
    model = ir.from_proto(fused)
    assert unfuse_batch_transposes(model) == 1
    apart = ir.to_proto(model)
    assert Counter(node.op_type for node in apart.graph.node) == {"Transpose": 1, "FusedMatMul": 1}
    session = onnxruntime.InferenceSession(apart.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"a": a, "b": b})
    assert np.abs(np.asarray(found) - 0.5 * turned[0] @ turned[1]).max() < 1e-6  # fp32, products of four


def test_operands_of_one_rank_stay_fused() -> None:
    assert unfuse_batch_transposes(ir.from_proto(product("A", (3, 3)))) == 0


def heads(first: str, sizes: list[int | str] | None, read_between: bool = False) -> onnx.ModelProto:
    """``Sin`` of x reshaped to ``first`` and flattened again, between the two stated as ``sizes``."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 12])
    nodes = [
        helper.make_node("Reshape", ["x", "apart"], ["taken_apart"]),
        helper.make_node("Reshape", ["taken_apart", "together"], ["put_together"]),
        helper.make_node("Sin", ["put_together"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", 12])]
    if read_between:
        nodes.append(helper.make_node("Cos", ["taken_apart"], ["z"]))
        outputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", "length", 3, 4]))
    targets = {"apart": [int(size) for size in first.split()], "together": [0, 0, -1]}
    values = [onnx.numpy_helper.from_array(np.array(target), name) for name, target in targets.items()]
    between = [] if sizes is None else [helper.make_tensor_value_info("taken_apart", TensorProto.FLOAT, sizes)]
    graph = helper.make_graph(nodes, "heads", [given], outputs, values, value_info=between)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize(("read_between", "gone"), [(False, 2), (True, 1)])
def test_heads_taken_apart_and_put_together_go(read_between: bool, gone: int) -> None:
    before = heads("0 0 3 4", ["batch", "length", 3, 4], read_between)
    model = ir.from_proto(before)
    assert drop_idle_reshapes(model) == gone
    after = ir.to_proto(model)
    assert [value.name for value in after.graph.initializer] == (["apart"] if read_between else [])
    onnx.checker.check_model(after)
    x = GENERATOR.normal(size=(2, 5, 12)).astype(np.float32)
    for ours, theirs in zip(_outputs(after, x), _outputs(before, x), strict=True):
        assert ours.shape == theirs.shape
        assert (ours == theirs).all()


@pytest.mark.parametrize(
    ("first", "sizes"),
    [
        ("0 0 3 4", None),  # nothing is known of the shape between
        ("0 0 3 4", ["batch", "unk__0", 3, 4]),  # a symbol that says nothing
        ("0 -1 3 2", ["batch", "twice", 3, 2]),  # twice as many tokens of half the size
        ("-1 0 6 4", ["half", "length", 6, 4]),
    ],
)
def test_other_reshapes_stay(first: str, sizes: list[int | str] | None) -> None:
    model = ir.from_proto(heads(first, sizes))
    assert drop_idle_reshapes(model) == 0


def merged(target: str) -> onnx.ModelProto:
    """``Sin`` of heads put together and taken apart again by ``target``, of which no shape is stated."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 3, 4])
    nodes = [
        helper.make_node("Reshape", ["x", "together"], ["put_together"]),
        helper.make_node("Reshape", ["put_together", "apart"], ["taken_apart"]),
        helper.make_node("Sin", ["taken_apart"], ["y"]),
    ]
    between = [helper.make_tensor_value_info("put_together", TensorProto.FLOAT, ["batch", "length", 12])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)]
    targets = {"apart": [int(size) for size in target.split()], "together": [0, 0, -1]}
    values = [onnx.numpy_helper.from_array(np.array(sizes), name) for name, sizes in targets.items()]
    graph = helper.make_graph(nodes, "merged", [given], outputs, values, value_info=between)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize(
    ("target", "gone"),
    [("0 0 3 4", 2), ("0 0 3 -1", 2), ("0 0 -1 4", 2), ("0 0 4 3", 0), ("0 0 -1 3", 0), ("0 -1 3 4", 0)],
)
def test_heads_put_together_and_taken_apart_go(target: str, gone: int) -> None:
    before = merged(target)
    model = ir.from_proto(before)
    assert drop_idle_reshapes(model) == gone
    x = GENERATOR.normal(size=(2, 5, 3, 4)).astype(np.float32)
    (ours,), (theirs,) = _outputs(ir.to_proto(model), x), _outputs(before, x)
    assert ours.shape == theirs.shape
    assert (ours == theirs).all()


def _outputs(model: onnx.ModelProto, x: Any) -> list[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


def tied(read_too: bool = False, **fused: Any) -> onnx.ModelProto:
    """Embeddings whose table is also the last layer's weight; ``read_too`` gives the table itself out as well."""
    table = GENERATOR.normal(size=(7, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["embedded"]),
        helper.make_node("FusedMatMul", ["embedded", "table"], ["y"], domain="com.microsoft", transB=1, **fused),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", 7])]
    if read_too:
        nodes.append(helper.make_node("Neg", ["table"], ["z"]))
        outputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [7, 4]))
    given = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])]
    values = [onnx.numpy_helper.from_array(table, "table")]
    graph = helper.make_graph(nodes, "tied", given, outputs, values)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("read_too", [False, True])
@pytest.mark.parametrize("computed", [False, True])
def test_a_tied_head_is_turned_apart_and_the_table_stays(computed: bool, read_too: bool) -> None:
    """Apart, for a session to compute, or computed for tools that look for weights."""
    before = tied(read_too)
    model = ir.from_proto(before)
    if computed:
        turn_weights(model)
    else:
        assert turn_weights_once(model) == 1
    after = ir.to_proto(model)
    onnx.checker.check_model(after)
    added = {"MatMul"} if computed else {"Transpose", "MatMul"}
    assert {node.op_type for node in after.graph.node} == {"Gather", *added, *(["Neg"] if read_too else [])}
    sizes = {value.name: list(value.dims) for value in after.graph.initializer}
    assert sizes == {"table": [7, 4], **({"table.T": [4, 7]} if computed else {})}
    ids = np.array([[0, 6, 3], [2, 2, 5]])
    for ours, theirs in zip(_tokens(after, ids), _tokens(before, ids), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)  # fp32, sums in another order


def test_a_session_turns_a_tied_head_when_it_loads_it(tmp_path: Path) -> None:
    model = ir.from_proto(tied())
    turn_weights_once(model)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    loaded = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    assert loaded == {"Gather": 1, "MatMul": 1}


@pytest.mark.parametrize("changes", [{"alpha": 0.5}, {"transA": 1}])
def test_products_that_do_more_than_turn_a_weight_stay(changes: dict[str, Any]) -> None:
    model = ir.from_proto(tied(**changes))
    assert turn_weights_once(model) == 0
    turn_weights(model)
    assert {node.op_type for node in model.graph} == {"Gather", "FusedMatMul"}


def _tokens(model: onnx.ModelProto, ids: Any) -> list[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"ids": ids}))
