"""What is joined for CUDA: the same function, in fewer operators; and what is left because it would be another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

import lorafx
from lorafx.backends import onnx_launches, onnx_masks
from lorafx.backends.onnx_launches import launch_less
from tests import zoo

CONTRIB = "com.microsoft"
WIDTH, HEADS = 24, 2
DRAWN = np.random.default_rng(0)
FLOAT, BOOL, INT = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64


def drawn(*shape: int) -> np.ndarray[Any, Any]:
    return DRAWN.normal(size=shape).astype(np.float32)


def model(
    nodes: list[onnx.NodeProto],
    held: dict[str, np.ndarray[Any, Any]],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: tuple[str, ...] = ("y",),
    kind: int = FLOAT,
    known: dict[str, tuple[int, list[Any]]] | None = None,
) -> onnx.ModelProto:
    """A graph whose shapes are inferred, but for those that an exporter knows better."""
    given = [helper.make_tensor_value_info(name, *shape) for name, shape in inputs.items()]
    made = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
    values = [onnx.numpy_helper.from_array(value, name) for name, value in held.items()]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(CONTRIB, 1)]
    said = [helper.make_tensor_value_info(name, *shape) for name, shape in (known or {}).items()]
    graph = helper.make_graph(nodes, "one", given, made, values, value_info=said)
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def results(proto: onnx.ModelProto, inputs: dict[str, Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def changed(proto: onnx.ModelProto, change: Callable[[ir.Graph], Any]) -> tuple[onnx.ModelProto, Any]:
    """The graph after a change, swept, and what the change returned."""
    made = ir.from_proto(proto)
    returned = change(made.graph)
    RemoveUnusedNodesPass()(made)
    return ir.to_proto(made), returned


def operators(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def node(kind: str, inputs: str, outputs: str = "", domain: str = "", **attributes: Any) -> onnx.NodeProto:
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(kind, names, (outputs or "y").split(), domain=domain, **attributes)


# ---- attention

TEXTS: dict[str, tuple[int, list[Any]]] = {
    "x": (FLOAT, ["batch", "length", WIDTH]),
    "mask": (FLOAT, ["batch", 1, "length", "length"]),
}


def attention(
    order: str = "qkv",
    shifted: str = "qkv",
    value: int = 12,
    masked: bool = True,
    read_too: bool = False,
    **attributes: Any,
) -> onnx.ModelProto:
    """A packed product, split in this order, of which an attention reads parts with vectors added to some."""
    widths = {"q": 12, "k": 12, "v": value}
    held: dict[str, np.ndarray[Any, Any]] = {f"b{part}": drawn(width) for part, width in widths.items()}
    held |= {"W": drawn(WIDTH, sum(widths.values())), "sizes": np.array([widths[part] for part in order])}
    nodes = [node("MatMul", "x W", "packed"), node("Split", "packed sizes", " ".join(order), axis=-1)]
    nodes += [node("Add", f"{part} b{part}", f"{part}+") for part in shifted]
    read = [f"{part}+" if part in shifted else part for part in "qkv"]
    bias = " - - mask" if masked else ""
    nodes.append(node("MultiHeadAttention", " ".join(read) + bias, "z", CONTRIB, num_heads=HEADS, **attributes))
    nodes.append(node("Add", "z q" if read_too else "z one"))
    return model(nodes, {**held, "one": np.ones(1, np.float32)}, TEXTS if masked else {"x": TEXTS["x"]})


def attended(proto: onnx.ModelProto) -> list[Any]:
    inputs = {"x": drawn(3, 5, WIDTH), "mask": np.where(DRAWN.random((3, 1, 5, 5)) < 0.3, -1e4, 0).astype(np.float32)}
    given = {entry.name: inputs[entry.name] for entry in proto.graph.input}
    joined, _ = changed(proto, onnx_launches.join_attentions)
    return [*results(proto, given), *results(joined, given)]


@pytest.mark.parametrize("order", ["qkv", "vkq"])
@pytest.mark.parametrize(("shifted", "value"), [("qkv", 12), ("qv", 8), ("", 12)])
@pytest.mark.parametrize("masked", [True, False])
def test_an_attention_and_its_projection_are_one(order: str, shifted: str, value: int, masked: bool) -> None:
    proto = attention(order, shifted, value, masked, scale=0.3)
    joined, count = changed(proto, onnx_launches.join_attentions)
    assert count == 1
    assert operators(joined) == {"Attention": 1, "Add": 1}
    before, after = attended(proto)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)  # fp32, summed in another order


def test_the_scale_that_nobody_states_is_the_same() -> None:
    before, after = attended(attention())
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"unidirectional": 1}, {"mask_filter_value": -3.0}], ids=["causal", "with a filler of its own"]
)
def test_an_attention_that_does_more_stays(options: dict[str, Any]) -> None:
    _, count = changed(attention(**options), onnx_launches.join_attentions)
    assert not count


def test_a_part_that_others_read_too_stays_for_them() -> None:
    proto = attention(read_too=True)
    joined, count = changed(proto, onnx_launches.join_attentions)
    assert count == 1
    assert operators(joined)["Split"] == 1
    before, after = attended(proto)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


# ---- norms


@pytest.mark.parametrize("skip", [["batch", "length", WIDTH], [1, "length", WIDTH]], ids=["of each", "of all"])
def test_a_norm_and_its_sum_are_one(skip: list[Any]) -> None:
    nodes = [node("Add", "skip x", "sum"), node("LayerNormalization", "sum scale shift", epsilon=1e-2)]
    held = {"scale": drawn(WIDTH), "shift": drawn(WIDTH)}
    proto = model(nodes, held, {"x": TEXTS["x"], "skip": (FLOAT, skip)})
    joined, count = changed(proto, onnx_launches.join_norms)
    assert count == 1
    assert operators(joined) == {"SkipLayerNormalization": 1}
    inputs = {"x": drawn(2, 3, WIDTH), "skip": drawn(skip[0] if skip[0] == 1 else 2, 3, WIDTH)}
    np.testing.assert_allclose(results(joined, inputs)[0], results(proto, inputs)[0], rtol=1e-4, atol=1e-5)


def test_a_norm_of_a_norm_and_the_constant_between() -> None:
    """What is left of a post-norm block whose sublayer is gone. A large epsilon tells a wrong factor."""
    nodes = [
        node("LayerNormalization", "x scale shift", "n", epsilon=0.5),
        node("Add", "n constant", "s"),
        node("LayerNormalization", "s scale shift", epsilon=0.5),
    ]
    held = {"scale": drawn(WIDTH), "shift": drawn(WIDTH), "constant": drawn(1, 1, WIDTH)}
    proto = model(nodes, held, {"x": TEXTS["x"]})

    def both(graph: ir.Graph) -> tuple[int, int]:
        return onnx_launches.shift_norms(graph), onnx_launches.join_norms(graph)

    joined, counts = changed(proto, both)
    assert counts == (1, 1)
    assert operators(joined) == {"LayerNormalization": 1, "SkipLayerNormalization": 1}
    inputs = {"x": drawn(2, 3, WIDTH)}
    np.testing.assert_allclose(results(joined, inputs)[0], results(proto, inputs)[0], rtol=1e-4, atol=1e-5)


def test_a_shift_stays_where_the_norm_is_read_twice() -> None:
    nodes = [
        node("LayerNormalization", "x scale shift", "n"),
        node("Add", "n constant", "s"),
        node("Mul", "s n"),
    ]
    held = {"scale": drawn(WIDTH), "shift": drawn(WIDTH), "constant": drawn(WIDTH)}
    _, count = changed(model(nodes, held, {"x": TEXTS["x"]}), onnx_launches.shift_norms)
    assert not count


def test_a_first_norm_without_a_sum_stays() -> None:
    """What it reads may be too large to be doubled in fp16."""
    nodes = [node("LayerNormalization", "x scale shift")]
    held = {"scale": drawn(WIDTH), "shift": drawn(WIDTH)}
    _, count = changed(model(nodes, held, {"x": TEXTS["x"]}), onnx_launches.join_norms)
    assert not count


# ---- masks


def grid(least: int = 0, start: int = 0, swapped: bool = False, limit: str = "length") -> onnx.ModelProto:
    """``mask[batch, key] and query >= least`` in the shape [batch, 1, query, key], as places are traced."""
    held = {name: np.array(value) for name, value in {"0": start, "1": 1, "least": least}.items()}
    held |= {f"ax{'_'.join(map(str, axes))}": np.array(axes) for axes in ([1, 2, 3], [0, 1, 2], [0, 1, 3], [-1], [0])}
    nodes = [
        *(node("Shape", "mask", name, start=axis, end=axis + 1) for axis, name in enumerate(("b1", "l1"))),
        *(node("Squeeze", f"{name}1 ax0", name) for name in ("b", "l")),
        *(node("Range", f"0 {name} 1", f"r{name}") for name in ("b", "l")),
        node("Unsqueeze", "rb ax1_2_3", "ib"),
        node("Unsqueeze", "rl ax0_1_2", "ik"),
        node("Unsqueeze", "rl ax0_1_3", "iq"),
        node("Max", "ib ik", "grid"),
        node("Shape", "grid", "size"),
        *(node("Expand", f"{name} size", f"{name}e") for name in ("ib", "ik")),
        *(node("Unsqueeze", f"{name}e ax-1", f"{name}u") for name in ("ib", "ik")),
        node("Concat", "iku ibu" if swapped else "ibu iku", "places", axis=-1),
        node("GatherND", "mask places", "seen"),
        node("GreaterOrEqual", "iq least", "late"),
        node("And", "late seen"),
    ]
    whole = ["batch", 1, 1, limit]
    known = {"rb": (INT, ["batch"]), "rl": (INT, [limit]), "ibe": (INT, whole), "ike": (INT, whole)}
    known |= {"seen": (BOOL, whole), "late": (BOOL, [1, 1, limit, 1])}
    return model(nodes, held, {"mask": (BOOL, ["batch", limit])}, kind=BOOL, known=known)


def test_a_mask_that_reads_everything_is_read_as_it_lies() -> None:
    proto = grid()
    simple, _ = changed(proto, onnx_masks.simplify_masks)
    assert operators(simple).keys() & {"GatherND", "Range", "GreaterOrEqual", "And"} == set()
    mask = DRAWN.random((3, 5)) < 0.5
    np.testing.assert_array_equal(results(simple, {"mask": mask})[0], results(proto, {"mask": mask})[0])
    assert results(simple, {"mask": mask})[0].shape == (3, 1, 5, 5)


@pytest.mark.parametrize(("options", "left"), [({"least": 1}, "GreaterOrEqual"), ({"start": 1}, "GatherND")])
def test_a_mask_that_leaves_something_out_stays(options: dict[str, Any], left: str) -> None:
    simple, _ = changed(grid(**options), onnx_masks.simplify_masks)
    assert operators(simple)[left] == 1


def test_a_transposed_read_stays() -> None:
    simple, _ = changed(grid(swapped=True, limit="batch"), onnx_masks.simplify_masks)
    assert operators(simple)["GatherND"] == 1


def test_a_bias_is_chosen_and_counts_are_not_rounded() -> None:
    held = {"low": np.float16(-65504.0), "one": np.float32(1.0), "last": np.array([-1])}
    nodes = [
        node("Not", "m", "off"),
        node("Cast", "off", "weight", to=TensorProto.FLOAT16),
        node("Mul", "weight low", "bias"),
        node("Cast", "m", "half", to=TensorProto.FLOAT16),
        node("Cast", "half", "number", to=FLOAT),
        node("ReduceSum", "number last", "sum"),
        node("Cast", "sum", "rounded", to=TensorProto.FLOAT16),
        node("Cast", "rounded", "wide", to=FLOAT),
        node("Less", "wide one", "none"),
        node("Where", "none low bias"),
    ]
    proto = model(nodes, held, {"m": (BOOL, ["batch", "length"])}, kind=TensorProto.FLOAT16)
    simple, _ = changed(proto, onnx_masks.simplify_masks)
    assert operators(simple) == {"Where": 2, "Cast": 1, "ReduceSum": 1, "Less": 1}
    mask = np.array([[True, False, True], [False, False, False]])
    np.testing.assert_array_equal(results(simple, {"m": mask})[0], results(proto, {"m": mask})[0])


def test_a_count_held_against_another_number_is_rounded_first() -> None:
    held = {"many": np.float32(2048.5), "last": np.array([-1])}  # in fp16 it would be 2048
    nodes = [
        node("Cast", "m", "number", to=FLOAT),
        node("ReduceSum", "number last", "sum"),
        node("Cast", "sum", "rounded", to=TensorProto.FLOAT16),
        node("Cast", "rounded", "wide", to=FLOAT),
        node("Less", "wide many"),
    ]
    proto = model(nodes, held, {"m": (BOOL, ["batch", "length"])}, kind=BOOL)
    assert changed(proto, onnx_masks.cast_once)[1] == 0


@pytest.mark.parametrize(("order", "moved"), [([0, 2, 1, 3], 1), ([2, 1, 0, 3], 0)])
def test_axes_of_length_one_move_by_shape(order: list[int], moved: int) -> None:
    proto = model([node("Transpose", "x", perm=order)], {}, {"x": (FLOAT, ["batch", 1, "length", 1])})
    simple, count = changed(proto, onnx_launches.move_ones_by_shape)
    assert count == moved
    x = drawn(3, 1, 4, 1)
    np.testing.assert_array_equal(results(simple, {"x": x})[0], results(proto, {"x": x})[0])


# ---- whole models


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_an_encoder_for_cuda_is_told_in_half_the_operators(name: str, tmp_path: Path) -> None:
    program = zoo.captured(name)
    result = lorafx.export(program, tmp_path / "onnx", provider="cuda")  # held against the program, odd masks and all
    assert result is not None
    assert result.ok
    found = operators(onnx.load(tmp_path / "onnx" / "model.onnx"))
    assert found["Attention"] == 2
    assert not found.keys() & {"MultiHeadAttention", "Split", "GatherND", "Range", "And"}


def test_what_is_told_less_of_is_the_same_twice(tmp_path: Path) -> None:
    lorafx.export(zoo.captured("bert"), tmp_path / "onnx", provider="cuda", check=False)
    made = ir.load(tmp_path / "onnx" / "model.onnx")
    before = len(made.graph)
    launch_less(made)
    assert len(made.graph) == before
