"""Command-line text to values: recipes from files and flags, training options, shapes. One declaration serves all."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import RecipeError, UsageError, did_you_mean
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
    parsed = Recipe.parse({**data, "pass": entries})
    try:
        train_options(parsed, {})
    except RecipeError as error:
        raise RecipeError(f"{path}: [train]: {error}") from None
    return parsed


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
    from ..recipes.recipe import coerce, parse_text, type_name

    try:
        return coerce(_pairs(text), hint) if typing.get_origin(hint) is dict else parse_text(text, hint)
    except TypeError:
        raise UsageError(f"{flag}: {text!r} is not {type_name(hint)}") from None


class GroupedOption(click.Option):
    """An option listed under a title in the help of a :class:`GroupedCommand`."""

    def __init__(self, *args: Any, group: str = "", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help lists options by their groups, after those that have none."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options into the help."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                groups.setdefault(getattr(parameter, "group", ""), []).append(record)
        for title, rows in groups.items():
            with formatter.section(title or "Options"):
                formatter.write_dl(rows)


def _pairs(text: str) -> dict[str, Any]:
    """``optim=adafactor,adam_beta2=0.98`` as a table, and one in TOML (``{optim = "adafactor"}``) as it is.

    TypeError when it is neither.
    """
    import tomllib

    def read(value: str) -> Any:
        try:
            return tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            return value

    if text.strip().startswith("{"):
        return read(text)
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and equals for name, equals, _ in pairs):
        raise TypeError(text)
    return {name.strip(): read(value.strip()) for name, _, value in pairs}


def option_flags(cls: type) -> Any:
    """A decorator that gives a command one flag for each field of the options class ``cls``."""
    hints, groups, group = typing.get_type_hints(cls), [], ""
    for entry in dataclasses.fields(cls):
        group = entry.metadata["group"] or group
        groups.append((entry, group))

    def decorate(function: Any) -> Any:
        for entry, title in reversed(groups):
            flag, switch = "--" + entry.name.replace("_", "-"), hints[entry.name] is bool
            function = click.option(
                f"{flag}/--no-{flag[2:]}" if switch else flag,
                cls=GroupedOption,
                group=title,
                default=None,
                metavar=None if switch else _metavar(hints[entry.name]),
                help=_described(entry),
            )(function)
        return function

    return decorate


def _described(entry: dataclasses.Field[Any]) -> str:
    """What an option does, the range of its numbers, and its default, if that is informative."""
    held, default = str(range_of(entry) or ""), entry.default
    about = f"{entry.metadata['help']} ({held})" if held else entry.metadata["help"]
    if isinstance(default, bool):
        default = "on" if default else "off"
    return f"{about}  [default: {default}]" if isinstance(default, (int, float, str)) else about


def _metavar(hint: Any) -> str:
    """The placeholder of an option's value in a help text."""
    kinds = {int: "INTEGER", float: "NUMBER"}
    return "NAME=VALUE,…" if typing.get_origin(hint) is dict else kinds.get(hint, "TEXT")


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
    from ..recipes.trainer import check_training

    chosen = {**(recipe.train if recipe is not None else {}), **option_values(TrainOptions, given)}
    # Checked now, not when the training begins.
    check_training(parse_options(TrainOptions, chosen, "training options"))
    return chosen


def parse_shape(text: str) -> tuple[int, int]:
    """``8x64`` as (batch, length)."""
    batch, _, length = text.lower().partition("x")
    if not (batch.isdigit() and length.isdigit()):
        raise UsageError(f"--shape {text!r}: write batch x length, e.g. 8x64")
    return int(batch), int(length)
