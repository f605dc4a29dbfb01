"""A loop that leaves out a method's part of training is refused at the optimiser's step, whoever wrote it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from lorafx.errors import UsageError
from lorafx.graph.state import MethodState
from lorafx.passes.finegates import Finegates
from lorafx.passes.lora import Lora
from lorafx.passes.prilora import Prilora
from lorafx.passes.rose_lora import RoseLora
from lorafx.passes.salora import Salora
from lorafx.pipeline import rewrite
from lorafx.public import Program
from lorafx.recipes.options import TrainOptions
from lorafx.training.data import prepare
from lorafx.training.trainer import LorafxCallback, Trainer
from tests.small import Notes, adapted, bert, captured, example, largest_difference, learned, table, words


def plainly(program: Program, cls: Any = hf.Trainer, callbacks: Any = None, **arguments: Any) -> hf.Trainer:
    """transformers' own Trainer, which knows of no method."""
    rows = prepare(table(16), program, words(), TrainOptions())
    settings: dict[str, Any] = {
        "max_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
    }
    told = hf.TrainingArguments("unused", save_strategy="no", **{**settings, **arguments})
    return cls(program.module(), told, rows.collator, rows.rows, callbacks=callbacks)


def trained(program: Program) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in program.trainable().items()}


#: Gates at the rate of the rest, for which transformers' optimiser has no groups of its own.
METHODS: dict[str, Any] = {
    "finegates": Finegates(mode="target", gate_rate=5e-5),
    "salora": Salora(rank=4, gate_rate=5e-5),
    "rose-lora": RoseLora(rank=2, start=2.0, end=3.0, density=0.3),
    "prilora": Prilora(rank_first=2, rank_last=2),
}


@pytest.mark.parametrize(("name", "part"), [("finegates", "after"), ("salora", "after"), ("rose-lora", "before")])
def test_transformers_own_trainer_is_refused_where_a_method_acts_around_steps(name: str, part: str) -> None:
    with pytest.raises(UsageError, match=rf"BertFor\w+ is trained without {part}_step\(\), which {name} needs; train"):
        plainly(rewrite(captured(), [METHODS[name]])).train()


def test_nothing_is_changed_by_a_step_that_is_refused() -> None:
    program = rewrite(captured(), [METHODS["prilora"]])
    before = trained(program)
    with pytest.raises(UsageError, match="trained without before_step"):
        plainly(program).train()
    assert largest_difference(before, trained(program)) == 0.0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("split", [1, 2])
def test_with_the_callback_transformers_own_trainer_trains_like_ours(name: str, split: int) -> None:
    """The module's own loss carries the penalty, once a step however the batch is split."""
    losses, values = [], []
    for cls, callbacks in ((hf.Trainer, [LorafxCallback()]), (Trainer, [])):
        program = adapted(method=METHODS[name])
        trainer = plainly(
            program, cls, callbacks, per_device_train_batch_size=16 // split, gradient_accumulation_steps=split
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        values.append(trained(program))
    assert losses[0] == losses[1]
    assert largest_difference(*values) == 0.0


@pytest.mark.parametrize("split", [1, 2])
def test_the_loss_of_a_plain_trainer_has_the_penalty(split: int) -> None:
    program = adapted(method=Notes(rank=2, weight=3.0))
    rows = prepare(table(16), program, words(), TrainOptions())
    model = program.module()
    batch = rows.collator([rows.rows[number] for number in range(16)])
    penalty = model.penalty()
    assert penalty is not None
    expected = (model.eval()(**batch).loss + penalty).item()
    trainer = plainly(
        program, max_steps=1, per_device_train_batch_size=16 // split, gradient_accumulation_steps=split,
        callbacks=[LorafxCallback()],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_has_the_penalty_once() -> None:
    program = adapted(method=Notes(rank=2, weight=3.0))
    model = program.module()
    batch = {**example(True), "labels": torch.tensor([0, 1])}
    first = model.penalty()
    assert first is not None
    assert model(**batch).loss.item() == pytest.approx((model.eval()(**batch).loss + first).item(), rel=1e-5)
    model.train()(**batch)
    assert model.penalty() is None  # it is in the loss
    model(**example(True))
    assert model.penalty() == first  # a loss of one's own is without
    model(**batch)
    assert model.eval().penalty() == first


def test_a_loss_that_is_not_the_models_own_is_no_way_around() -> None:
    program = rewrite(captured(), [Finegates(mode="penalty")])
    with pytest.raises(UsageError, match=r"trained without penalty\(\) in its loss, which finegates needs"):
        plainly(program, label_smoothing_factor=0.1).train()


@dataclass(frozen=True)
class Indifferent(Lora):
    """LoRA with a penalty of None: nothing to leave out."""

    def penalty(self, state: MethodState) -> Tensor | None:
        return None


@pytest.mark.parametrize("method", [Lora(rank=2), Indifferent(rank=2)])
def test_what_has_no_part_in_training_trains_anywhere(method: Lora) -> None:
    program = adapted(method=method)
    before = learned(program)
    plainly(program).train()
    assert largest_difference(before, learned(program)) > 0.0


def loop(program: Program, left_out: str, steps: int = 2) -> None:
    model = program.module()
    model.total_steps = steps
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss = model(**example(True)).logits.square().mean()
        if left_out != "penalty":
            loss = loss + model.penalty()
        loss.backward()
        if left_out != "before_step":
            model.before_step()
        optimizer.step()
        if left_out != "after_step":
            model.after_step()
        optimizer.zero_grad()


@pytest.mark.parametrize("part", ["penalty", "before_step", "after_step"])
def test_a_loop_of_ones_own_is_told_what_it_left_out(part: str) -> None:
    with pytest.raises(UsageError, match=f"trained without {part}.*, which small needs"):
        loop(adapted(method=Notes(rank=2)), part)


def test_a_whole_loop_and_other_models_are_left_alone() -> None:
    program = adapted(method=Notes(rank=2))
    loop(program, "nothing")
    program.module().train()(**example(True))  # a forward that nobody steps on
    other = bert()
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-2)
    other(**example(True), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()


def test_copies_owe_as_much() -> None:
    model = copy.deepcopy(adapted(method=Notes(rank=2)).module())
    model(**example(True), labels=torch.tensor([0, 1])).loss.backward()
    with pytest.raises(UsageError, match="trained without before_step"):
        torch.optim.SGD(model.parameters(), lr=1e-2).step()
