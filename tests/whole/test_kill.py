"""Fold and export, killed at random moments: what is left is whole or refused.

``LORAFX_KILLS`` sets the number of tries of each command (the release check uses 50).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kill_nine import kill_nine

TRIES = int(os.environ.get("LORAFX_KILLS", "4"))
LORAFX = [sys.executable, "-W", "ignore", "-m", "lorafx.cli"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    import lorafx
    from lorafx.passes.lora import Lora

    folder = tmp_path_factory.mktemp("runs") / "run"
    program = lorafx.capture(tiny_checkpoint, task="text-classification", num_labels=2)
    lorafx.rewrite(program, [Lora(rank=4)]).save(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fold", "fold --stream", "export"])
def test_a_killed_command_leaves_nothing_that_passes_for_whole(command: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    kills = kill_nine([*LORAFX, *command.split(), str(run), "-o", str(out), "--overwrite"], out, TRIES)
    assert kills.killed > 0
    if command != "export":  # gone on with after a kill or not, streamed or not, it is the same checkpoint
        subprocess.run([*LORAFX, "fold", str(run), "-o", str(tmp_path / "undisturbed")], check=True)
        ours, theirs = (tmp_path / side / "model.safetensors" for side in ("killed", "undisturbed"))
        assert ours.read_bytes() == theirs.read_bytes()
