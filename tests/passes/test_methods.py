"""What the training methods share: schedules, multipliers, exact masks; how they combine; what they report."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorafx
from lorafx.base import Method, Pass
from lorafx.errors import NoSitesError, RecipeError, UsageError
from lorafx.methods.masks import dropped, highest, kept, lowest, lowest_by_group
from lorafx.methods.schedules import ascend, cubic, linear, steps_of
from lorafx.passes.finegates import Finegates
from lorafx.passes.fold_affine import FoldAffine
from lorafx.passes.lora import Lora
from lorafx.passes.prilora import Prilora
from lorafx.passes.rose_lora import RoseLora
from lorafx.passes.salora import Salora
from lorafx.passes.tied_lora import TiedLora
from lorafx.reporting.report import report_of
from tests.methods import RECIPES, batch, fit, refused, state_of, tower, training
from tests.small import bert, example

# ---- a method with nothing to do


@pytest.mark.parametrize("method", [Prilora, Salora, TiedLora, Finegates, RoseLora])
def test_a_method_that_may_take_nothing_does_nothing_when_it_does(method: type[Method]) -> None:
    program = lorafx.rewrite(tower(), [method(targets="absent", allow_empty=True), Lora()])
    assert program.history[0].taken == ()
    model = program.module().train()
    fit(model, [batch(2, 3)] * 2)
    assert model.penalty() is None
    assert model.unsettled() == []
    model.conclude()
    assert [one.name for one in report_of(program).passes] == [method.pass_name(), "lora"]


def test_a_method_that_could_take_nothing_it_was_given_says_why() -> None:
    # What query reads is what the blocks hand on: no channel of it can go, so there is none to gate.
    said = refused(NoSitesError, (Finegates(targets="query"),))
    assert "finegates: targets 'query' name weights, and it can take none of them; " in said
    assert "its input cannot shrink: " in said
    assert lorafx.rewrite(tower(), [Finegates(targets="query", allow_empty=True)]).names("gate") == []


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"exclude": ("valeu",)}, "lora: exclude 'valeu' leaves out 0 of 11 weight uses (did you mean 'value'?)"),
        (
            {"rank_pattern": {"valeu": 4}},
            "lora: rank_pattern 'valeu' names none of 10 weights taken (did you mean 'value",
        ),
        ({"targets": "query", "alpha_pattern": {"value": 4.0}}, "lora: alpha_pattern 'value' names none of 2 weights"),
        (
            {"rank_pattern": {"value": 999}},
            "layers.0.value: lora: rank 999 at layers.0.value, whose weight allows 1 to",
        ),
        ({"rank_pattern": {"[": 4}}, "pattern '[': not a regular expression: "),
    ],
)
def test_what_names_nothing_is_an_error(step: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        lorafx.rewrite(tower(), [Lora(**{"rank": 2, **step})])
    assert said in str(caught.value)
    assert lorafx.rewrite(tower(), [Lora(rank=2, exclude=("role:head", "role:router"))]).names("adapter")
    if "[" not in str(step):
        assert lorafx.rewrite(tower(), [Lora(**{"rank": 2, **step, "allow_empty": True})]).names("adapter")


def test_what_composes_weights_says_that_there_are_none() -> None:
    program = lorafx.rewrite(lorafx.capture(bert().to("meta"), inputs=example(True), check=False), [Lora(rank=2)])
    for work in (lambda: lorafx.rewrite(program, [FoldAffine()]), lambda: lorafx.fold(program)):
        with pytest.raises(UsageError, match="was captured without weights, and there are some to compose"):
            work()


# ---- schedules and exact masks


def test_schedules() -> None:
    assert [linear(step, 2, 6, 0.0, 1.0) for step in (0, 2, 3, 6, 9)] == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert [cubic(step, 2, 6, 1.0, 0.0) for step in (0, 2, 4, 6, 9)] == [1.0, 1.0, 0.125, 0.0, 0.0]
    assert [steps_of(moment, 40) for moment in (0.1, 0.25, 1.0, 3, 40)] == [4, 10, 40, 3, 40]


def test_multipliers_ascend_and_stay_at_least_zero() -> None:
    multiplier = torch.zeros(())
    ascend(multiplier, 0.5, 0.1)
    ascend(multiplier, 0.5, 0.1)
    assert float(multiplier) == pytest.approx(0.1)
    ascend(multiplier, -0.3, 0.1, restart=False)
    assert float(multiplier) == pytest.approx(0.07)
    kept_up = multiplier.clone()
    ascend(kept_up, -5.0, 0.1)
    assert float(kept_up) == 0.0
    ascend(multiplier, 0.0, 0.1, restart=True)
    assert float(multiplier) == 0.0


SCORES = st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4)


@given(scores=SCORES, count=st.integers(0, 6))
def test_masks_are_exact_and_ties_go_to_the_lower_index(scores: list[list[int]], count: int) -> None:
    low, high = lowest(torch.tensor(scores), count), highest(torch.tensor(scores), count)
    for row, found_low, found_high in zip(scores, low, high, strict=True):
        order = sorted(range(6), key=lambda j: (row[j], j))[:count]
        assert found_low.nonzero().flatten().tolist() == sorted(order)
        order = sorted(range(6), key=lambda j: (-row[j], j))[:count]
        assert found_high.nonzero().flatten().tolist() == sorted(order)


def test_counts_are_not_misled_by_the_last_bit() -> None:
    # 0.1 · 30 is 3.0000000000000004 and 0.29 · 100 is 28.999999999999996 in binary.
    assert (kept(0.1, 30), kept(0.1, 31), dropped(0.29, 100), dropped(0.5, 7)) == (3, 4, 29, 3)


def test_constructed_ties_in_every_kind_of_group() -> None:
    score = torch.tensor([[2.0, 1, 2, 2, 3, 1], [0, 0, 0, 0, 0, 0]])
    assert lowest_by_group(score, 0.5, "row").int().tolist() == [[1, 1, 0, 0, 0, 1], [1, 1, 1, 0, 0, 0]]
    assert lowest_by_group(score, 0.5, "matrix").int().tolist() == [[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert lowest_by_group(score, 0.5, "2:3").int().tolist() == [[1, 1, 0, 1, 0, 1], [1, 1, 0, 1, 1, 0]]


# ---- combinations


def test_prilora_ranks_under_rose_lora_masks() -> None:
    model = training(*RECIPES["prilora + rose-lora"], total_steps=6)
    fit(model, [batch(4, 5, seed) for seed in range(6)])
    first, last = state_of(model).sites[0], state_of(model).sites[-1]
    assert (first["lora_A"].shape[0], last["lora_A"].shape[0]) == (2, 4)
    assert first["lora_A"] is state_of(model, 0).sites[0]["lora_A"], "the masks are of those adapters"
    assert (last["lora_A"] != 0).sum(1).tolist() == [math.ceil(0.3 * last["lora_A"].shape[1])] * 4


@pytest.mark.parametrize(
    ("passes", "named"),
    [
        ((Prilora(rank_first=2, rank_last=4), RoseLora(adapters="existing")), ("rose-lora", "prilora")),
        ((RoseLora(rank=2), RoseLora(adapters="existing")), ("rose-lora", "rose-lora")),
    ],
)
def test_two_passes_that_prune_one_adapter_are_refused(passes: tuple[Pass, ...], named: tuple[str, str]) -> None:
    message = refused(RecipeError, passes)
    assert f"{named[0]} and {named[1]} both prune the adapters of layers.0.query" in message


def test_masks_without_adapters_are_refused() -> None:
    message = refused(RecipeError, (RoseLora(adapters="existing"),))
    assert "no earlier pass put A and B at layers.0.query" in message
    some = (Prilora(targets="query", rank_first=2, rank_last=2, fraction=0.0), RoseLora(adapters="existing"))
    assert "no earlier pass put A and B at layers.0.key" in refused(RecipeError, some)


def test_tied_factors_and_gates_train_together() -> None:
    model = training(*RECIPES["tied-lora + finegates"], total_steps=5)
    program = model.program
    train = {program.roles[name] for name in program.trainable()}
    assert train == {"adapter", "gate", "base"}, "base: the biases"
    start = {name: value.detach().clone() for name, value in program.trainable().items()}
    fit(model, [batch(4, 5, seed) for seed in range(5)])
    assert all(not torch.equal(start[name], value) for name, value in program.trainable().items())


@pytest.mark.parametrize("name", RECIPES)
def test_reports_are_json(name: str) -> None:
    model = training(*RECIPES[name], total_steps=5)
    fit(model, [batch(4, 5, seed) for seed in range(5)])
    report = report_of(model.program)
    for step in RECIPES[name]:
        assert any(title.startswith(f"{step.pass_name()}: ") for title in report.sections)
    assert lorafx.Report.from_json(report.to_json()) == report
    assert all(title in report.text(200) for title in report.sections)
