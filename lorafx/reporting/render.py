"""For people: sections of rows and columns, drawn as plain text or as one HTML page."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
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
    if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
        columns = tuple(dict.fromkeys(key for row in value for key in row))
        return Section(title, columns, tuple(tuple(cell(row.get(name)) for name in columns) for row in value))
    if isinstance(value, Mapping):
        return Section(title, ("what", "value"), tuple((key, cell(inner)) for key, inner in value.items()))
    lines = value if isinstance(value, list) else [value]
    return Section(title, ("value",), tuple((cell(line),) for line in lines))


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
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
            numbers = all(_is_number(row[index]) for row in section.rows)
            drawn.add_column(name, justify="right" if numbers else "left", overflow="fold")
        for row in section.rows:
            drawn.add_row(*map(Text, row))
        console.print(Text(f"\n{section.title}"))
        console.print(drawn)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def draw_html(title: str, lines: Iterable[str], sections: Iterable[Section]) -> str:
    """Sentences and sections as one HTML page that needs no other file."""
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in lines)]
    for section in sections:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in section.columns)
        body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in section.rows)
        parts.append(f"<h2>{html.escape(section.title)}</h2><table><tr>{head}</tr>{body}</table>")
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))


def _html_cell(text: str) -> str:
    kind = ' class="number"' if text and _is_number(text) else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _is_number(text: str) -> bool:
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


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; margin: .5em 0 1.5em; }}
th, td {{ text-align: left; vertical-align: top; padding: .2em .8em .2em 0; border-bottom: 1px solid #8884; }}
td {{ overflow-wrap: anywhere; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #111; color: #ddd; }} }}
</style></head><body>
{body}
</body></html>
"""
