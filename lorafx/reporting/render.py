"""For people: sections of rows and columns, and those drawn as plain text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Section:
    """A title, and rows of text under column names."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def section_of(title: str, value: Any) -> Section:
    """Any JSON value as a section: a list of objects has a column for each key, an object a row for each."""
    if _is_rows(value):
        columns = tuple(dict.fromkeys(key for row in value for key in row))
        rows = tuple(tuple(cell(row.get(name)) for name in columns) for row in value)
        return Section(title, tuple(map(_words, columns)), rows)
    if isinstance(value, Mapping):
        return Section(title, ("what", "value"), tuple((_words(key), cell(inner)) for key, inner in value.items()))
    lines = value if isinstance(value, list) else [value]
    return Section(title, ("value",), tuple((cell(line),) for line in lines))


def sections_of(title: str, value: Any) -> Iterator[Section]:
    """Any JSON value as sections: what an object holds that is an object or rows itself has a section of its own."""
    if not isinstance(value, Mapping):
        yield section_of(title, value)
        return
    inner = {key: part for key, part in value.items() if isinstance(part, Mapping) or _is_rows(part)}
    plain = {key: part for key, part in value.items() if key not in inner and part not in ([], {}, None)}
    if plain:
        yield section_of(title, plain)
    for key, part in inner.items():
        if part:
            yield from sections_of(f"{title}: {key}", part)


def _words(key: str) -> str:
    """A key as people read it: ``eval_accuracy`` is two words."""
    return key.replace("_", " ")


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def cell(value: Any) -> str:
    """A JSON value as short text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(key)} {cell(inner)}" for key, inner in value.items())
    return ", ".join(map(cell, value)) if isinstance(value, list) else str(value)


def draw_text(lines: Iterable[str], sections: Iterable[Section], width: int) -> str:
    """Sentences and sections as plain text no wider than ``width`` columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    for line in lines:
        console.print(Text(line))
    for section in sections:
        drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=len(section.columns) > 1)
        for index, name in enumerate(section.columns):
            numbers = all(is_number(row[index]) for row in section.rows)
            drawn.add_column(name, justify="right" if numbers else "left", overflow="fold")
        for row in section.rows:
            drawn.add_row(*map(Text, row))
        console.print(Text(f"\n{section.title}"))
        console.print(drawn)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def is_number(text: str) -> bool:
    """Whether a cell is a figure, which is set flush right."""
    return re.fullmatch(r"[-+]?[\d,]*\.?\d*(e[-+]?\d+)?[x%]?", text) is not None


def braced(paths: Iterable[str]) -> list[str]:
    """Dotted paths that differ in their first number only, as one: ``layer.0.q``, ``layer.1.q`` → ``layer.{0..1}.q``.

    The results are globs, so they can be pasted into a recipe as targets.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for path in dict.fromkeys(paths):
        match = re.search(r"(?:^|(?<=\.))\d+(?=\.|$)", path)
        key = (path,) if match is None else (path[: match.start()], path[match.end() :])
        groups.setdefault(key, []).extend([] if match is None else [int(match[0])])
    return [_numbers(numbers).join(key) for key, numbers in groups.items()]


def _numbers(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return parts[0] if len(numbers) == 1 else "{" + ",".join(parts) + "}"
