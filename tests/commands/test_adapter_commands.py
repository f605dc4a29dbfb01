"""``--adapter`` on the command line: a checkpoint and an adapter that PEFT made, folded, verified and trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lorafx.cli import main
from lorafx.files.folder import read_manifest
from tests import foreign, zoo


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and an adapter of it."""
    return foreign.base_and_adapter(tmp_path_factory.mktemp("adapter"), ["query", "dense"])


def test_folded_streamed_and_trained_on(place: Path) -> None:
    result = call("fold", place / "base", "--adapter", place / "adapter", "-o", place / "out")
    assert result.exit_code == 0, result.output
    import peft
    from transformers import BertForSequenceClassification

    base = BertForSequenceClassification.from_pretrained(place / "base")
    theirs: Any = peft.PeftModel.from_pretrained(base, place / "adapter").eval()
    inputs = zoo.ZOO["bert"].inputs(3, 6)
    ours = BertForSequenceClassification.from_pretrained(place / "out").eval()
    assert zoo.distance(foreign.answers(theirs, inputs), zoo.eager(ours, inputs)) < 1e-5
    result = call("fold", place / "base", "--adapter", place / "adapter", "--stream", "-o", place / "streamed")
    assert result.exit_code == 0, result.output
    same = [(place / name / "model.safetensors").read_bytes() for name in ("out", "streamed")]
    assert same[0] == same[1]
    result = call("rewrite", place / "base", "--adapter", place / "adapter", "-o", place / "run")
    assert result.exit_code == 0, result.output
    result = call("verify", place / "run", place / "out")
    assert result.exit_code == 0, result.output
    again: Any = peft.PeftModel.from_pretrained(type(base).from_pretrained(place / "base"), place / "run").eval()
    assert zoo.distance(foreign.answers(theirs, inputs), foreign.answers(again, inputs)) < 1e-6
    assert read_manifest(place / "run").meta["peft"] == "adapter_config.json"


def test_verify_with_an_adapter(place: Path, tmp_path: Path) -> None:
    half = {**foreign.R, "target_modules": ["query"]}
    foreign.save(foreign.adapted(zoo.build("bert"), half), tmp_path / "adapter")
    adapter = ("--adapter", f"{tmp_path / 'adapter'}=0.5")
    result = call("fold", place / "base", *adapter, "-o", tmp_path / "out", "--no-check")
    assert result.exit_code == 0, result.output
    assert call("verify", place / "base", tmp_path / "out", *adapter).exit_code == 0
    assert call("verify", place / "base", tmp_path / "out", "--adapter", tmp_path / "adapter").exit_code == 4


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["nowhere"], 5, "nowhere: no adapter_config.json"),
        (["adapter=much"], 2, "'much' is not a weight; write FOLDER or FOLDER=0.5"),
        (["adapter", "adapter=2"], 2, "was given twice"),
    ],
)
def test_one_line_each(place: Path, given: list[str], code: int, message: str) -> None:
    options = [text for one in given for text in ("--adapter", str(place / one))]
    result = call("fold", place / "base", *options, "-o", place / "never")
    assert result.exit_code == code
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("lorafx: error: ")
    assert message in line
    assert not (place / "never").exists()
