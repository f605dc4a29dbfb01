"""The back ends' short way: a program that differs from its capture in values alone is not traced again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lorafx
from lorafx.backends.replay import only_values_differ, replay
from lorafx.errors import CaptureError, UsageError
from lorafx.formats.hf import folded_format, hf_model
from lorafx.graph.domain import leaves_of
from lorafx.graph.edit import Edit
from lorafx.passes.dead_channels import DeadChannels
from lorafx.passes.lora import Lora
from lorafx.passes.magnitude import Magnitude
from lorafx.passes.tidy import Tidy
from lorafx.pipeline import to_eval
from lorafx.proof.open import open_runner
from tests import zoo
from tests.small import bert, bert_config, captured, example, gpt2, words


def test_a_merged_adapter_changes_values_alone() -> None:
    program = lorafx.rewrite(zoo.captured("bert"), [Lora()])
    assert only_values_differ(lorafx.fold(program))
    assert not only_values_differ(to_eval(program)), "separate adapters are operators of their own"


def test_other_shapes_are_traced_again() -> None:
    folded = lorafx.fold(zoo.captured("bert"))
    name = next(str(node.target) for node in folded.graph.find_nodes(op="get_attr"))
    narrow = folded.copy()
    Edit(narrow, Tidy()).set_tensor(name, torch.zeros(3, folded.tensor(name).shape[-1]))
    assert only_values_differ(folded)
    assert not only_values_differ(narrow)


def test_a_changed_config_is_traced_again() -> None:
    folded = lorafx.fold(zoo.captured("bert"))
    assert not only_values_differ(dataclasses.replace(folded, config_changes={"tie_word_embeddings": False}))


def test_the_capture_is_no_part_of_the_program_that_is_rewritten() -> None:
    program = zoo.captured("bert")
    assert program.captured is not None
    assert program.captured.graph is not program.graph


def test_a_size_that_the_config_refuses_fits_no_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    """Of three heads two stay: no word of BERT's config says how wide a head is."""
    program = captured(bert, hidden_size=24, num_attention_heads=3)
    closed = lorafx.rewrite(program, [Magnitude(targets="attention.output.dense", keep=0.6)])
    folded = lorafx.fold(closed, gather="never")
    assert folded_format(folded) == "pt2"
    assert "of attention heads (3); fold it with uniform widths" in caplog.text
    with pytest.raises(UsageError, match=r"cannot hold this program: .*not a multiple"):
        hf_model(folded)
    uniform = lorafx.fold(closed, gather="never", removal=DeadChannels(uniform=True))
    with pytest.raises(UsageError, match=r"of attention heads \(3\); export it as onnx or pt2"):
        hf_model(uniform)


def test_a_tied_tensor_stays_tied_in_another_dtype() -> None:
    folded = lorafx.fold(captured(gpt2))
    half = lorafx.capture(gpt2().half(), inputs=example(False))
    again = replay(folded, half)
    head, table = (again.tensor(name) for name in ("lm_head.weight", "transformer.wte.weight"))
    assert head.dtype is torch.float16
    assert head is table


class Mlp(nn.Module):
    """Two linears, with an operator between them that may hold what lies there."""

    def __init__(self, held: bool) -> None:
        super().__init__()
        self.up, self.down, self.held = nn.Linear(4, 6), nn.Linear(6, 3), held
        self.up.weight.data[0] = self.up.bias.data[0] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        return self.down(hidden.sort().values if self.held else hidden)


def test_a_capture_in_which_other_channels_go_is_refused() -> None:
    example = {"x": torch.randn(2, 4)}
    folded = lorafx.fold(lorafx.capture(Mlp(False), inputs=example))
    assert folded.tensor("up.weight").shape == (5, 4)
    with pytest.raises(CaptureError, match=r"up.weight has two shapes, \(6, 4\) and \(5, 4\), .*; export it as pt2"):
        replay(folded, lorafx.capture(Mlp(True), inputs=example))


def test_a_graph_of_what_is_in_bfloat16_is_in_float32_unless_said(tmp_path: Path, caplog: Any) -> None:
    """ONNX Runtime computes no bfloat16 on the CPU, and checkpoints of decoders mostly come in it."""
    program = zoo.captured("bert", dtype=torch.bfloat16)
    result = lorafx.export(program, tmp_path / "onnx")
    assert result is not None
    assert result.ok
    assert "its graph in float32" in caplog.text
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    assert onnx.TensorProto.BFLOAT16 not in {value.data_type for value in graph.initializer}
    with pytest.raises(UsageError, match="no bfloat16 on the CPU; give --dtype float32"):
        lorafx.export(program, tmp_path / "asked", dtype=torch.bfloat16)
    assert not (tmp_path / "asked").exists()


def test_texts_side_by_side_are_captured_compared_and_exported(tmp_path: Path) -> None:
    """Multiple choice: rows of choices, which neither a checkpoint's config nor its tokenizer tells of."""
    torch.manual_seed(0)
    model = hf.BertForMultipleChoice(bert_config()).eval()
    model.save_pretrained(tmp_path / "base")
    program = lorafx.rewrite(lorafx.capture(tmp_path / "base"), [Lora(rank=2)])
    for name in program.names("adapter"):
        nn.init.normal_(program.tensor(name), std=0.1)
    folded = lorafx.fold(program)
    lorafx.export(folded, tmp_path / "merged", "hf")
    lorafx.export(folded, tmp_path / "onnx", "onnx")
    assert lorafx.verify(tmp_path / "merged", tmp_path / "onnx").ok
    assert not lorafx.verify(tmp_path / "base", tmp_path / "onnx").ok
    ids = torch.randint(5, 40, (3, 4, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, :, 5:] = 0
    merged: Any = hf.BertForMultipleChoice.from_pretrained(tmp_path / "merged").eval()
    asked = {name: value for name, value in inputs.items() if name in program.signature.inputs}
    asked |= {"token_type_ids": torch.zeros_like(ids)} if "token_type_ids" in program.signature.inputs else {}
    with torch.no_grad():
        found = program.module().eval()(**asked).logits
        assert found.shape == (3, 4)
        assert torch.allclose(merged(**asked).logits, found, atol=1e-5 * float(found.abs().max()))
    with pytest.raises(UsageError, match="does not learn from a table of texts and labels"):
        lorafx.train(program, {"text": ["w1", "w2"], "label": [0, 1]}, tokenizer=words(), progress=False)


def test_a_graph_of_more_axes_than_inputs_made_up_is_compared_by_its_own(tmp_path: Path) -> None:
    """GPT2DoubleHeads takes texts, too, and is captured on choices."""
    model = hf.GPT2DoubleHeadsModel(gpt2().config).eval()  # type: ignore[operator]
    ids = torch.randint(5, 40, (2, 3, 7))
    folded = lorafx.fold(lorafx.capture(model, inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    lorafx.export(folded, tmp_path / "merged", "hf")
    reopened: Any = hf.GPT2DoubleHeadsModel.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(reopened(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


class Nested(nn.Module):
    """A model that takes a dict of tensors, a pair of them, and one by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 6)

    def forward(self, batch: dict[str, Tensor], pair: list[Tensor], scale: Tensor) -> dict[str, Tensor]:
        return {"y": self.a(batch["x"]) * scale + self.b(batch["z"]) - pair[0] * pair[1]}


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_inputs_within_others_are_exported_and_compared(kind: Any, tmp_path: Path) -> None:
    def given(rows: int, seed: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(seed)
        x, z, *rest = (torch.randn(rows, size, generator=draw) for size in (4, 3, 6, 6, 6))
        return {"batch": {"x": x, "z": z}, "pair": rest[:2], "scale": rest[2]}

    torch.manual_seed(0)
    model = Nested().eval()
    program = lorafx.capture(model, inputs=given(2, 0))
    result = lorafx.export(lorafx.fold(program), tmp_path / "out", kind)
    assert result is not None
    assert {case.inputs for case in result.cases} == {"batch 1", "batch 2", "batch 5"}
    on_given = lorafx.verify(program, tmp_path / "out", inputs=[given(3, 1)], trust_remote_code=True)
    assert on_given.ok
    runner = open_runner(tmp_path / "out", trust_remote_code=True)
    assert [spec.name for spec in runner.inputs] == ["batch['x']", "batch['z']", "pair[0]", "pair[1]", "scale"]
    found = runner(leaves_of(given(3, 1)))["y"]
    torch.testing.assert_close(found, model(**given(3, 1))["y"], rtol=0, atol=1e-6)
