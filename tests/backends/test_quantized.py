"""Graphs of fewer bits: what they score and weigh beside what they were, and that nobody calls them equal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers as hf
from click.testing import CliRunner

import lorafx
from lorafx.backends.quantized import KINDS, check_quantized, quantize
from lorafx.cli import main
from lorafx.errors import LorafxError, UsageError
from lorafx.passes.magnitude import Magnitude
from lorafx.proof.encoder_decoder import DECODER, ENCODER
from lorafx.public import Program
from lorafx.testing.laws import stages
from tests import zoo
from tests.backends.as_it_is import accepted
from tests.backends.test_encoder_decoder import bart
from tests.small import WORDS, bert, captured, gpt2, llama, words

ROWS = [" ".join(WORDS[start : start + 3 + start % 4]) for start in range(12)]


def table(folder: Path, labels: list[int] | None = None) -> Path:
    """Texts of several lengths, and a class for each if there are any."""
    lines = ["text" if labels is None else "text,label"]
    lines += ROWS if labels is None else [f"{text},{label}" for text, label in zip(ROWS, labels, strict=True)]
    (folder / "data.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "data.csv"


def checkpoint(folder: Path, model: Any) -> Path:
    model.eval().save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def exported(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["export", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    sections: dict[str, Any] = json.loads(result.stdout)["sections"]
    return sections


def never_equal(sections: dict[str, Any], folder: Path) -> None:
    """What is said of the graph is that it is approximate; what it was before was proven."""
    parity = sections["parity"]
    assert (parity["ok"], parity["ok_before"]) == (None, True)
    assert parity["summary_before"].startswith("equal: ")
    assert parity["summary"].startswith("approximate, int")
    written = json.loads((folder / "report.json").read_text(encoding="utf-8"))["sections"]
    assert (written["parity"], written["quantized"]) == (parity, sections["quantized"])
    certificate = json.loads((folder / "certificate.json").read_text(encoding="utf-8"))
    assert certificate["functions"] == parity


def test_an_encoder_scores_its_accuracy_before_and_after(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = bert().eval()
    base = checkpoint(tmp_path / "base", model)
    encoded = words()(ROWS, padding=True, return_tensors="pt")
    with torch.no_grad():
        own = model(**encoded).logits.argmax(-1)
    labels = [int(label) if row % 4 else 1 - int(label) for row, label in enumerate(own)]  # one of four is wrong
    sections = exported(base, "-o", tmp_path / "onnx", "--quantize", "int8", "--data", table(tmp_path, labels))
    found = sections["quantized"]
    assert (found["bits"], found["metric"], found["before"]) == ("int8", "accuracy", 0.75)
    assert found["on"] == "12 rows of data.csv", "not where the author keeps it"
    # Two blocks with one product for query, key and value, but for the last query, which goes over one token; the head.
    assert (found["products"], found["products_left"]) == (11, 0)
    never_equal(sections, tmp_path / "onnx")
    session: Any = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    feed = {value.name: encoded[value.name].numpy() for value in session.get_inputs()}
    after = np.argmax(session.run(None, feed)[0], -1)
    assert found["after"] == pytest.approx(np.mean(after == np.array(labels)))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the quantiser's own
@pytest.mark.parametrize("gather", ["never", "always"])
def test_the_tools_of_onnx_take_a_pruned_encoder_as_it_is(gather: Any, tmp_path: Path) -> None:
    folded = lorafx.fold(stages("bert")["zeros"], gather=gather)
    assert any(applied.taken for applied in folded.history if applied.step.pass_name() == "dead-channels")
    lorafx.export(folded, tmp_path / "onnx")
    file = tmp_path / "onnx" / "model.onnx"
    size, off = accepted(file, tmp_path)
    assert size < sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))
    # One of 255 steps over what each weight and activation spans, through two layers.
    assert off < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("bits", KINDS)
def test_a_decoder_scores_its_perplexity_before_and_after(bits: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = llama(head_dim=16, intermediate_size=192).eval()
    base = checkpoint(tmp_path / "base", model)
    folder = tmp_path / "onnx"
    sections = exported(base, "-o", folder, "--generate", "--quantize", bits, "--data", table(tmp_path))
    found = sections["quantized"]
    never_equal(sections, folder)
    assert (found["metric"], found["products_left"]) == ("perplexity", 0)
    assert found["bytes_after"] == sum(
        (folder / "onnx" / name).stat().st_size for name in ("model.onnx", "model.onnx_data")
    )
    lost, count = 0.0, 0
    for text in ROWS:  # as training ends them: the tokenizer has no end-of-text token
        ids = words()(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            lost += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert found["before"] == pytest.approx(math.exp(lost / count), rel=1e-5)  # fp32 by other kernels
    assert found["after"] == pytest.approx(found["before"], rel=0.2)  # weights near 0 are rounded, none is another
    assert found["after"] != found["before"]
    said = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    inputs = {value.name for value in ir.load(folder / said["filename"]).graph.inputs}
    assert {*said["inputs"].values()} & inputs == {"input_ids", "attention_mask", "position_ids"}
    text = CliRunner().invoke(main, ["generate", str(folder), "--prompt", "w3 w7", "--json"])
    assert json.loads(text.stdout)["new_tokens"] > 0
    assert CliRunner().invoke(main, ["verify", str(base), str(folder)]).exit_code == 4


@pytest.mark.slow
def test_a_decoder_that_was_pruned_unevenly_has_its_own_weights_in_eight_bits(tmp_path: Path) -> None:
    passes = [Magnitude(targets="all-linear", blocks=block, keep=keep) for block, keep in ((0, 0.5), (1, 0.75))]
    program = lorafx.rewrite(zoo.captured("llama"), passes)
    plain, few = tmp_path / "plain", tmp_path / "few"
    lorafx.export(program, plain, generate=True)
    lorafx.export(program, few, generate=True, quantize="int8", check=False)
    found = json.loads((few / "report.json").read_text(encoding="utf-8"))["sections"]["quantized"]
    weights = {
        name: value.const_value.numpy()
        for name, value in ir.load(plain / "onnx" / "model.onnx").graph.initializers.items()
        if value.const_value is not None
    }
    held = blocks(few / "onnx" / "model.onnx")
    assert (found["products"], found["products_left"]) == (len(held), 0)
    assert len({value.shape for value, _ in held.values()}) > 5  # other widths in each layer
    for name, (value, steps) in held.items():
        own = weights[name] if name in weights else weights[name.removesuffix(".T")].T
        assert (np.abs(value - own) <= 0.5001 * steps).all()  # to the nearest; the rest is fp32
    assert found["after"] == pytest.approx(found["before"], rel=0.05)  # eight bits of every weight
    assert found["after"] != found["before"]


@pytest.mark.slow
@pytest.mark.parametrize("bits", KINDS)
def test_an_encoder_decoder_scores_its_answers_before_and_after(bits: str, tmp_path: Path) -> None:
    """Both graphs are of fewer bits; the answers of the table are what is scored."""
    model = bart()
    base, file = checkpoint(tmp_path / "base", model), tmp_path / "data.csv"
    rows = "\n".join(f"{text},{answer}" for text, answer in zip(ROWS, reversed(ROWS), strict=True))
    file.write_text(f"text,label\n{rows}\n", encoding="utf-8")
    folder = tmp_path / "onnx"
    sections = exported(base, "-o", folder, "--generate", "--quantize", bits, "--data", file)
    found = sections["quantized"]
    never_equal(sections, folder)
    graphs = [ir.load(folder / name).graph for name in (ENCODER, DECODER)]
    counts = [sum(node.op_type == "MatMulNBits" for node in graph) for graph in graphs]
    assert min(counts) > 0
    assert (found["products"], found["products_left"], found["metric"]) == (sum(counts), 0, "perplexity")
    assert found["bytes_after"] == sum(part.stat().st_size for part in (folder / "onnx").iterdir())
    lost, count = 0.0, 0
    for text, answer in zip(ROWS, reversed(ROWS), strict=True):
        ids, labels = (words()(part, return_tensors="pt")["input_ids"] for part in (text, answer))
        with torch.no_grad():
            lost += float(model(ids, labels=labels).loss) * labels.shape[1]
        count += labels.shape[1]
    assert found["before"] == pytest.approx(math.exp(lost / count), rel=1e-5)  # fp32 by other kernels
    assert found["after"] == pytest.approx(found["before"], rel=0.2)  # weights near 0 are rounded, none is another
    assert found["after"] != found["before"]
    text = CliRunner().invoke(main, ["generate", str(folder), "--prompt", "w3 w7", "--json"])
    assert json.loads(text.stdout)["new_tokens"] > 0
    assert CliRunner().invoke(main, ["verify", str(base), str(folder)]).exit_code == 4


@pytest.mark.slow
def test_without_data_a_decoder_reads_what_it_wrote(tmp_path: Path) -> None:
    lorafx.export(captured(gpt2), tmp_path / "onnx", generate=True, quantize="int4")
    found = json.loads((tmp_path / "onnx" / "report.json").read_text(encoding="utf-8"))["sections"]["quantized"]
    assert "made-up prompts and what the graph wrote after them before (no data was given)" in found["on"]
    assert (found["products"], found["products_left"]) == (9, 0)  # GPT-2's are Gemm before
    assert 1 < found["before"] < 45


@pytest.mark.slow
def test_without_data_an_encoder_is_asked_whether_it_still_agrees(tmp_path: Path) -> None:
    lorafx.export(zoo.captured("clip-vision"), tmp_path / "onnx", quantize="int8")
    found = json.loads((tmp_path / "onnx" / "report.json").read_text(encoding="utf-8"))["sections"]["quantized"]
    assert (found["metric"], found["before"]) == ("similarity", 1.0)
    assert 0.9 < found["after"] < 1.0


# ---- the file


def product(folder: Path, weight: np.ndarray) -> Path:
    """``x @ weight`` as an ONNX file with its weight inside."""
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(["rows", weight.shape[0]]))
    held = ir.val("w", const_value=ir.tensor(weight, name="w"), dtype=ir.DataType.FLOAT, shape=ir.Shape(weight.shape))
    node = ir.node("MatMul", [x, held])
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape(["rows", weight.shape[1]])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[held], opset_imports={"": 20}, name="graph")
    ir.save(ir.Model(graph, ir_version=10), folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(("bits", "generates", "steps"), [("int8", False, 127), ("int8", True, 127), ("int4", True, 7)])
def test_each_weight_is_within_a_step_of_what_it_was(bits: Any, generates: bool, steps: int, tmp_path: Path) -> None:
    """36 numbers of a column: not a multiple of the blocks of 32 or 128."""
    weight = np.random.default_rng(0).standard_normal((36, 5)).astype(np.float32)
    assert quantize(product(tmp_path, weight), bits, generates) == (1, 0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    session: Any = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {"x": np.eye(36, dtype=np.float32)})[0]
    assert 0 < np.abs(found - weight).max() < 2.2 * np.abs(weight).max() / steps  # both factors are rounded


def blocks(file: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The weight that each ``MatMulNBits`` of a file stands for, by its name, and the step that each number of it has.

    ``(q - zero) * step`` of one byte a number, or of two numbers a byte, the lower half first: ONNX Runtime's docs of
    the operator.
    """
    found, model = {}, ir.load(file)
    held = {
        name: value.const_value for name, value in model.graph.initializers.items() if value.const_value is not None
    }
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            names = [value.name or "" for value in node.inputs[1:4] if value is not None]
            packed, scales, zeros = (_array(held[name]) for name in names)
            rows, columns, bits, size = (node.attributes[key].as_int() for key in ("K", "N", "bits", "block_size"))
            numbers, zero = (_numbers(value.reshape(columns, -1), bits) for value in (packed, zeros))
            steps = np.repeat(scales.reshape(columns, -1), size, axis=1)
            whole = (numbers - np.repeat(zero[:, : steps.shape[1] // size], size, axis=1)) * steps
            found[names[0].removesuffix(f"_Q{bits}")] = whole[:, :rows].T, steps[:, :rows].T
    return found


def _array(tensor: Any) -> np.ndarray:
    assert tensor is not None
    return tensor.numpy()


def _numbers(packed: np.ndarray, bits: int) -> np.ndarray:
    parts = [packed] if bits == 8 else [packed & 15, packed >> 4]
    return np.stack(parts, -1).reshape(len(packed), -1).astype(np.float32)


@pytest.mark.parametrize("bits", KINDS)
def test_what_generates_multiplies_by_blocks_of_its_weights(bits: Any, tmp_path: Path) -> None:
    """300 numbers of a column: three blocks of 128, the last one not full."""
    chance = np.random.default_rng(0)
    weight = (chance.standard_normal((300, 6)) * 10.0 ** chance.integers(-3, 3, (300, 1))).astype(np.float32)
    x = (chance.standard_normal((4, 300)) * 100.0 ** chance.integers(-1, 2, (1, 300))).astype(np.float32)
    file = product(tmp_path, weight)
    assert quantize(file, bits, generates=True) == (1, 0)
    ((held, steps),) = blocks(file).values()
    assert (np.abs(held - weight) <= 0.5001 * steps).all()  # to the nearest; the rest is fp32
    session: Any = onnxruntime.InferenceSession(file)
    found = session.run(None, {"x": x})[0]
    size = 128 if bits == "int8" else 32
    inputs = np.repeat([np.abs(part).max(1) for part in np.split(x, range(size, 300, size), axis=1)], size, 0)[:300].T
    # A factor is rounded to one of 127 steps to either side, in blocks as the weight; fp32 sums 300 of them.
    bound = (inputs / 127 / 2) @ np.abs(held) + 300 * 2.0**-24 * np.abs(x) @ np.abs(held)
    assert (np.abs(found - x @ held) <= bound).all()


def test_of_one_scale_for_all_inputs_small_ones_are_lost(tmp_path: Path) -> None:
    """Why what generates has blocks: a decoder's products have inputs of all sizes."""
    weight = np.random.default_rng(0).standard_normal((256, 8)).astype(np.float32)
    x = np.ones((1, 256), dtype=np.float32)
    x[0, 0], weight[0] = 4000.0, 0.0
    lost = []
    for name, generates in (("all", False), ("blocks", True)):
        (tmp_path / name).mkdir()
        file = product(tmp_path / name, weight)
        quantize(file, "int8", generates)
        session: Any = onnxruntime.InferenceSession(file)
        lost.append(np.abs(session.run(None, {"x": x})[0] - x @ weight).max() / np.abs(x @ weight).max())
    assert lost[0] > 0.9  # each 1 is less than half a step of 4000 / 255
    assert lost[1] < 0.9  # those of the second block are there
    assert lost[1] < lost[0]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bits", KINDS)
def test_a_weight_that_is_turned_where_it_is_used_is_turned_before(bits: Any, fused: bool, tmp_path: Path) -> None:
    """As a table of embeddings is, which others look tokens up in."""
    weight = np.random.default_rng(0).standard_normal((36, 36)).astype(np.float32)
    file = product(tmp_path, weight)
    model = ir.load(file)
    (first,) = model.graph
    held = model.graph.initializers["w"]
    turned = ir.node("Transpose", [held], {"perm": [1, 0]})
    last = ir.node("MatMul", [first.outputs[0], turned.outputs[0]])
    if fused:
        last = ir.node("FusedMatMul", [first.outputs[0], held], {"transB": 1}, domain="com.microsoft")
        model.opset_imports["com.microsoft"] = 1
    last.outputs[0].name, last.outputs[0].dtype = "z", ir.DataType.FLOAT
    last.outputs[0].shape = first.outputs[0].shape
    model.graph.extend([last] if fused else [turned, last])
    model.graph.outputs[:] = [last.outputs[0]]
    ir.save(model, file)
    assert quantize(file, bits, generates=True) == (2, 0)
    assert {node.op_type for node in ir.load(file).graph} == {"MatMulNBits"}
    x = np.eye(36, dtype=np.float32)
    session: Any = onnxruntime.InferenceSession(file)
    plain, other = (held for held, _ in blocks(file).values())
    steps = max(step.max() for _, step in blocks(file).values())
    assert np.abs(plain.T - other).max() <= steps  # each is within half of one of the same weight
    found, expected = session.run(None, {"x": x})[0], plain @ other
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()  # what is multiplied is rounded to 8 bits


def test_a_product_that_the_tools_leave_is_counted(tmp_path: Path) -> None:
    """Two matrices at once are no weight in blocks."""
    file = product(tmp_path, np.random.default_rng(0).standard_normal((36, 36)).astype(np.float32))
    model = ir.load(file)
    (first,) = model.graph
    two = ir.tensor(np.ones((2, 36, 3), dtype=np.float32), name="two")
    both = ir.val("two", const_value=two, dtype=ir.DataType.FLOAT, shape=ir.Shape([2, 36, 3]))
    model.graph.register_initializer(both)
    last = ir.node("MatMul", [first.outputs[0], both])
    last.outputs[0].name, last.outputs[0].dtype = "z", ir.DataType.FLOAT
    last.outputs[0].shape = ir.Shape([2, "rows", 3])
    model.graph.append(last)
    model.graph.outputs[:] = [last.outputs[0]]
    ir.save(model, file)
    assert quantize(file, "int8", generates=True) == (1, 1)


def test_a_graph_without_a_weight_to_multiply_by_is_refused(tmp_path: Path) -> None:
    file = product(tmp_path, np.ones((4, 4), dtype=np.float32))
    model = ir.load(file)
    next(iter(model.graph)).op_type = "Add"
    ir.save(model, file)
    before = file.read_bytes()
    for bits in KINDS:
        for generates in (False, True):
            with pytest.raises(UsageError, match=f"no weight that {bits} is for"):
                quantize(file, bits, generates)
    assert (file.read_bytes(), len(list(tmp_path.iterdir()))) == (before, 1)


def refused(error: type[LorafxError], said: str, program: Program, path: Path, **options: Any) -> None:
    with pytest.raises(error, match=said) as raised:
        lorafx.export(program, path, **options)
    assert "\n" not in str(raised.value)
    assert not path.exists()


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    program, path = captured(bert), tmp_path / "out"
    int8: Any = {"quantize": "int8"}
    refused(UsageError, "cannot quantize to 'int3'; known: int8, int4", program, path, quantize="int3")
    refused(UsageError, "dynamic int8 on the CPU alone; give --quantize int4", program, path, **int8, provider="cuda")
    refused(UsageError, "ONNX graphs are quantised, not hf", program, path, **int8, format="hf")
    refused(
        UsageError, "int8 is made of a float32 graph for cpu, not of float16", program, path, **int8, dtype=torch.half
    )
    half = r"int4 is made of a float32 graph for cpu, not of float16"
    refused(UsageError, half, program, path, quantize="int4", dtype=torch.half)
    refused(UsageError, "has its adapters in its weights", program, path, **int8, adapters="separate")
    refused(UsageError, "data is what a quantised graph is scored on", program, path, data={"text": ["w1"]})
    arguments = ["export", str(tmp_path), "-o", str(path), "--quantize", "int8", "--provider", "cuda"]
    assert CliRunner().invoke(main, arguments).exit_code == 2


def test_eight_bits_of_what_generates_are_for_the_gpu_as_well() -> None:
    check_quantized("int8", None, "onnx", "cuda", torch.half, generate=True)
    with pytest.raises(UsageError, match="int8 is made of a float32 graph for cpu, not of float16"):
        check_quantized("int8", None, "onnx", "cpu", torch.half, generate=True)


def test_data_that_cannot_be_scored_leaves_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = checkpoint(tmp_path / "base", bert())
    arguments = ["export", str(base), "-o", str(tmp_path / "onnx"), "--quantize", "int8", "--no-check"]
    result = CliRunner().invoke(main, [*arguments, "--data", str(table(tmp_path))])
    assert (result.exit_code, "no column 'label'" in result.output) == (5, True), result.output
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "data.csv"]
    assert hf.AutoModelForSequenceClassification.from_pretrained(base)
