"""Which passes exist: the files of ``passes/`` and the plug-ins of the entry-point group ``lorafx.passes``.

Listing reads file names and source text only; nothing is imported until a pass is used.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from ..base import Pass

GROUP = "lorafx.passes"


@cache
def known() -> Mapping[str, str]:
    """Pass name → ``module`` or ``module:Class``. UsageError when a plug-in uses a name that is already taken."""
    folder = Path(__file__).parent.parent / "passes"
    names = {
        file.stem.replace("_", "-"): f"lorafx.passes.{file.stem}"
        for file in sorted(folder.glob("*.py"))
        if not file.stem.startswith("_")
    }
    plugin: EntryPoint
    for plugin in entry_points(group=GROUP):
        if plugin.name in names:
            taken = names[plugin.name]
            raise UsageError(f"plug-in pass {plugin.name!r} ({plugin.value}) has the name of {taken}; rename it")
        names[plugin.name] = plugin.value
    return names


def summary(name: str) -> str:
    """The first line of a pass's documentation, read without importing it (a plug-in's origin instead)."""
    target = known()[name]
    if ":" in target:
        return f"plug-in {target}"
    file = Path(__file__).parent.parent / "passes" / f"{name.replace('-', '_')}.py"
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


@cache
def pass_class(name: str) -> type[Pass]:
    """The class of the pass called ``name``; UsageError with a did-you-mean for an unknown one."""
    from ..base import Pass

    if name not in known():
        raise UsageError(f"unknown pass {name!r}{did_you_mean(name, known())}; `lorafx passes` lists them")
    module_name, _, attribute = known()[name].partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"pass {name!r} cannot be imported: {error}") from error
    if attribute:
        return _plugin_class(name, getattr(module, attribute, None))
    for value in vars(module).values():
        own = inspect.isclass(value) and value.__module__ == module.__name__
        if own and issubclass(value, Pass) and dataclasses.is_dataclass(value):
            return value
    raise UsageError(f"{module_name} defines no pass")


def in_recipes(step: object) -> bool:
    """Whether a recipe can name this pass."""
    from ..base import Pass

    if not isinstance(step, Pass) or step.pass_name() not in known():
        return False
    return isinstance(step, pass_class(step.pass_name()))


def _plugin_class(name: str, value: Any) -> type[Pass]:
    from ..base import Pass

    if not (inspect.isclass(value) and issubclass(value, Pass) and dataclasses.is_dataclass(value)):
        raise UsageError(
            f"plug-in pass {name!r}: {known()[name]} is not a pass (a frozen dataclass under lorafx.base.Pass)"
        )
    if value.pass_name() != name:
        # Recipes and run folders name a pass by its file; under another name they could not be read again.
        raise UsageError(f"plug-in pass {name!r} is in a file called {value.pass_name()!r}; give both the same name")
    return value


def options(cls: type[Pass]) -> dict[str, dataclasses.Field[Any]]:
    """The options of a pass, by name."""
    return {field.name: field for field in dataclasses.fields(cls)}
