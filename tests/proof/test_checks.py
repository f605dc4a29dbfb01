"""What of a checkpoint is compared can be named; each closer or wider check says what it was and finds what it must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import lorafx
from lorafx.backends import writing
from lorafx.cli import main
from lorafx.commands.shared import check_of
from lorafx.errors import ParityError, UsageError
from lorafx.passes.lora import Lora
from lorafx.proof.checkpoint import CHECKS, Check
from lorafx.public import Program
from tests.small import adapted, captured, llama

WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def decoder() -> Program:
    return adapted(captured(llama), Lora(rank=2, targets="all-linear"))


@pytest.fixture(scope="module", params=[False, True], ids=["memory", "stream"])
def folded(decoder: Program, request: pytest.FixtureRequest) -> Program:
    return lorafx.fold(decoder, gather="never", stream=request.param)


@pytest.mark.parametrize("check", CHECKS)
def test_what_was_checked_is_what_was_asked_for(folded: Program, check: Check, tmp_path: Path) -> None:
    result = lorafx.export(folded, tmp_path / "out", "hf", check=check)
    assert result is not None
    assert (result.ok, result.checked) == (True, check)
    told = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["sections"]["parity"]
    assert (told["checked"], told["summary"]) == (check, result.summary)
    assert any("of the last place" in note for note in told["notes"]) == (check != "full")
    assert any(note.startswith("2 blocks, each") for note in told["notes"]) == (check == "blocks")
    names = {case.output for case in result.cases}
    assert (WEIGHT in names) == (check == "tensors")
    assert ("logits" in names) == (check == "full")


def test_weights_that_stream_are_compared_in_blocks_unless_told_otherwise(folded: Program, tmp_path: Path) -> None:
    result = lorafx.export(folded, tmp_path / "out", "hf")
    assert result is not None
    streamed = any("written" in applied.proof for applied in folded.history)
    assert result.checked == ("blocks" if streamed else "full")


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_finds_two_rows_that_changed_places(
    folded: Program, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = writing.write_checkpoint

    def spoiled(model: Any, folder: Path) -> dict[str, Any]:
        plain(model, folder)
        held = load_file(folder / "model.safetensors")
        held[WEIGHT][[3, 4]] = held[WEIGHT][[4, 3]]
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return {}

    monkeypatch.setattr(writing, "write_checkpoint", spoiled)
    with pytest.raises(ParityError, match="logits" if check == "full" else WEIGHT):
        lorafx.export(folded, tmp_path / "out", "hf", check=check)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("onnx", {"check": "tensors"}, r"tensors are compared in a checkpoint \(hf\), not in onnx; give --check full"),
        ("pt2", {"check": "blocks"}, r"blocks are compared in a checkpoint \(hf\), not in pt2"),
        ("hf", {"check": "blocks", "dtype": torch.float16}, "another dtype rounds every weight, so blocks differ"),
        ("hf", {"check": "most"}, "cannot check 'most'; what can be checked: tensors, blocks, full"),
    ],
)
def test_a_check_that_cannot_be_is_refused(
    decoder: Program, kind: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        lorafx.export(decoder, tmp_path / "out", kind, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["fold", "--check", "tensors", "--no-check"], "--check and --no-check are opposites"),
        (["export", "--check", "tensors"], "tensors are compared in a checkpoint (hf), not in onnx"),
        (["fold", "--check=parts"], "is not one of 'auto', 'tensors', 'blocks', 'full'"),
    ],
)
def test_the_command_line_says_so_too(flags: list[str], message: str, tmp_path: Path) -> None:
    command, *rest = flags
    result = CliRunner().invoke(main, [command, str(tmp_path / "none"), "-o", str(tmp_path / "out"), *rest])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_flag_without_a_value_is_the_default() -> None:
    given = [
        {"no_check": False, "check": None},
        {"no_check": False, "check": "auto"},
        {"no_check": True, "check": None},
    ]
    assert [check_of(one) for one in given] == [True, True, False]


def test_the_command_line_passes_it_on(decoder: Program, tmp_path: Path) -> None:
    model: Any = decoder.source.model
    model.save_pretrained(tmp_path / "base")
    adapted(lorafx.capture(tmp_path / "base"), Lora(rank=2, targets="all-linear")).save(tmp_path / "run")
    words = ["fold", str(tmp_path / "run"), "-o", str(tmp_path / "out"), "--stream", "--json", "--check", "tensors"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sections"]["parity"]["checked"] == "tensors"
