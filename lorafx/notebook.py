"""How a notebook shows a value: a line, and folded tables; HTML that needs neither style nor script."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Protocol


class Table(Protocol):
    """A title, and rows of text under column names."""

    @property
    def title(self) -> str:
        """Shown while the table is folded."""
        ...

    @property
    def columns(self) -> Sequence[str]:
        """Names of the columns."""
        ...

    @property
    def rows(self) -> Iterable[Sequence[str]]:
        """The cells."""
        ...


def shown(lines: Iterable[str], tables: Iterable[Table] = (), *, opened: bool = False) -> str:
    """HTML of ``lines``, the first in bold, and of ``tables``, folded unless ``opened``."""
    first, *others = map(html.escape, lines)
    text = "".join(f"<div>{line}</div>" for line in (f"<b>{first}</b>", *others))
    return f"<div>{text}{''.join(_folded(table, opened) for table in tables)}</div>"


def _folded(table: Table, opened: bool) -> str:
    head = _row("th", table.columns) if len(table.columns) > 1 else ""
    body = "".join(_row("td", row) for row in table.rows)
    summary = f"<summary>{html.escape(table.title)}</summary>"
    return f"<details{' open' if opened else ''}>{summary}<table>{head}{body}</table></details>"


def _row(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
