"""Fold and export, killed at random moments: what is left is whole or refused, and gone on with where that is meant.

``LORAFX_KILLS`` sets the number of tries of each command (the release check uses 50).
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lorafx.cli import main
from lorafx.editing.patch import make
from lorafx.editing.patch_folder import slots
from tests import small
from tests.kill_nine import command, kill_and_resume, kill_nine, write_shards

TRIES = int(os.environ.get("LORAFX_KILLS", "4"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    import lorafx
    from lorafx.passes.lora import Lora

    folder = tmp_path_factory.mktemp("runs") / "run"
    program = lorafx.capture(tiny_checkpoint, task="text-classification", num_labels=2)
    lorafx.rewrite(program, [Lora(rank=4)]).save(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("words", ["fold", "fold --stream", "export"])
def test_a_killed_command_leaves_nothing_that_passes_for_whole(words: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    kills = kill_nine(command(*words.split(), run, "-o", out, "--overwrite"), out, TRIES)
    assert kills.killed > 0
    if words != "export":  # gone on with after a kill or not, streamed or not, it is the same checkpoint
        fold = ["fold", str(run), "-o", str(tmp_path / "undisturbed")]
        assert CliRunner().invoke(main, fold).exit_code == 0
        ours, theirs = (tmp_path / side for side in ("killed", "undisturbed"))
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
        assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}


@pytest.mark.slow
def test_killed_streaming_goes_on_at_the_last_whole_file(tmp_path: Path) -> None:
    tries = max(TRIES, 10)
    found = kill_and_resume(partial(write_shards, tmp_path / "out"), tmp_path / "out", tries)
    assert found.killed == tries
    assert found.kept > 0


@pytest.mark.slow
def test_a_killed_patch_goes_on_at_the_last_whole_file(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model: Any = small.llama(num_hidden_layers=6)
    model.save_pretrained(base, max_shard_size="20KB")
    held = {name: slot.read() for name, slot in slots(base).items() if name.endswith("proj.weight")}
    make(held, {name: value * 1.5 for name, value in held.items()}).save(tmp_path / "patch.safetensors")
    apply = command("patch", "apply", base, tmp_path / "patch.safetensors", "-o", tmp_path / "out", "--overwrite")
    found = kill_and_resume(apply, tmp_path / "out", max(TRIES, 10))
    assert found.kept > 0
