"""Recipes: TOML to values and back, values checked against the declared types, one-line errors that name the key."""

from __future__ import annotations

import contextlib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafx.base import option
from lorafx.errors import ArtifactError, LorafxError, RecipeError, UsageError
from lorafx.passes.lora import Lora
from lorafx.passes.to_eval import ToEval
from lorafx.recipes.recipe import Recipe, coerce, parse_options, parse_text, pass_dict, type_name

TEXT = """
[model]
task = "text-classification"
num_labels = 2

[[pass]]
name = "lora"
targets = ["query", "value"]
rank = 4
alpha = 16
rank_pattern = { "0.query" = 2 }

[[pass]]
name = "to-eval"

[train]
epochs = 3
learning_rate = 1e-3
trainer = { optim = "adamw_torch" }
"""


def test_a_recipe_is_what_its_file_says(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(TEXT)
    recipe = Recipe.of(file)
    assert recipe.passes == (
        Lora(targets=("query", "value"), rank=4, alpha=16.0, rank_pattern={"0.query": 2}),
        ToEval(),
    )
    assert recipe.model == {"task": "text-classification", "num_labels": 2}
    assert recipe.train == {"epochs": 3.0, "learning_rate": 1e-3, "trainer": {"optim": "adamw_torch"}}
    assert Recipe.parse(tomllib.loads(recipe.to_toml())) == recipe
    assert Recipe.of(str(file)) == Recipe.of(recipe.to_dict()) == Recipe.of(recipe) == recipe
    assert Recipe.of([ToEval()]) == Recipe((ToEval(),))
    assert Recipe.of([ToEval(), {"name": "lora", "rank": 3}]) == Recipe((ToEval(), Lora(rank=3)))


def test_options_at_their_defaults_are_not_written() -> None:
    assert pass_dict(Lora(rank=8, alpha=4.0)) == {"name": "lora", "alpha": 4.0}
    assert Recipe((ToEval(),)).to_toml() == '[[pass]]\nname = "to-eval"\n'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"pas": []}, "recipe: unknown key 'pas' (did you mean 'pass'?); known: model, pass, train"),
        ({"model": {"taks": "x"}}, "[model]: unknown key 'taks' (did you mean 'task'?)"),
        ({"model": {"num_labels": "two"}}, "[model]: num_labels = 'two' is not an integer; size of the classification"),
        ({"model": 3}, "[model]: expected a table of keys, got 3"),
        ({"train": {"epoch": 1}}, "[train]: unknown key 'epoch' (did you mean 'epochs'?)"),
        ({"train": {"epochs": "all"}}, "[train]: epochs = 'all' is not a number; passes over the training data"),
        ({"pass": {"name": "lora"}}, "passes are written as [[pass]] tables"),
        ({"pass": ["lora"]}, '[[pass]] 1: no name; write name = "lora"'),
        ({"pass": [{"rank": 4}]}, '[[pass]] 1: no name; write name = "lora"'),
        ({"pass": [{"name": "to-eval"}, {"name": "lora", "rnak": 4}]}, "[[pass]] 2 (lora): unknown key 'rnak' (did"),
        ({"pass": [{"name": "lora", "rank": 4.5}]}, "1 (lora): rank = 4.5 is not an integer; rank of the update"),
        ({"pass": [{"name": "lora", "rank": True}]}, "rank = True is not an integer"),
        ({"pass": [{"name": "lora", "exclude": "key"}]}, "exclude = 'key' is not a list of text"),
        ({"pass": [{"name": "lora", "rank_pattern": {"a": "b"}}]}, "is not a table of integers"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_pass_is_named() -> None:
    with pytest.raises(UsageError, match=r"unknown pass 'lroa' \(did you mean 'lora'\?\)"):
        Recipe.parse({"pass": [{"name": "lroa"}]})


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, ArtifactError, "no such recipe file"),
        (b"[[pass]\n", RecipeError, "not valid TOML"),
        (b"\xff\xfe", RecipeError, "not valid TOML"),
        (b"[train]\nepoch = 1\n", RecipeError, "[train]: unknown key 'epoch'"),
    ],
)
def test_a_file_that_does_not_parse_is_named(
    content: bytes | None, error: type[LorafxError], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error) as caught:
        Recipe.read(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


# ---- the closed set of option types


@dataclass(frozen=True)
class Every:
    """One option of each type."""

    flag: bool = option(False, "a flag")
    count: int = option(1, "a count")
    share: float = option(0.5, "a share")
    name: str = option("", "a name")
    names: tuple[str, ...] = option((), "names")
    numbers: tuple[int, ...] = option((), "numbers")
    sizes: dict[str, float] = option({}, "sizes")
    mode: Literal["fast", "exact"] = option("fast", "a mode")
    where: str | tuple[str, ...] = option("", "where")
    blocks: str | int | tuple[int, ...] | None = option(None, "blocks")


HINTS: dict[str, Any] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "strings": tuple[str, ...],
    "integers": tuple[int, ...],
    "table": dict[str, float],
    "mode": Literal["fast", "exact"],
    "optional": int | None,
}


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, "float", 3.0),
        ([1, 2], "integers", (1, 2)),
        (["a"], "strings", ("a",)),
        ({"a": 1}, "table", {"a": 1.0}),
        ("exact", "mode", "exact"),
        (None, "optional", None),
    ],
)
def test_values_become_the_declared_type(value: Any, hint: str, expected: Any) -> None:
    result = coerce(value, HINTS[hint])
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, "bool"), (True, "int"), (1.0, "int"), ("1", "int"), (True, "float"), ("a", "strings"), ([1.5], "integers"),
        ([True], "integers"), (["a", 1], "strings"), ({"a": "b"}, "table"), ({1: 1.0}, "table"), ("slow", "mode"),
        ("x", "optional"), (None, "int"), ([["a"]], "strings"),
    ],
)  # fmt: skip
def test_nothing_else_is_converted(value: Any, hint: str) -> None:
    with pytest.raises(TypeError):
        coerce(value, HINTS[hint])


def test_types_read_well() -> None:
    names = {name: type_name(hint) for name, hint in HINTS.items()}
    assert names == {
        "bool": "true or false",
        "int": "an integer",
        "float": "a number",
        "str": "text",
        "strings": "a list of text",
        "integers": "a list of integers",
        "table": "a table of numbers",
        "mode": "one of 'fast', 'exact'",
        "optional": "an integer",
    }


@pytest.mark.parametrize(
    ("text", "hint", "expected"),
    [
        ("16", int, 16),
        ("1e-3", float, 1e-3),
        ("3", float, 3.0),
        ("true", bool, True),
        ("query", str, "query"),
        ("", str, ""),
        ("16", str, "16"),
        ("query,value", tuple[str, ...], ("query", "value")),
        ("query, value", tuple[str, ...], ("query", "value")),
        ('["a,b"]', tuple[str, ...], ("a,b",)),
        ("0,2", tuple[int, ...], (0, 2)),
        ("query,value", str | tuple[str, ...], "query,value"),
        ("{a = 2}", dict[str, int], {"a": 2}),
        ("exact", Literal["fast", "exact"], "exact"),
        ("0..3", str | int | tuple[int, ...] | None, "0..3"),
        ("3", str | int | tuple[int, ...] | None, 3),
    ],
)
def test_command_line_text_becomes_the_declared_type(text: str, hint: Any, expected: Any) -> None:
    assert parse_text(text, hint) == expected


@pytest.mark.parametrize(("text", "hint"), [("x", int), ("yes", bool), ("a,b", tuple[int, ...]), ("a", dict[str, int])])
def test_command_line_text_of_another_type_is_refused(text: str, hint: Any) -> None:
    with pytest.raises(TypeError):
        parse_text(text, hint)


STRINGS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = {
    "flag": st.booleans(),
    "count": st.integers(-(2**63), 2**63 - 1),
    "share": st.floats(allow_nan=False),
    "name": STRINGS,
    "names": st.lists(STRINGS).map(tuple),
    "numbers": st.lists(st.integers(-9, 9)).map(tuple),
    "sizes": st.dictionaries(STRINGS, st.floats(allow_nan=False)),
    "mode": st.sampled_from(["fast", "exact"]),
    "where": STRINGS | st.lists(STRINGS).map(tuple),
    "blocks": STRINGS | st.integers(-9, 9) | st.lists(st.integers(-9, 9)).map(tuple),
}


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_every_type_survives_toml(values: dict[str, Any]) -> None:
    import tomli_w

    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    assert parse_options(Every, tomllib.loads(tomli_w.dumps(lists)), "here") == Every(**values)


@given(st.dictionaries(STRINGS, STRINGS | st.integers() | st.lists(STRINGS)))
def test_no_dictionary_breaks_the_parser(data: dict[str, Any]) -> None:
    with contextlib.suppress(RecipeError):
        assert not Recipe.parse(data).passes


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (Lora, r"pass 2: Lora is a class; write Lora\(…\)"),
        ("lora", r'pass 2: no name; write name = "lora"'),
        ({"name": "lora", "rank": "wide"}, r"pass 2 \(lora\): rank = 'wide' is not"),
    ],
)
def test_what_is_no_pass_is_named(step: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe.of([ToEval(), step])
