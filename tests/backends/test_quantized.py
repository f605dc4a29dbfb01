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
from lorafx.backends.quantized import KINDS, quantize
from lorafx.cli import main
from lorafx.errors import LorafxError, UsageError
from lorafx.public import Program
from tests import zoo
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
    assert found["on"] == f"12 rows of {tmp_path / 'data.csv'}"
    assert (found["products"], found["products_left"]) == (10, 0)
    never_equal(sections, tmp_path / "onnx")
    session: Any = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    feed = {value.name: encoded[value.name].numpy() for value in session.get_inputs()}
    after = np.argmax(session.run(None, feed)[0], -1)
    assert found["after"] == pytest.approx(np.mean(after == np.array(labels)))


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


@pytest.mark.parametrize(("bits", "steps"), [("int8", 127), ("int4", 7)])
def test_each_weight_is_within_a_step_of_what_it_was(bits: Any, steps: int, tmp_path: Path) -> None:
    """36 numbers of a column: not a multiple of the blocks of 32."""
    weight = np.random.default_rng(0).standard_normal((36, 5)).astype(np.float32)
    assert quantize(product(tmp_path, weight), bits) == (1, 0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    session: Any = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {"x": np.eye(36, dtype=np.float32)})[0]
    assert 0 < np.abs(found - weight).max() < 2.2 * np.abs(weight).max() / steps  # both factors are rounded


def test_a_weight_that_is_turned_where_it_is_used_is_counted_as_left(tmp_path: Path) -> None:
    file = product(tmp_path, np.random.default_rng(0).standard_normal((36, 36)).astype(np.float32))
    model = ir.load(file)
    (first,) = model.graph
    turned = ir.node("Transpose", [model.graph.initializers["w"]], {"perm": [1, 0]})
    last = ir.node("MatMul", [first.outputs[0], turned.outputs[0]])
    last.outputs[0].name, last.outputs[0].dtype = "z", ir.DataType.FLOAT
    last.outputs[0].shape = first.outputs[0].shape
    model.graph.extend([turned, last])
    model.graph.outputs[:] = [last.outputs[0]]
    ir.save(model, file)
    assert quantize(file, "int4") == (1, 1)


def test_a_graph_without_a_weight_to_multiply_by_is_refused(tmp_path: Path) -> None:
    file = product(tmp_path, np.ones((4, 4), dtype=np.float32))
    model = ir.load(file)
    next(iter(model.graph)).op_type = "Add"
    ir.save(model, file)
    before = file.read_bytes()
    for bits in KINDS:
        with pytest.raises(UsageError, match=f"no weight that {bits} is for"):
            quantize(file, bits)
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
    refused(UsageError, "has its adapters in its weights", program, path, **int8, adapters="separate")
    refused(UsageError, "data is what a quantised graph is scored on", program, path, data={"text": ["w1"]})
    arguments = ["export", str(tmp_path), "-o", str(path), "--quantize", "int8", "--provider", "cuda"]
    assert CliRunner().invoke(main, arguments).exit_code == 2


def test_data_that_cannot_be_scored_leaves_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = checkpoint(tmp_path / "base", bert())
    arguments = ["export", str(base), "-o", str(tmp_path / "onnx"), "--quantize", "int8", "--no-check"]
    result = CliRunner().invoke(main, [*arguments, "--data", str(table(tmp_path))])
    assert (result.exit_code, "no column 'label'" in result.output) == (5, True), result.output
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "data.csv"]
    assert hf.AutoModelForSequenceClassification.from_pretrained(base)
