"""Ranges of options: declared with the option, and held however the options are made."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lorafx.base import Options, Pass, option
from lorafx.cli import main
from lorafx.commands.flags import read_recipe, train_options
from lorafx.editing.requests import EditOptions
from lorafx.errors import RecipeError, UsageError
from lorafx.passes.finegates import Finegates
from lorafx.ranges import Range, range_of
from lorafx.recipes.options import ModelOptions, TrainOptions
from lorafx.recipes.recipe import Recipe
from lorafx.recipes.registry import known, options, pass_class

#: Values that used to crash, to give NaN, or to mean something else in silence; and their neighbours that are right.
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("finegates", {"budget": 60.0}, "budget = 60.0, but it is above 0 and at most 1"),
    ("finegates", {"budget": 0.0}, "budget = 0.0, but it is above 0"),
    ("finegates", {"mode": "penalty", "noise": 0.0}, "mode = 'penalty' is about noise, but noise = 0"),
    ("finegates", {"noise": -0.1}, "noise = -0.1, but it is at least 0"),
    ("finegates", {"target": 1.5}, "target = 1.5, but it is at least 0 and below 1"),
    ("finegates", {"length": 0}, "length = 0, but it is at least 1"),
    ("finegates", {"latency": {"1x1": -1.0}}, r"latency = \{'1x1': -1.0\}, but it is at least 0"),
    ("salora", {"density": 50.0}, "density = 50.0, but it is above 0 and at most 1"),
    ("salora", {"initial": -3.0}, "initial = -3.0, but it is above -1.5986 and at most 4.60517"),
    ("prilora", {"fraction": 50.0}, "fraction = 50.0, but it is at least 0 and below 1"),
    ("prilora", {"fraction": 1.0}, "fraction = 1.0, but it is at least 0 and below 1"),
    ("prilora", {"interval": 0}, "interval = 0, but it is at least 1"),
    ("rose-lora", {"density": 10.0}, "density = 10.0, but it is above 0 and at most 1"),
    ("rose-lora", {"beta": 1.0}, "beta = 1.0, but it is at least 0 and below 1"),
    ("lora", {"rank": 0}, "rank = 0, but it is at least 1"),
    ("lora", {"dropout": 1.0}, "dropout = 1.0, but it is at least 0 and below 1"),
    ("lora", {"alpha": 0.0}, "alpha = 0.0, but it is above 0"),
    ("lora", {"rank_pattern": {"query": 0}}, r"rank_pattern = \{'query': 0\}, but it is at least 1"),
    ("tied-lora", {"deviation": 0.0}, "deviation = 0.0, but it is above 0"),
    ("magnitude", {"keep": 70.0}, "keep = 70.0, but it is above 0 and at most 1"),
    ("activation", {"samples": 0}, "samples = 0, but it is at least 1"),
    ("dead-channels", {"round_to": 0}, "round_to = 0, but it is at least 1"),
    ("gather-columns", {"cost": -1.0}, "cost = -1.0, but it is at least 0"),
]


@pytest.mark.parametrize(("name", "given", "message"), WRONG)
def test_python_toml_and_flags_refuse_alike(name: str, given: dict[str, Any], message: str) -> None:
    cls = pass_class(name)
    message = f"{name}: {message}"
    with pytest.raises(RecipeError, match=message):
        cls(**given)
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(cls(), **given)
    with pytest.raises(RecipeError, match=message):
        Recipe.parse({"pass": [{"name": name, **given}]})
    if not any(isinstance(value, dict) for value in given.values()):
        flags = [part for key, value in given.items() for part in (f"--{name}.{key}", str(value))]
        with pytest.raises(RecipeError, match=message):
            read_recipe(None, (name,), flags)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(RecipeError, match=r"finegates: initial = -?(nan|inf) is not a finite number \(mean of"):
        Finegates(initial=value)


def test_python_is_held_to_numbers_and_integers() -> None:
    wrong: Any = "0.5"
    with pytest.raises(RecipeError, match=r"finegates: budget = '0\.5' is not a finite number"):
        Finegates(budget=wrong)
    with pytest.raises(RecipeError, match=r"finegates: length = 2\.5 is not an integer"):
        Finegates(length=2.5)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="budget = True is not a finite number"):
        Finegates(budget=True)
    assert Finegates(budget=1).budget == 1


def test_every_number_of_every_pass_has_a_range() -> None:
    """Those without ends are few, and said here: a mean of a normal distribution."""
    free = {
        f"{name}.{key}"
        for name in known()
        for key, field in options(pass_class(name)).items()
        if range_of(field) is not None and not str(range_of(field))
    }
    assert free == {"finegates.initial"}
    bare = {
        f"{name}.{key}"
        for name in known()
        for key, field in options(pass_class(name)).items()
        if type(field.default) in (int, float) and range_of(field) is None
    }
    assert not bare


def test_a_pass_of_a_plug_in_is_held_to_its_ranges_too() -> None:
    seen: list[float] = []

    @dataclass(frozen=True)
    class Mine(Pass):
        share: float = option(0.5, "a share", above=0, most=1)

        def __post_init__(self) -> None:
            seen.append(1 / self.share)

    assert Mine(share=0.25).share == 0.25
    for wrong in (0, 2):
        with pytest.raises(RecipeError, match=f"test-ranges: share = {wrong}, but it is above 0 and at most 1"):
            Mine(share=wrong)
    assert seen == [4.0]


TRAINING: dict[str, Any] = {
    "epochs": -1.0,
    "max_steps": -2,
    "batch_size": 0,
    "eval_batch_size": 0,
    "accumulate": 0,
    "learning_rate": -1.0,
    "warmup": 1.0,
    "weight_decay": -0.1,
    "max_grad_norm": -1.0,
    "max_length": 0,
    "seed": -1,
    "save_steps": -1,
    "log_steps": 0,
}


@pytest.mark.parametrize("name", TRAINING)
def test_options_of_training_are_checked_before_anything_is_opened(name: str) -> None:
    message = f"training options: {name} = {TRAINING[name]}, but it is at least"
    with pytest.raises(UsageError, match=message):
        TrainOptions(**{name: TRAINING[name]})
    with pytest.raises(RecipeError, match=message):
        Recipe.parse({"train": {name: TRAINING[name]}})
    with pytest.raises(RecipeError, match=message):
        train_options(None, {name: str(TRAINING[name])})


def test_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[[pass]]\nname = "finegates"\nbudget = 60\n', encoding="utf-8")
    with pytest.raises(RecipeError, match=r"r\.toml: finegates: budget = 60.0, but it is above 0 and at most 1"):
        Recipe.read(tmp_path / "r.toml")


def test_other_options_have_ranges() -> None:
    with pytest.raises(RecipeError, match="model options: num_labels = 0, but it is at least 1"):
        ModelOptions(num_labels=0)
    with pytest.raises(RecipeError, match=r"editing options: density = 4\.5, but it is above 0 and at most 1"):
        EditOptions(density=4.5)


def test_ranges_are_shown_where_options_are() -> None:
    shown = CliRunner().invoke(main, ["passes", "finegates"]).output
    assert "budget (a number above 0 and at most 1; default 0.6): share to keep" in shown
    told = " ".join(CliRunner().invoke(main, ["train", "--help"]).output.split())
    assert "share of the steps spent warming up (at least 0 and below 1)" in told


def test_ends_read_well() -> None:
    assert str(Range(least=0, below=2**32)) == "at least 0 and below 4294967296"
    assert str(Range(above=-1.59862, most=0.5)) == "above -1.59862 and at most 0.5"
    assert str(Range()) == ""
    assert issubclass(Pass, Options)
