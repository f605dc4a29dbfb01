"""Command-line text to values: recipes from files and flags, training options, shapes. One declaration serves all."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError, did_you_mean
from ..ranges import range_of

if TYPE_CHECKING:
    from ..recipes.recipe import Recipe


def read_recipe(path: Path | None, passes: tuple[str, ...], flags: list[str], empty: bool = False) -> Recipe:
    """The recipe of a command: the file, the ``--pass`` names, and ``--NAME.OPTION VALUE`` flags over both.

    ``empty`` says that there may be none.
    """
    from ..recipes.recipe import Recipe

    data = Recipe.read(path).to_dict() if path is not None else {}
    entries: list[dict[str, Any]] = [*data.get("pass", []), *({"name": name} for name in passes)]
    for name, option, text in _dotted(flags):
        entry = next((entry for entry in reversed(entries) if entry["name"] == name), None)
        if entry is None:
            entry = {"name": name}
            entries.append(entry)
        entry[option] = _pass_option(name, option, text)
    if not entries and not empty:
        raise UsageError("nothing to do: give --recipe FILE or --pass NAME; `lorafx passes` lists them")
    return Recipe.parse({**data, "pass": entries})


def _dotted(flags: list[str]) -> Iterator[tuple[str, str, str]]:
    """``--lora.rank 16`` and ``--lora.rank=16`` as ``("lora", "rank", "16")``."""
    rest = list(flags)
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        name, dot, option = flag.removeprefix("--").partition(".")
        if not flag.startswith("--") or not dot:
            raise UsageError(f"unknown argument {flag!r}; options of a pass are written --NAME.OPTION VALUE")
        if not equals:
            if not rest:
                raise UsageError(f"{flag} needs a value")
            text = rest.pop(0)
        yield name, option.replace("-", "_"), text


def _pass_option(name: str, option: str, text: str) -> Any:
    from ..recipes.registry import options, pass_class

    cls = pass_class(name)
    if option not in options(cls):
        raise UsageError(f"--{name}.{option}: {name} has no such option{did_you_mean(option, options(cls))}")
    return _value(f"--{name}.{option}", text, typing.get_type_hints(cls)[option])


def _value(flag: str, text: str, hint: Any) -> Any:
    from ..recipes.recipe import parse_text, type_name

    try:
        return parse_text(text, hint)
    except TypeError:
        raise UsageError(f"{flag}: {text!r} is not {type_name(hint)}") from None


def option_flags(cls: type) -> Any:
    """A decorator that gives a command one flag for each field of the options class ``cls``."""

    def decorate(function: Any) -> Any:
        for entry in reversed(dataclasses.fields(cls)):
            flag, about = "--" + entry.name.replace("_", "-"), entry.metadata["help"]
            held = str(range_of(entry) or "")
            about = f"{about} ({held})" if held else about
            declared = f"{flag}/--no-{flag[2:]}" if entry.type == "bool" else flag
            function = click.option(declared, default=None, help=about)(function)
        return function

    return decorate


def option_values(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of those flags of ``cls`` that were given."""
    hints = typing.get_type_hints(cls)
    chosen = {name: given[name] for name in hints if given.get(name) is not None}
    return {
        name: _value(f"--{name.replace('_', '-')}", value, hints[name]) if isinstance(value, str) else value
        for name, value in chosen.items()
    }


def train_flags(function: Any) -> Any:
    """One flag for each field of TrainOptions."""
    from ..recipes.options import TrainOptions

    return option_flags(TrainOptions)(function)


def train_options(recipe: Recipe | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The training options of a command, checked: those of the recipe, then the flags that were given."""
    from ..recipes.options import TrainOptions
    from ..recipes.recipe import parse_options

    chosen = {**(recipe.train if recipe is not None else {}), **option_values(TrainOptions, given)}
    parse_options(TrainOptions, chosen, "training options")  # now, not when the training begins
    return chosen


def parse_shape(text: str) -> tuple[int, int]:
    """``8x64`` as (batch, length)."""
    batch, _, length = text.lower().partition("x")
    if not (batch.isdigit() and length.isdigit()):
        raise UsageError(f"--shape {text!r}: write batch x length, e.g. 8x64")
    return int(batch), int(length)
