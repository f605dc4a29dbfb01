"""Proof by default: fold, rewrite and export hold what they do to the program they were given."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lorafx
from lorafx.base import Pass, Promise
from lorafx.errors import ParityError, UsageError
from lorafx.graph.edit import Edit
from lorafx.graph.precision import recast
from lorafx.graph.program import Program
from lorafx.graph.selection import Selection
from lorafx.graph.tree import named_tensors, put_tensor
from lorafx.parity.answers import Answers, example_batches
from lorafx.parity.promises import VerifyEach
from lorafx.passes.fold_affine import FoldAffine
from lorafx.passes.fold_constants import FoldConstants
from lorafx.passes.lora import Lora
from lorafx.passes.magnitude import Magnitude
from lorafx.pipeline import run, to_eval
from lorafx.proof import exports
from lorafx.proof.exports import held_against
from lorafx.proof.open import open_runner
from tests import zoo
from tests.captures import of_folder
from tests.small import adapted, bert, captured, gpt2, own

aten = torch.ops.aten


@dataclass(frozen=True)
class OnOutput(Pass):
    """Put operators behind the first output, which ``rewritten`` chooses."""

    promise: ClassVar[Promise] = Promise.CLOSE

    def sites(self, program: Program) -> Selection:
        return Selection((program.graph.output_node().all_input_nodes[0],))  # type: ignore[arg-type]

    def rewrite(self, edit: Edit, site: Any) -> None:
        with edit.after(site):
            edit.replace(site, self.rewritten(edit, site))

    def rewritten(self, edit: Edit, value: Any) -> Any:
        return edit.call(aten.mul.Tensor, value, 1.01)


@dataclass(frozen=True)
class WrongAlone(OnOutput):
    """Right for several rows, zero for one."""

    def rewritten(self, edit: Edit, value: Any) -> Any:
        others = edit.call(aten.slice.Tensor, edit.call(aten.ones_like.default, value), 0, 1, 2**63 - 1)
        return edit.call(aten.mul.Tensor, value, edit.call(aten.any.default, others))


@dataclass(frozen=True)
class Noisy(OnOutput):
    """Lose the last bits: right in fp64, coarse in less."""

    def rewritten(self, edit: Edit, value: Any) -> Any:
        return edit.call(aten.sub.Tensor, edit.call(aten.add.Tensor, value, 64.0), 64.0)


@dataclass(frozen=True)
class Quiet(Pass):
    """Take out what :class:`Noisy` put in."""

    def sites(self, program: Program) -> Selection:
        last = program.graph.output_node().all_input_nodes[0]
        return Selection((last,) if last.target is aten.sub.Tensor else ())  # type: ignore[arg-type]

    def rewrite(self, edit: Edit, site: Any) -> None:
        edit.replace(site, site.args[0].args[0])


def doubles_the_classifier(self: Pass, edit: Edit) -> None:
    with torch.no_grad():
        own(edit.program.root, "classifier.weight").mul_(2.0)


# ---- passes


def test_a_broken_promise_is_raised_unless_told_otherwise() -> None:
    with pytest.raises(
        ParityError, match=r"pass 'test-proof' promised close outputs, but logits\[.*mend OnOutput.*--no-check"
    ):
        lorafx.rewrite(captured(bert), [OnOutput()])
    result = lorafx.rewrite(captured(bert), [OnOutput()], check=False)
    assert result.history[-1].proof == "not checked: it was not asked for"
    assert "Promises of test-proof not checked: it was not asked for." in result.report.text()


def test_what_holds_on_two_rows_is_tried_on_one() -> None:
    with pytest.raises(ParityError, match="for inputs the first of the example inputs differs by 1 "):
        run(captured(bert), [WrongAlone()])


def test_fold_names_the_pass_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    program = adapted(captured(bert), Lora(rank=2))
    monkeypatch.setattr(FoldConstants, "finish", doubles_the_classifier)
    with pytest.raises(ParityError, match=r"'fold-constants' promised exact outputs, but logits.* report this model"):
        lorafx.fold(program)


def test_the_program_is_asked_once_after_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    plain = Answers.of

    def counted(program: Program, batches: Any, label: str) -> Answers:
        asked.append(label)
        return plain(program, batches, label)

    program = adapted(captured(bert), Lora(rank=2))
    monkeypatch.setattr(Answers, "of", counted)
    result = run(program, [FoldAffine(), FoldConstants(), Lora(rank=2)])
    assert [applied.proof for applied in result.history[1:]][1] == "it changed nothing"
    assert len(asked) == 1 + 2


def test_without_weights_it_says_so(tmp_path: Path) -> None:
    zoo.build("bert").config.save_pretrained(tmp_path)  # type: ignore[operator, union-attr]
    program = lorafx.rewrite(lorafx.capture(tmp_path, task="text-classification", meta=True), [Lora()])
    assert program.history[-1].proof == "not checked: the program has no weights"
    (step,) = program.report.to_json()["passes"]
    assert step["proof"] == "not checked: the program has no weights"


def test_where_a_weight_lies_in_memory_is_no_broken_promise() -> None:
    """A product of one row rounds by the alignment of its weight, and what trains in full moves in memory."""
    program = captured(gpt2).copy()
    moved: dict[int, nn.Parameter] = {}
    for name, value in list(named_tensors(program.root)):
        if isinstance(value, nn.Parameter):
            odd = torch.empty(value.numel() + 1)[1:].view(value.shape).copy_(value.detach())
            put_tensor(program.root, name, moved.setdefault(id(value), nn.Parameter(odd)))
    result = lorafx.rewrite(program, [Lora(rank=2, trainable=("wte", "c_attn"), targets="c_fc")])
    assert result.history[-1].proof.startswith("equal: largest difference 0 ")


def test_rounding_is_told_from_a_mistake() -> None:
    half = recast(to_eval(captured(bert)), torch.bfloat16)
    noisy = run(half, [Noisy()], check=False)
    quiet = run(noisy, [Quiet()])  # 0.2 of the scale apart, all of it the program's own rounding
    assert "float64" in quiet.history[-1].proof
    with pytest.raises(ParityError, match="promised close outputs"):
        run(half, [Noisy()])  # right in fp64, but it made the program worse
    assert run(recast(half, torch.float64), [Noisy()]).history[-1].proof.startswith("equal")


def test_a_decoder_that_amplifies_rounding_is_folded_and_exported(tmp_path: Path) -> None:
    """Large adapters: in fp32 the program is several tolerances from what it is in fp64, and so is what it folds to."""
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 56}
    config = hf.Qwen3Config(**sizes, **heads, max_position_embeddings=128)
    folder = tmp_path / "base"
    hf.Qwen3ForCausalLM(config).save_pretrained(folder)  # type: ignore[operator]
    program = lorafx.rewrite(lorafx.capture(folder), [Lora(rank=2, alpha=8.0, targets="all-linear")])
    chance = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in program.trainable().values():
            value.add_(torch.randn(value.shape, generator=chance) * 0.3)
    folded = lorafx.fold(program)
    (proof,) = (applied.proof for applied in folded.history if applied.step.pass_name() == "fold-affine")
    assert "float64" in proof, "else this decoder shows nothing"
    result = lorafx.export(folded, tmp_path / "out", "hf")
    assert result is not None
    assert result.ok
    assert 1e-5 < result.max_rel < result.tolerance, "beyond the tolerance of fp32, within its own rounding"


def test_nan_in_the_same_places_is_no_difference() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x).log()

    torch.manual_seed(0)
    program = lorafx.capture(Root(), inputs={"x": torch.randn(4, 3)})
    outputs = Answers.of(program, example_batches(program), "it").outcomes[0]
    assert isinstance(outputs, dict)
    assert outputs["output"].isnan().any()
    assert lorafx.fold(lorafx.rewrite(program, [Lora(rank=1)])).history[-1].proof


# ---- exports


@pytest.mark.parametrize("kind", ["onnx", "hf", "pt2"])
def test_an_export_is_compared_with_the_trained_program(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = adapted(captured(bert), Lora(rank=2))
    with monkeypatch.context() as patched:
        patched.setattr(FoldConstants, "finish", doubles_the_classifier)
        folded = lorafx.fold(program, check=False)
    with pytest.raises(ParityError, match=f"{kind} export differs from the program: logits"):
        lorafx.export(folded, tmp_path / "out", kind)
    assert not list(tmp_path.iterdir())


def test_what_was_closed_after_folding_is_meant(tmp_path: Path) -> None:
    folded = lorafx.fold(adapted(captured(bert), Lora(rank=2)))
    closed = lorafx.rewrite(folded, [Magnitude(targets="role:ffn.down", keep=0.5)])
    result = lorafx.export(closed, tmp_path / "out", "pt2")
    assert result is not None
    assert result.ok
    assert not lorafx.verify(folded, closed).ok


def test_the_report_of_an_export_holds_what_was_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    program = adapted(captured(gpt2), Lora(rank=2))
    result = lorafx.export(program, tmp_path / "a", "pt2")
    assert result is not None
    assert {case.inputs for case in result.cases} >= {"1x1", "1x32"}, "both ends of what the model takes"
    assert json.loads((tmp_path / "a" / "report.json").read_text())["sections"]["parity"]["summary"] == result.summary
    with caplog.at_level(logging.WARNING):
        assert lorafx.export(program, tmp_path / "b", "pt2", check=False) is None
    said = json.loads((tmp_path / "b" / "report.json").read_text())["sections"]["parity"]
    assert said["ok"] is None
    assert said["summary"] == "not compared with the program: it was not asked for"
    assert said["summary"] in caplog.text


def test_the_end_that_is_too_far_is_named() -> None:
    program = captured(gpt2, n_positions=600)
    result = lorafx.verify(program, program)
    assert "1x512" in {case.inputs for case in result.cases}
    assert "compared on texts of up to 512 of the 600 tokens that the models take" in result.notes


def test_random_values_are_not_exported(tiny_checkpoint: Path, tmp_path: Path) -> None:
    base = of_folder(tiny_checkpoint, task="text-classification", num_labels=3)
    untrained = lorafx.rewrite(base, [Lora(rank=2)])
    for number, program in enumerate((base, untrained, lorafx.fold(untrained))):
        with pytest.raises(UsageError, match=r"no file holds classifier.bias and nothing was trained"):
            lorafx.export(program, tmp_path / str(number), "pt2")
    with torch.no_grad():
        for value in untrained.trainable().values():
            value.add_(0.1)
    assert lorafx.export(untrained, tmp_path / "trained", "pt2")
    assert lorafx.export(base, tmp_path / "meant", "pt2", check=False) is None
    assert not list(tmp_path.glob("[0-9]"))


def test_verify_each_is_not_done_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Pass] = []
    monkeypatch.setattr(VerifyEach, "after", lambda self, program, step, previous: seen.append(step))
    run(captured(bert), [Lora(rank=2)], [VerifyEach()])
    assert len(seen) == 1


# ---- an export against a program that rounds


class Rounds(nn.Module):
    """``share`` of the input goes through fp16, and comes out ``off`` by as much of itself."""

    def __init__(self, share: float, off: float = 0.0):
        super().__init__()
        self.share, self.off = share, off

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.0 - self.share + self.off) + self.share * x.half().float()


def rounding(share: float, off: float = 0.0) -> lorafx.Program:
    x = torch.linspace(-1.0, 1.0, 400).reshape(8, 50)
    return lorafx.capture(Rounds(share, off), inputs={"x": x})


@pytest.mark.parametrize(
    ("share", "off", "ok"),
    [(0.075, 0.0, True), (0.3, 0.0, True), (1.0, 0.0, False), (0.0, 1.5e-5, False), (0.3, 2e-4, False)],
)
def test_a_difference_no_larger_than_the_programs_own_is_accepted(share: float, off: float, ok: bool) -> None:
    reference, exact = rounding(share), rounding(0.0, off)
    inputs = [{"x": torch.linspace(-1.0, 1.0, 4000).reshape(80, 50)}]
    assert not lorafx.verify(reference, exact, inputs=inputs).ok
    result = held_against(reference, exact, inputs=inputs)
    assert result.ok is ok
    assert any("in fp64" in note for note in result.notes) is (share < 1.0 and off < 1e-4), (
        "looked at, unless it is far too much"
    )


@pytest.mark.parametrize("by_block", [False, True])
def test_how_precise_a_large_model_is_is_asked_of_its_example_alone(
    by_block: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def noted(*sides: Any, **options: Any) -> Any:
        asked.append("inputs" in options)
        found = lorafx.verify(*sides, **options)
        return dataclasses.replace(found, tolerance=0.0) if len(asked) == 1 else found  # fp32 differs from fp64

    monkeypatch.setattr(exports, "verify", noted)
    program = captured(gpt2)
    exact = open_runner(program, dtype=torch.float64)
    result = held_against(program, exact, by_block=by_block)
    assert asked[:2] == [False, by_block]
    assert any("in fp64" in note for note in result.notes)
