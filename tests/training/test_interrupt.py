"""An interrupted training has saved once, and goes on from there as if it had not been interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from transformers import TrainerCallback

from lorafx.cli import main
from lorafx.public import Program
from lorafx.training.fit import train
from lorafx.training.interrupt import SaveOnInterrupt
from lorafx.training.trainer import last_checkpoint
from tests.small import adapted, bert, learned, table, words

OPTIONS: dict[str, Any] = {"max_steps": 6, "batch_size": 8, "learning_rate": 5e-3, "progress": False}


class InterruptAt(TrainerCallback):
    """Sends this process a signal while a step is under way."""

    def __init__(self, step: int, number: int = signal.SIGINT, times: int = 1):
        self.step, self.number, self.times = step, number, times

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_pre_optimizer_step(args, state, control)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """What a shell starts in the background ignores interrupts, and so would everything here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def go(program: Program, folder: Path | None, *callbacks: TrainerCallback, **options: Any) -> None:
    train(program, table(), tokenizer=words(), output_dir=folder, callbacks=callbacks, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    """What an uninterrupted training learns."""
    program = adapted()
    go(program, None)
    return learned(program)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_once_and_training_goes_on_from_there(
    number: int, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="step 3 is saved in"):
        go(adapted(), tmp_path / "checkpoints", InterruptAt(3, number))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert last_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-3"
    again = adapted(seed=5)
    go(again, tmp_path / "checkpoints", resume=True)
    assert all(torch.equal(value, learned(again)[name]) for name, value in whole.items())


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        go(adapted(), tmp_path / "checkpoints", InterruptAt(3, times=2))
    assert str(caught.value) == ""
    assert not (tmp_path / "checkpoints").exists()


def test_without_a_folder_to_keep_it_in_an_interrupt_is_what_it_was() -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        go(adapted(), None, InterruptAt(3))
    assert str(caught.value) == ""


def test_an_interrupt_during_an_evaluation_saves_after_it() -> None:
    from types import SimpleNamespace

    callback, control = SaveOnInterrupt(), SimpleNamespace(should_save=False)
    callback.on_evaluate(None, None, control)
    assert not control.should_save
    callback.ask()
    callback.on_evaluate(None, None, control)
    assert control.should_save


def test_checkpoints_of_others_are_refused_and_kept(tmp_path: Path) -> None:
    """The Trainer keeps two and removes the oldest of what is called so."""
    from lorafx.errors import UsageError

    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_text("weeks of work")
    with pytest.raises(UsageError, match="checkpoint-1: left by an earlier training"):
        go(adapted(), tmp_path, save_steps=2)
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()


SCRIPT = """
import os, signal, sys
from lorafx.training import fit
from transformers import TrainerCallback
class Interrupt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
train = fit.train
fit.train = lambda *a, **k: train(*a, callbacks=[Interrupt()], **k)
from lorafx.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_the_command_line_goes_on_where_it_was(tmp_path: Path, tiny_table: Path) -> None:
    import lorafx
    from lorafx.passes.lora import Lora

    bert().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    words().save_pretrained(tmp_path / "base")
    lorafx.rewrite(lorafx.capture(tmp_path / "base"), [Lora(rank=2)]).save(tmp_path / "run")
    before = (tmp_path / "run" / "lorafx.json").read_bytes()
    command = ["train", str(tmp_path / "run"), "--data", str(tiny_table), "--max-steps", "4"]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "lorafx: error: interrupted; step 2 is saved in" in done.stderr
    assert (tmp_path / "run" / "lorafx.json").read_bytes() == before
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 2
    assert "resume it" in again.output
    again = CliRunner().invoke(main, [*command, "--resume"])
    assert again.exit_code == 0, again.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]
