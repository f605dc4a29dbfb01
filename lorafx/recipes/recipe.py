"""A recipe: an ordered tuple of passes, with what model and training it is meant for. TOML ↔ values ↔ flags."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from ..errors import ArtifactError, RecipeError, did_you_mean
from .registry import options, pass_class

if TYPE_CHECKING:
    from ..base import Pass

_SECTIONS = ("model", "pass", "train")


@dataclass(frozen=True)
class Recipe:
    """An ordered tuple of passes.

    Attributes:
        passes: applied in this order
        model: ``task``, ``num_labels``, … — defaults for opening the checkpoint; the command line wins
        train: defaults for training: epochs, learning_rate, …
    """

    passes: tuple[Pass, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)

    @property
    def opening(self) -> dict[str, Any]:
        """What the recipe says of how transformers opens the checkpoint, beside its task."""
        said = {name: self.model.get(name) for name in ("dtype", "ignore_mismatched_sizes")}
        return {name: value for name, value in said.items() if value}

    @classmethod
    def of(cls, value: str | PathLike[str] | Mapping[str, Any] | Recipe | Sequence[Pass | Mapping[str, Any]]) -> Recipe:
        """A Recipe from a path, a dict, a Recipe, or a sequence of passes and of tables of passes."""
        if isinstance(value, Recipe):
            return value
        if isinstance(value, (str, PathLike)):
            return cls.read(value)
        if isinstance(value, Mapping):
            return cls.parse(value)
        return cls(tuple(_pass(step, f"pass {number}") for number, step in enumerate(value, 1)))

    @classmethod
    def read(cls, path: str | PathLike[str]) -> Recipe:
        """Parse a TOML file; RecipeError names the file, the key and what was expected."""
        file = Path(path)
        if not file.is_file():
            raise ArtifactError(f"{file}: no such recipe file")
        try:
            data = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"{file}: not valid TOML: {error}") from None
        try:
            return cls.parse(data)
        except RecipeError as error:
            raise RecipeError(f"{file}: {error}") from None

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Recipe:
        """A Recipe from the nested dict a TOML recipe parses to."""
        _known_keys(data, _SECTIONS, "recipe")
        from .options import ModelOptions, TrainOptions

        model = _section(ModelOptions, data.get("model", {}), "[model]")
        train = _section(TrainOptions, data.get("train", {}), "[train]")
        entries = data.get("pass", [])
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise RecipeError("passes are written as [[pass]] tables")
        passes = tuple(parse_pass(entry, f"[[pass]] {number}") for number, entry in enumerate(entries, 1))
        return cls(passes, model, train)

    def to_dict(self) -> dict[str, Any]:
        """The nested dict that :meth:`parse` takes; options at their defaults are left out."""
        result: dict[str, Any] = {}
        if self.model:
            result["model"] = dict(self.model)
        result["pass"] = [pass_dict(step) for step in self.passes]
        if self.train:
            result["train"] = dict(self.train)
        return result

    def to_toml(self) -> str:
        """The recipe as TOML text; ``Recipe.parse(tomllib.loads(text))`` gives it back."""
        data = self.to_dict()
        parts = [tomli_w.dumps({name: data[name]}) for name in ("model", "train") if name in data]
        for entry in data["pass"]:
            # By default the writer puts a short list of tables on one line. Only headers begin with a bracket here.
            parts.append("[[pass]]\n" + re.sub(r"(?m)^\[", "[pass.", tomli_w.dumps(entry)))
        return "\n".join(parts)


def _section(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The given values, checked; the others keep their defaults where the section is used."""
    checked = parse_options(cls, values, where)
    return {key: getattr(checked, key) for key in values}


def pass_dict(step: Pass) -> dict[str, Any]:
    """``{"name": …, option: value}`` of the options that differ from their defaults."""
    plain = type(step)()
    changed = {name: getattr(step, name) for name in options(type(step))}
    changed = {name: value for name, value in changed.items() if value != getattr(plain, name)}
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}
    return {"name": step.pass_name(), **lists}


def _pass(step: Pass | Mapping[str, Any], where: str) -> Pass:
    from ..base import Pass

    if isinstance(step, Pass):
        return step
    if isinstance(step, type):
        raise RecipeError(f"{where}: {step.__name__} is a class; write {step.__name__}(…)")
    return parse_pass(step, where)


def parse_pass(entry: Mapping[str, Any], where: str) -> Pass:
    """A pass from its recipe table."""
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise RecipeError(f'{where}: no name; write name = "lora"')
    cls = pass_class(str(entry["name"]))
    return parse_options(cls, {k: v for k, v in entry.items() if k != "name"}, f"{where} ({entry['name']})")


def parse_options(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """An instance of the dataclass ``cls``, every value checked against the declared type."""
    fields = {entry.name: entry for entry in dataclasses.fields(cls)}
    _known_keys(values, fields, where)
    hints = typing.get_type_hints(cls)
    checked = {}
    for name, value in values.items():
        try:
            checked[name] = coerce(value, hints[name])
        except TypeError:
            expected = type_name(hints[name])
            about = fields[name].metadata.get("help", "")
            raise RecipeError(f"{where}: {name} = {value!r} is not {expected}; {about}") from None
    return cls(**checked)


def _known_keys(values: Mapping[str, Any], known: Any, where: str) -> None:
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where}: expected a table of keys, got {values!r}")
    for key in values:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}; known: {', '.join(known)}")


def coerce(value: Any, hint: Any) -> Any:
    """``value`` as the declared type ``hint``: the closed set bool, int, float, str, tuples, dicts, Literals, unions.

    TypeError when it fits none of them. Lists become tuples and integers floats; nothing else is converted.
    """
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, typing.get_args(hint))
    if origin is typing.Literal:
        if value in typing.get_args(hint):
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(coerce(item, typing.get_args(hint)[0]) for item in value)
    elif origin in (dict, Mapping):
        if isinstance(value, Mapping):
            return {coerce(k, typing.get_args(hint)[0]): coerce(v, typing.get_args(hint)[1]) for k, v in value.items()}
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif (hint is type(None) and value is None) or type(value) is hint:
        return value
    raise TypeError(hint)


def _coerce_union(value: Any, hints: tuple[Any, ...]) -> Any:
    for hint in hints:
        try:
            return coerce(value, hint)
        except TypeError:
            continue
    raise TypeError(hints)


def type_name(hint: Any, *, several: bool = False) -> str:
    """A readable name of an option's type; of ``several`` values of it, in the plural."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(arg, several=several) for arg in args if arg is not type(None))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is tuple:
        return f"a list of {type_name(args[0], several=True)}"
    if origin in (dict, Mapping):
        return f"a table of {type_name(args[1], several=True)}"
    plain = {"bool": "true or false", "str": "text", "int": "an integer", "float": "a number"}
    plain |= {"int": "integers", "float": "numbers"} if several else {}
    return plain.get(hint.__name__, str(hint))


def default_text(entry: dataclasses.Field[Any], value: Any) -> str:
    """The default ``value`` of an option as a recipe has it; in words where there is nothing to write."""
    if value is None:
        return str(entry.metadata.get("unset", "none"))
    return json.dumps(value, ensure_ascii=False) if value not in ((), {}) else "none"


def parse_text(text: str, hint: Any) -> Any:
    """An option's value from command-line text: TOML if it parses as the type, else plain text (``a,b`` for a list);
    ``none`` is none of what may be left out and is no text.

    TypeError when neither fits.
    """
    kinds = typing.get_args(hint)
    if text == "none" and type(None) in kinds and str not in kinds:
        return None
    for candidate in (text, f"[{text}]"):
        try:
            return coerce(tomllib.loads(f"value = {candidate}")["value"], hint)
        except (tomllib.TOMLDecodeError, TypeError):
            continue
    try:
        return coerce(text, hint)
    except TypeError:
        return coerce([part.strip() for part in text.split(",")], hint)
