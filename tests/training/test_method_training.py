"""Training by every method: resumed, saved, accumulated, in bf16, recomputed, in two processes; optimiser groups."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

import lorafx
from lorafx.base import Pass
from lorafx.passes.finegates import Finegates
from lorafx.passes.prilora import Prilora
from lorafx.passes.rose_lora import RoseLora
from lorafx.passes.salora import Salora
from lorafx.passes.tied_lora import TiedLora
from lorafx.public import Program
from lorafx.training.fit import train
from lorafx.training.module import RewrittenModel
from lorafx.training.trainer import STATE, Trainer
from tests import method_ddp_worker as worker
from tests.method_ddp_worker import started
from tests.methods import NOISELESS, RECIPES, state_of, stirred
from tests.processes import run_together
from tests.small import bert, captured, largest_difference, learned, table, words

#: Rounding of sums in another order, after a few steps of AdamW at this learning rate on fp32 parameters of size 0.1.
ROUNDING = 1e-5
FAST: dict[str, Any] = {"progress": False, "batch_size": 8, "max_steps": 6, "learning_rate": 1e-2, "log_steps": 1}

every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def fit(program: Program, **options: Any) -> Any:
    return train(program, table(64), tokenizer=words(), **{**FAST, **options})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """A tiny BERT captured from a folder; rewrites of it can be saved."""
    folder = tmp_path_factory.mktemp("checkpoints") / "bert"
    torch.manual_seed(0)
    bert().save_pretrained(folder)  # type: ignore[operator]
    return lorafx.capture(folder)


def logits(program: Program) -> Tensor:
    batch = words()(table(16, seed=3)["text"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return program.module().eval()(**batch).logits


# ---- resuming and saving


class Stop(TrainerCallback):
    """Breaks off training after a number of steps, as a kill would."""

    def __init__(self, after: int):
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


@every_recipe
def test_resumed_equals_uninterrupted_bit_by_bit(recipe: str, tmp_path: Path) -> None:
    # Saved at step 3: between two prunings, in the middle of every schedule.
    whole, broken, resumed = started(recipe), started(recipe), started(recipe, seed=2)
    options: dict[str, Any] = {"save_steps": 3, "accumulate": 2, "batch_size": 4}
    fit(whole, output_dir=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, output_dir=tmp_path / "broken", callbacks=[Stop(4)], **options)
    assert any(not torch.equal(value, resumed.learned()[name]) for name, value in learned(broken).items())
    fit(resumed, output_dir=tmp_path / "broken", resume=True, **options)
    assert largest_difference(learned(whole), learned(resumed)) == 0.0
    stored = load_file(tmp_path / "broken" / "checkpoint-3" / STATE)
    assert stored.keys() == {*whole.learned(), "clock"}, "all state is in the checkpoint"
    assert any(not torch.equal(stored[name], value) for name, value in whole.learned().items())


@every_recipe
def test_a_trained_run_is_loaded_as_it_was_saved(recipe: str, base: Program, tmp_path: Path) -> None:
    program = stirred(lorafx.rewrite(base, RECIPES[recipe]))
    program.save(tmp_path / "run")
    again = lorafx.load(tmp_path / "run")
    assert torch.equal(logits(again), logits(program))
    assert largest_difference(learned(again), learned(program)) == 0.0
    assert [applied.step for applied in again.history] == list(RECIPES[recipe])
    if "tied" in recipe:
        before, after = (sharing(program.module()) for program in (program, again))
        assert before == after
        assert len(set(before)) < len(before)


def sharing(model: RewrittenModel) -> list[int]:
    """For each of Tied-LoRA's tensors at each module, the place of the first with the same storage."""
    shorts = ("lora_A", "lora_B", "lora_u", "lora_v")
    pointers = [site[short].data_ptr() for site in state_of(model, 0).sites for short in shorts]
    return [pointers.index(pointer) for pointer in pointers]


def test_peft_opens_ranks_of_every_depth_and_masks(base: Program, tmp_path: Path) -> None:
    import peft

    for recipe in ("prilora", "rose-lora", "prilora + rose-lora"):
        program = stirred(lorafx.rewrite(base, RECIPES[recipe]))
        program.save(tmp_path / recipe)
        model: Any = type(base.source.model).from_pretrained(str(base.source.path))  # type: ignore[attr-defined]
        opened: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / recipe))
        inputs = worker.rows_of(0, 0, 0)
        inputs.pop("labels")
        with torch.no_grad():
            ours, theirs = program.module().eval()(**inputs).logits, opened.eval()(**inputs).logits
        # The same operators in another order of scaling: rounding of fp32, a few ulps of the largest logit.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))


# ---- precision


@every_recipe
def test_bf16_autocast_trains_and_what_is_learned_stays_fp32(recipe: str) -> None:
    program = started(recipe)
    before = learned(program)
    result = fit(program, bf16=True, max_steps=4)
    assert math.isfinite(result.metrics["train_loss"])
    moved = set()
    for name, value in program.learned().items():
        role = program.roles[name]
        assert value.dtype == before[name].dtype
        if role in ("adapter", "gate"):
            assert value.dtype == torch.float32
        assert not value.is_floating_point() or bool(value.isfinite().all())
        moved |= {role} if not torch.equal(value, before[name]) else set()
    assert {program.roles[name] for name in program.names("adapter", "gate")} <= moved


# ---- accumulation and clipping


@pytest.mark.parametrize("recipe", NOISELESS)
def test_two_half_batches_are_one_batch(recipe: str) -> None:
    programs = []
    for split in ({"batch_size": 16}, {"batch_size": 8, "accumulate": 2}):
        program = started(recipe)
        fit(program, max_grad_norm=0.05, **split)
        programs.append(program)
    first, second = map(learned, programs)
    assert_same_training(first, second)


def test_clipping_does_something() -> None:
    clipped, unclipped = started("tied-lora"), started("tied-lora")
    fit(clipped, max_grad_norm=0.05)
    fit(unclipped, max_grad_norm=0.0)
    assert largest_difference(learned(clipped), learned(unclipped)) > 1e-3


def assert_same_training(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Equal but for rounding; what is zero, and so every mask, is the same."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value == 0, second[name] == 0), name
        if value.is_floating_point():
            torch.testing.assert_close(value, second[name], rtol=1e-4, atol=ROUNDING)


# ---- activation checkpointing


@pytest.mark.parametrize("recipe", ["prilora", "salora + finegates"])
def test_recomputing_activations_trains_the_same(recipe: str) -> None:
    plain, recomputed = started(recipe), started(recipe)
    fit(plain, max_steps=3)
    fit(recomputed, max_steps=3, checkpointing=True)
    assert largest_difference(learned(plain), learned(recomputed)) == 0.0  # the same operators, the same noise


# ---- optimiser


def arguments(folder: Path, **changes: Any) -> hf.TrainingArguments:
    plain: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    return hf.TrainingArguments(str(folder), **{**plain, "learning_rate": 1e-3, "weight_decay": 0.1, **changes})


def settings_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    names = {id(value): name for name, value in model.named_parameters()}
    found = {
        names[id(value)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for value in group["params"]
    }
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups), "each once"
    assert found.keys() == {name for name, value in model.named_parameters() if value.requires_grad}
    return found


def wanted(name: str, bias: float) -> tuple[float, float]:
    """Learning rate and decay by the last part of a parameter's name; ``bias`` is the decay of biases."""
    short = name.rpartition(".")[2]
    if short == "lora_gate":
        return (Salora().gate_rate, 0.0)
    if short in ("gate", "gate_in", "gate_out"):
        return (Finegates().gate_rate, 0.0)
    return (1e-3, 0.0 if short in ("lora_u", "lora_v") else bias if short == "bias" else 0.1)


@every_recipe
def test_gates_have_a_rate_of_their_own_and_scalings_no_decay(recipe: str, tmp_path: Path) -> None:
    model = started(recipe).module()
    loop = torch.optim.AdamW(model.parameter_groups(lr=1e-3, weight_decay=0.1))
    for name, found in settings_by_name(model, loop).items():
        assert found == wanted(name, 0.1), name
    trainer = Trainer(model, arguments(tmp_path))
    for name, found in settings_by_name(model, trainer.create_optimizer()).items():
        assert found == wanted(name, 0.0), name


def test_rates_are_options(tmp_path: Path) -> None:
    torch.manual_seed(1)
    passes = (Salora(rank=2, gate_rate=0.7), Finegates(gate_rate=0.3, couple=False))
    model = lorafx.rewrite(captured(), passes).module()
    rates = {n.rpartition(".")[2]: s["lr"] for n, s in model.parameter_settings().items()}
    assert rates == {"lora_gate": 0.7, "gate_in": 0.3, "gate_out": 0.3}


def test_the_rates_follow_the_schedule(tmp_path: Path) -> None:
    program = started("finegates")
    rates: list[set[float]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            rates.append({group["lr"] for group in optimizer.param_groups if group["params"]})

    fit(program, max_steps=4, callbacks=[Watch()], schedule="linear")
    ratio = Finegates().gate_rate / FAST["learning_rate"]
    assert len(rates) == 4
    assert all(len(found) == 2 for found in rates[:-1])
    assert [max(found) / min(found) for found in rates[:-1]] == pytest.approx([ratio] * 3)
    assert max(rates[2]) < max(rates[0])


def test_an_optimizer_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    model = started("salora + finegates").module()
    weights = [value for value in model.parameters() if value.requires_grad]
    given = torch.optim.SGD(weights, lr=0.3)
    trainer = Trainer(model, arguments(tmp_path), optimizers=(given, None))
    assert trainer.create_optimizer() is given
    assert len(given.param_groups) == 1
    assert [id(value) for value in given.param_groups[0]["params"]] == [id(value) for value in weights]
    assert given.param_groups[0]["lr"] == 0.3


# ---- reports

TABLES: dict[str, tuple[Pass, set[str]]] = {
    "prilora": (Prilora(rank_first=2, rank_last=4), {"Ranks by block", "Density of A"}),
    "salora": (Salora(rank=4), {"Open ranks", "Rank by module"}),
    "tied-lora": (TiedLora(rank=2), {"Tied parameters", "Tie groups"}),
    "finegates": (Finegates(), {"Gates", "Open gates by module"}),
    "rose-lora": (RoseLora(rank=2, start=2, end=5), {"Sparse factors"}),
}


@pytest.mark.parametrize("name", TABLES)
def test_reports_say_what_was_learned(name: str) -> None:
    step, titles = TABLES[name]
    program = stirred(lorafx.rewrite(captured(), [step]))
    report = program.report
    assert {title for title in report.sections if title.startswith(f"{name}: ")} == {f"{name}: {t}" for t in titles}
    assert lorafx.Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert all(isinstance(row, dict) and row for rows in report.sections.values() for row in rows)
    folded = lorafx.fold(program).report.sections
    assert {title: folded[title] for title in report.sections} == report.sections, "folding forgets nothing"
    assert ("Blocks" in folded) == (name == "finegates"), "and says what it removed"


def test_histograms_count_closed_fractional_and_open_gates() -> None:
    program = lorafx.rewrite(captured(), [Finegates(couple=False)])
    for name in program.names("gate"):
        value = program.tensor(name)
        drawn = torch.full(value.shape, -3.0)
        drawn[: len(value) // 2] = 3.0
        drawn[0] = 0.0
        program.load({name: drawn})
    (shown,) = program.report.sections["finegates: Gates"]
    sizes = [program.tensor(name).numel() for name in program.names("gate")]
    assert shown["gates"] == sum(sizes)
    assert shown["fractional"] == pytest.approx(len(sizes) / sum(sizes))
    assert shown["closed"] == pytest.approx(0.5)
    assert shown["fully open"] == pytest.approx(0.5 - shown["fractional"])
    assert [int(count) for count in shown["tenths"].split()] == [0, 0, 0, 0, 0, len(sizes), 0, 0, 0, 0]
    assert shown["weights kept"] == pytest.approx(0.25)


# ---- two processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes of one group ended with (see method_ddp_worker)."""
    return run_together("tests.method_ddp_worker", tmp_path_factory.mktemp("ddp"))


def ranks_of(folder: Path, name: str) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2)]


@every_recipe
def test_two_processes_stay_the_same(two_processes: Path, recipe: str) -> None:
    first, second = ranks_of(two_processes, recipe)
    program = started(recipe)
    assert first.keys() == second.keys() == program.learned().keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    learnt = ("multiplier", "input_norm", "pruned", "importance_A", "importance_B")
    kept = {name for name in program.names("statistic") if name.endswith(learnt)}
    assert bool(kept) == (recipe != "tied-lora")
    assert all(not torch.equal(first[name], program.tensor(name)) for name in kept), "else nothing is shown"


@pytest.mark.parametrize("recipe", NOISELESS)
def test_two_processes_train_like_one_on_the_whole_batch(two_processes: Path, recipe: str) -> None:
    program = started(recipe)
    everyone = [(number, rank) for number in range(worker.MICRO) for rank in range(2)]

    def whole(step: int, number: int) -> dict[str, Tensor]:
        return worker.joined([worker.rows_of(step, micro, rank) for micro, rank in everyone])

    worker.loop(program.module(), 1, whole)
    assert_same_training(ranks_of(two_processes, recipe)[0], learned(program))


def test_ties_hold_inside_the_wrapper(two_processes: Path) -> None:
    for rank in range(2):
        found = json.loads((two_processes / f"ties-{rank}.json").read_text(encoding="utf-8"))
        sizes = {short: len(set(pointers)) for short, pointers in found.items()}
        # Query, key and value share A and u; four places have A, six have B; two blocks.
        assert sizes == {"lora_A": 4, "lora_B": 6, "lora_u": 8, "lora_v": 12}
        assert {len(pointers) for pointers in found.values()} == {12}


@pytest.mark.parametrize("recipe", worker.TRAINED)
def test_the_trainer_keeps_two_processes_the_same(two_processes: Path, recipe: str) -> None:
    first, second = ranks_of(two_processes, f"trainer-{recipe}")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    if recipe in NOISELESS:
        alone = started(recipe)
        train(alone, table(worker.ROWS), tokenizer=words(), batch_size=16, **worker.OPTIONS)
        assert_same_training(first, learned(alone))
