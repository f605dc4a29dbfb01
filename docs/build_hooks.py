"""What the site is given as it is built: references written by the code they are about, and formulas as MathML.

Nothing here is about one page: a page has a marker (``<!-- passes -->``), or a formula between dollar signs.
"""

from __future__ import annotations

import dataclasses
import html
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from latex2mathml.converter import convert

from lorafx.cli import main
from lorafx.ranges import range_of
from lorafx.recipes.options import ModelOptions, TrainOptions
from lorafx.recipes.recipe import default_text, type_name
from lorafx.recipes.registry import known, options, pass_class

_ROOT = Path(__file__).parents[1]
#: Of a fence, what only the tests read: ```` ```bash no-run: needs a GPU ````.
_EXCUSE = re.compile(r"^( *```\w+) no-run:.*$", re.MULTILINE)
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):(<code>)[~.]?")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
#: The parts that begin a line of their own in a pass's docstring.
_PARTS = re.compile(r"^(Before|After|Keeps|Source): ", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the markers of a page."""
    for marker, written in _MARKERS.items():
        sign = f"<!-- {marker} -->"
        if sign in markdown:
            markdown = markdown.replace(sign, "\n".join(written()))
    return _EXCUSE.sub(r"\1", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as the browser draws them, and no markup of another kind left in docstrings."""
    return _FORMULA.sub(_drawn, _ROLE.sub(r"\1", content))


def _drawn(found: re.Match[str]) -> str:
    display = "block" if found[1] == "div" else "inline"
    drawn = convert(html.unescape(found[2]), display=display)
    return f'<div class="formula">{drawn}</div>' if display == "block" else drawn


def _passes() -> Iterator[str]:
    """Every pass: what it does, what it promises, its options."""
    for name in known():
        cls = pass_class(name)
        first, _, rest = (inspect.getdoc(cls) or "").partition("\n")
        yield from ("", f"## {name}", "", first.replace("``", "`"), "")
        yield _PARTS.sub(r"\n**\1**: ", rest.replace("``", "`"))
        yield from ("", f"Promise: {cls.promise.value}. In Python: `{cls.__module__}.{cls.__name__}`.", "")
        yield from _table(options(cls), cls)


def _table(fields: typing.Mapping[str, Any], cls: type) -> Iterator[str]:
    """Options as rows: their names, types with ranges, defaults, and what they do."""
    hints = typing.get_type_hints(cls)
    if not fields:
        return
    yield from ("| option | type | default | |", "|---|---|---|---|")
    for key, field in fields.items():
        held = " ".join(filter(None, (type_name(hints[key]), str(range_of(field) or ""))))
        value = getattr(cls(), key)
        shown = default_text(field, value)
        shown = shown if value in (None, (), {}) else _code(shown)
        yield f"| `{key}` | {_cell(held)} | {shown} | {_cell(field.metadata['help'])} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _of(cls: type) -> Callable[[], Iterator[str]]:
    def written() -> Iterator[str]:
        own = {entry.name: entry for entry in dataclasses.fields(cls)}
        groups: dict[str, dict[str, Any]] = {}
        group = ""
        for name, entry in own.items():
            group = entry.metadata.get("group") or group
            groups.setdefault(group, {})[name] = entry
        for title, fields in groups.items():
            yield from (["", f"## {title}", ""] if title else [""])
            yield from _table(fields, cls)

    return written


def _commands() -> Iterator[str]:
    """The help of every command, as the terminal prints it."""
    with click.Context(main, info_name="lorafx") as top:
        for name, command in main.commands.items():
            yield from _help(command, f"lorafx {name}", top)


def _help(command: click.Command, name: str, above: click.Context) -> Iterator[str]:
    settings = {"terminal_width": 88, "max_content_width": 88, "help_option_names": ["-h", "--help"]}
    with click.Context(command, info_name=name, parent=None, **settings) as ctx:
        yield from ("", f"## {name}", "", "```text", ctx.get_help(), "```")
        if isinstance(command, click.Group):
            for inner, own in command.commands.items():
                yield from _help(own, f"{name} {inner}", ctx)


def _results() -> Iterator[str]:
    """The measurements, whose links lead from another folder."""
    yield (_ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8").replace("](../docs/", "](../")


def _order() -> Iterator[str]:
    """The order of the folders, as contributors are told it."""
    text = (_ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    yield from ("```text", text[text.index("## The order of the folders") :].split("```")[1].strip(), "```")


def _folders() -> Iterator[str]:
    """The README's table of folders."""
    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    start = text.index("| folder |")
    yield text[start : text.index("\n\n", start)]


_MARKERS: dict[str, Callable[[], Iterator[str]]] = {
    "passes": _passes,
    "commands": _commands,
    "training options": _of(TrainOptions),
    "model options": _of(ModelOptions),
    "results": _results,
    "order": _order,
    "folders": _folders,
}
