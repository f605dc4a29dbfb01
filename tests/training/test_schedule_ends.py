"""What a method promises holds however training ends: with the best weights, stopped early, or at a moment's notice."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from lorafx.base import Method
from lorafx.graph.state import MethodState
from lorafx.methods.gates import ClampedGaussian, HardConcrete, kept_share
from lorafx.methods.masks import density
from lorafx.methods.steering import Steering
from lorafx.passes.finegates import Finegates
from lorafx.passes.prilora import Prilora
from lorafx.passes.rose_lora import RoseLora
from lorafx.passes.salora import Salora, open_share
from lorafx.public import Program
from lorafx.training import fit as training
from lorafx.training.fit import TrainResult, train
from lorafx.training.metrics import ACCURACY
from tests.methods import state_of
from tests.small import adapted, captured, table, words

#: 48 rows of 8 in a batch: 6 steps an epoch.
OPTIONS: dict[str, Any] = {"progress": False, "batch_size": 8, "learning_rate": 3e-2, "log_steps": 100, "epochs": 8}


def densities(state: MethodState, factor: str) -> float:
    return max(density(site[factor]) for site in state.sites)


#: The share of one of the model's four heads in all that is gated: as near as a budget can come to be met.
HEAD = 4 * 32 * 16 / (2 * (4 * 32 * 32 + 2 * 32 * 48))

#: A method, what is to hold of it at the end, and the first of its steps at which it may be best.
CASES: dict[str, tuple[Method, Callable[[MethodState], bool], int]] = {
    "finegates": (
        Finegates(budget=0.4, ramp=0.5, gate_rate=0.5, multiplier_rate=5.0),
        lambda state: float(kept_share(state)) <= 0.4 + HEAD,
        24,
    ),
    "salora": (
        Salora(rank=8, density=0.3, ramp=0.5, gate_rate=1.0, multiplier_rate=5.0),
        lambda state: open_share(state) <= 0.32,
        24,
    ),
    "rose-lora": (
        RoseLora(rank=3, density=0.1, end=0.5),
        lambda state: densities(state, "lora_A") <= 0.125 and densities(state, "lora_B") <= 0.125,
        24,
    ),
    "prilora": (
        Prilora(rank_first=2, rank_last=4, interval=5, fraction=0.5),
        lambda state: densities(state, "lora_A") == 0.5,
        1,
    ),
}


def fit(program: Program, folder: Path, **options: Any) -> TrainResult:
    return train(
        program, table(48), eval_data=table(24, seed=1), tokenizer=words(), output_dir=folder, **{**OPTIONS, **options}
    )


def state(program: Program) -> MethodState:
    return state_of(program.module())


def check_metrics(program: Program, result: TrainResult) -> None:
    """What a training reports is of the weights it ended with."""
    columns = table(24, seed=1)
    batch = words()(columns["text"], padding=True, return_tensors="pt")
    with torch.no_grad():
        loss = program.module().eval()(**batch, labels=torch.tensor(columns["label"])).loss
    assert result.metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.fixture
def worse_and_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accuracy that every evaluation finds lower than the one before."""
    found = itertools.count()
    worse = dataclasses.replace(ACCURACY, score=lambda predictions, labels: 1 - next(found) / 100)
    monkeypatch.setattr(training, "metric_of", lambda program: worse)


@pytest.mark.usefixtures("worse_and_worse")
@pytest.mark.parametrize("name", CASES)
def test_the_best_weights_are_what_the_method_promises(name: str, tmp_path: Path) -> None:
    method, holds, first = CASES[name]
    program = adapted(captured(), method)
    result = fit(program, tmp_path, keep_best=True)
    assert result.best_step is not None
    assert result.best_step >= first
    assert result.best_step < 48, "else the end of the schedule would do"
    assert holds(state(program))
    check_metrics(program, result)


@pytest.mark.usefixtures("worse_and_worse")
@pytest.mark.parametrize("name", CASES)
def test_early_stopping_waits_for_the_schedule(name: str, tmp_path: Path) -> None:
    method, holds, first = CASES[name]
    program = adapted(captured(), method)
    result = fit(program, tmp_path, callbacks=[hf.EarlyStoppingCallback(1)], trainer={"load_best_model_at_end": False})
    assert first < result.metrics["steps"] < 48
    assert holds(state(program))
    check_metrics(program, result)


class Stop(hf.TrainerCallback):
    """Asks for the end of training for a reason of its own: an evening, say."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == 8


@pytest.mark.parametrize("name", CASES)
def test_a_training_broken_off_is_brought_to_its_end(name: str, tmp_path: Path) -> None:
    method, holds, _ = CASES[name]
    program = adapted(captured(), method)
    result = fit(program, tmp_path, callbacks=[Stop()])
    assert result.metrics["steps"] == 8
    assert holds(state(program))
    check_metrics(program, result)


@pytest.mark.parametrize("rate", [1e-6, 0.5])
def test_a_budget_that_was_missed_is_said(rate: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    program = adapted(captured(), Finegates(budget=0.4, ramp=0.5, gate_rate=rate, multiplier_rate=5.0))
    fit(program, tmp_path)
    missed = float(kept_share(state(program))) > 0.4 + HEAD
    assert missed == (rate == 1e-6)
    assert ("finegates did not get to what it was asked for in 48 steps" in caplog.text) == missed


def test_without_an_evaluation_after_the_schedule_the_last_weights_stay(tmp_path: Path) -> None:
    program = adapted(captured(), RoseLora(rank=3, density=0.1, end=1.0))
    result = fit(program, tmp_path, keep_best=True, save_steps=10)
    assert result.best_step == 48  # the last step is evaluated, whatever save_steps is
    assert densities(state(program), "lora_A") <= 0.125


def test_closing_takes_the_least_open_and_no_more_and_empties_nothing() -> None:
    gates = [torch.tensor([0.1, 0.9, -0.2, -0.9]), torch.tensor([-0.4, -0.45])]
    before = [gate.clone() for gate in gates]
    assert ClampedGaussian.is_open(torch.cat(gates)).tolist() == [True, True, True, False, True, True]
    everything = MethodState((), 8, 8)

    def share() -> float:
        return float(ClampedGaussian.is_open(torch.cat(gates)).float().mean())

    Steering(everything, ClampedGaussian, gates, share, 0.5, 0.0).close()
    assert torch.equal(gates[0], torch.tensor([0.1, 0.9, ClampedGaussian.SHUT, -0.9]))
    assert torch.equal(gates[1], torch.tensor([-0.4, ClampedGaussian.SHUT]))
    Steering(everything, ClampedGaussian, gates, share, 0.01, 0.0).close()
    assert [int(ClampedGaussian.is_open(gate).sum()) for gate in gates] == [1, 1]
    assert gates[0].max() == before[0].max()


@pytest.mark.parametrize("kind", [ClampedGaussian, HardConcrete])
def test_barely_open_and_barely_closed_are_what_they_say(kind: Any) -> None:
    assert kind.is_open(torch.tensor([kind.AJAR, kind.SHUT])).tolist() == [True, False]


def test_nothing_to_close_is_no_error() -> None:
    gates: list[Tensor] = [torch.tensor([1.0])]
    Steering(MethodState((), 1, 1), HardConcrete, gates, lambda: 1.0, 0.5, 0.0).close()
    assert gates[0].tolist() == [1.0]
