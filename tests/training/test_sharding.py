"""Training with tensors split over two processes (FSDP2), block by block, beside one process with the whole batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorafx
from lorafx.errors import UsageError
from lorafx.training.fit import train
from lorafx.training.sharding import average
from lorafx.training.trainer import STATE
from tests import fsdp_worker as worker
from tests.processes import run_together
from tests.small import learned, table, words

pytestmark = pytest.mark.slow

#: Sums in another order, fp32: of a loss near 1 within a few ulps a layer, of weights after steps of AdamW at 1e-2.
LOSS, WEIGHTS = 1e-5, 1e-5


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes of one group ended with (see fsdp_worker)."""
    return run_together("tests.fsdp_worker", tmp_path_factory.mktemp("fsdp"))


def ranks_of(folder: Path, name: str) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2)]


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Equal but for rounding; what is zero, and so every mask, is the same."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value == 0, second[name] == 0), name
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=WEIGHTS)


@pytest.mark.parametrize("recipe", worker.LOOPS)
def test_split_over_two_processes_trains_like_one(two_processes: Path, recipe: str) -> None:
    first, second = ranks_of(two_processes, recipe)
    assert all(torch.equal(first[name], second[name]) for name in first)
    program = worker.started(recipe)
    before = learned(program)
    model = program.module()
    losses = worker.loop(model, worker.everyone)
    seen = [json.loads((two_processes / f"{recipe}-{rank}.json").read_text()) for rank in range(2)]
    together = [(one + other) / 2 for one, other in zip(*seen, strict=True)]
    assert together == pytest.approx(losses, rel=0, abs=LOSS)
    assert any(abs(one - other) > 1e-3 for one, other in zip(*seen, strict=True)), "processes see rows of their own"
    with torch.no_grad():
        logits = model.eval()(**worker.rows_of(9, 0, 0)).logits
    assert_same(first, {**learned(program), "logits": logits})
    assert any(not torch.equal(before[name], first[name]) for name in before)


@pytest.mark.parametrize("name", worker.FAMILIES)
def test_blocks_of_other_shapes_train_alike(two_processes: Path, name: str) -> None:
    first, second = ranks_of(two_processes, name)
    program = worker.family_program(name)
    losses = worker.family_loop(program.module(), None)
    together = (first.pop("losses") + second.pop("losses")) / 2
    assert together.tolist() == pytest.approx(losses, rel=0, abs=LOSS)
    assert losses[0] != losses[1]
    assert_same(first, learned(program))


@pytest.mark.parametrize("recipe", worker.TRAINED)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_saved_on_two_processes_resumes_on_one(two_processes: Path, kind: str, recipe: str, tmp_path: Path) -> None:
    first, second = ranks_of(two_processes, f"{kind}-{recipe}")
    assert all(torch.equal(first[name], second[name]) for name in first)
    saved = two_processes / f"{kind}-{recipe}" / f"checkpoint-{worker.SAVED}"
    stored = load_file(saved / STATE)
    program = worker.started(recipe, seed=2)
    assert stored.keys() == {*program.learned(), "clock"}
    assert any(not torch.equal(stored[name], value) for name, value in first.items()), "training went on after it"
    options: dict[str, Any] = {**worker.OPTIONS, "batch_size": 16, "resume": saved}
    rows = {"eval_data": table(worker.HELD_OUT, seed=1), "tokenizer": words(), "output_dir": tmp_path}
    result = train(program, table(worker.ROWS), **rows, **options)
    assert_same(first, learned(program))
    seen = json.loads((two_processes / f"{kind}-{recipe}-0.json").read_text())
    assert result.metrics["eval_loss"] == pytest.approx(seen["metrics"]["eval_loss"], rel=0, abs=LOSS)
    assert result.metrics["eval_accuracy"] == seen["metrics"]["eval_accuracy"]


def test_split_training_is_split_and_reports_the_losses_of_the_whole(two_processes: Path) -> None:
    for recipe in worker.TRAINED:
        alone = worker.started(recipe)
        rows = {"eval_data": table(worker.HELD_OUT, seed=1), "tokenizer": words()}
        options = {**worker.OPTIONS, "batch_size": 16, "save_steps": 0}
        history = train(alone, table(worker.ROWS), **rows, **options).history
        expected = [entry["loss"] for entry in history if "loss" in entry]
        for kind in ("ddp", "fsdp"):
            history = json.loads((two_processes / f"{kind}-{recipe}-0.json").read_text())["history"]
            assert [entry["loss"] for entry in history if "loss" in entry] == pytest.approx(expected, rel=0, abs=LOSS)


# ---- one process


def test_a_model_whose_blocks_are_modules_computes_and_checkpoints_the_same() -> None:
    program = worker.started("lora")
    plain, split = program.module(), program.module()
    names = [name for name, _ in split.named_parameters()]
    assert [type(block).__name__ for block in split.blocks()] == ["Block", "Block"]
    assert [name for name, _ in split.named_parameters()] == names
    inputs = worker.everyone(0, 0)
    expected = plain(**inputs).loss
    for checkpointing in (False, True):
        split.checkpointing = checkpointing
        loss = split(**inputs).loss
        assert torch.equal(loss, expected)
        loss.backward()
    assert all(value.grad is None for value in program.trainable().values()), "the program's tensors are not trained"


def test_a_block_that_others_read_stays_with_the_root() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
            self.layers[2].weight = self.layers[0].weight

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = lorafx.capture(Tied(), inputs={"x": torch.ones(2, 3, 4)}).module()
    model.blocks()
    assert model.units is not None
    assert list(model.units) == ["layers.1", "layers.3"]


def test_a_single_number_cannot_be_split() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4)])
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x) * self.scale

    model = lorafx.capture(Scaled(), inputs={"x": torch.ones(2, 3, 4)}).module()
    with pytest.raises(UsageError, match="scale is a single number, which FSDP2 does not split; train with DDP"):
        model.blocks()


def test_statistics_are_averaged_in_one_message_a_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[torch.dtype, int]] = []

    def all_reduce(value: Tensor) -> None:
        sent.append((value.dtype, value.numel()))
        value.mul_(2).add_(2)  # another process, whose values are larger by two

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    values = [torch.ones(3), torch.zeros(2, 2), torch.ones(2, dtype=torch.bool), torch.ones((), dtype=torch.float64)]
    average(values)
    assert sent == [(torch.float32, 7), (torch.float64, 1)]
    assert [value.double().unique().tolist() for value in values] == [[2.0], [1.0], [1.0], [2.0]]
