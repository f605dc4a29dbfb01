"""Labels of a table as a loss takes them: classes by number, several in a row, one for each word, or numbers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ArtifactError, did_you_mean
from ..files.table import Table, short

Names = Mapping[str, int] | None


@dataclass(frozen=True)
class Classes:
    """The classes of a column on their way to numbers.

    Attributes:
        table: where they stand
        column: its name
        config: the model's; class names it does not know are recorded there
        like: the numbers of the training table's class names (None when it has none), when this is for evaluation
        known: whether there is such a table
    """

    table: Table
    column: str
    config: Any
    like: Names = None
    known: bool = False

    def of_rows(self) -> tuple[list[int], Names]:
        """The class of every row as a number, and the numbers of the class names if the table has names; see
        :meth:`numbered`."""
        return self.numbered(list(enumerate(self.table.column(self.column))))

    def of_sets(self) -> tuple[list[list[float]], Names]:
        """For every row a 1 for each class that it has, else 0; the column holds lists of classes, or several columns
        (separated by commas) hold 0 and 1 and are called like the classes.

        ArtifactError as for :meth:`numbered`, or for a value that is neither a list, nor 0 or 1.
        """
        columns = [name.strip() for name in self.column.split(",")]
        if self.column not in self.table.columns and len(columns) > 1:
            return self._of_columns(columns)
        lists = listed(self.table, self.column)
        entries = [(row, value) for row, values in enumerate(lists) for value in values]
        numbers, names = self.numbered(entries)
        sets = [[0.0] * self.config.num_labels for _ in lists]
        for (row, _), number in zip(entries, numbers, strict=True):
            sets[row][number] = 1.0
        return sets, names

    def _of_columns(self, columns: list[str]) -> tuple[list[list[float]], Names]:
        by_column = {}
        for name in columns:
            found = [integer(value) for value in self.table.column(name)]
            odd = next((row for row, value in enumerate(found) if value not in (0, 1)), None)
            if odd is not None:
                raise self.table.error(odd, f"{name!r} is {short(self.table.column(name)[odd])}, neither 0 nor 1")
            by_column[name] = found
        names = self.like or self._record(columns, sort=False)
        odd = next((name for name in columns if name not in names), None)
        if odd is not None:
            raise ArtifactError(f"{self.table.name}: {odd!r} is none of the classes: {_some(names)}")
        sets = [[0.0] * self.config.num_labels for _ in range(len(self.table))]
        for name, found in by_column.items():
            for row, value in enumerate(found):
                sets[row][names[name]] = float(value or 0)
        return sets, names

    def numbered(self, entries: Sequence[tuple[int, Any]]) -> tuple[list[int], Names]:
        """The number of every class, given with its row, and the numbers of the class names if they are names.

        Integers are taken as they are. Class names get the numbers the config has for them; names it does not know are
        sorted, numbered from 0, and recorded as the config's ``id2label`` and ``label2id``. So are those that a
        ``datasets.Dataset`` has for its integers.

        Raises:
            ArtifactError: a row without a label, an integer the head has no class for, names and integers mixed, more
                names than the head has classes, or a name the training table does not have
        """
        declared = self.table.classes.get(self.column)
        if declared and (self.like is not None or not self.known):
            return self._declared(entries, declared)
        numbers = [integer(value) for _, value in entries]
        integers = sum(number is not None for number in numbers)
        if self.like is None and (integers or self.known or not entries):
            for (row, value), number in zip(entries, numbers, strict=True):
                self._check(row, value, number, self.config.num_labels)
            return [number for number in numbers if number is not None], None
        texts = self._texts(entries)
        return self._by_name(entries, texts, self.like or self._record(texts, sort=True))

    def _declared(self, entries: Sequence[tuple[int, Any]], declared: Sequence[str]) -> tuple[list[int], Names]:
        """Integers that a dataset has names for are what these names say, whatever numbers a config gives them."""
        found = [integer(value) for _, value in entries]
        for (row, value), number in zip(entries, found, strict=True):
            self._check(row, value, number, len(declared))
        texts = [declared[number] for number in found if number is not None]
        return self._by_name(entries, texts, self.like or self._record(declared, sort=False))

    def _by_name(
        self, entries: Sequence[tuple[int, Any]], texts: Sequence[str], names: Mapping[str, int]
    ) -> tuple[list[int], Names]:
        for (row, _), text in zip(entries, texts, strict=True):
            if text not in names:
                hint = did_you_mean(text, names)
                raise self.table.error(row, f"label {text!r} is none of the classes{hint}: {_some(names)}")
        return [names[text] for text in texts], names

    def _check(self, row: int, value: Any, number: int | None, count: int) -> None:
        if number is None:
            raise self.table.error(row, f"label {short(value)} is not an integer, as other labels are")
        if not 0 <= number < count:
            classes = f"the head has {count} classes, 0 to {count - 1}"
            raise self.table.error(row, f"label {number}, but {classes}; number the classes from 0, or set num_labels")

    def _texts(self, entries: Sequence[tuple[int, Any]]) -> list[str]:
        for row, value in entries:
            if not isinstance(value, str) or not value:
                number = integer(value)
                wrong = "neither an integer nor a class name" if number is None else "no class name, as others are"
                raise self.table.error(row, f"label {short(value)} is {wrong}")
        return [value for _, value in entries]

    def _record(self, texts: Sequence[str], *, sort: bool) -> dict[str, int]:
        found = sorted(set(texts)) if sort else list(dict.fromkeys(texts))
        known = {str(name): int(number) for name, number in (self.config.label2id or {}).items()}
        if all(name in known for name in found):
            return known
        if len(found) > self.config.num_labels:
            raise ArtifactError(
                f"{self.table.name}: {len(found)} classes in {self.column!r} ({_some(found)}), but the head has "
                f"{self.config.num_labels}; rewrite the checkpoint with num_labels = {len(found)}"
            )
        spare = [f"LABEL_{number}" for number in range(len(found), self.config.num_labels)]
        self.config.id2label = dict(enumerate([*found, *spare]))
        self.config.label2id = {name: number for number, name in self.config.id2label.items()}
        return {name: number for number, name in enumerate(found)}


def listed(table: Table, column: str, words: bool = False) -> list[list[Any]]:
    """A column of lists: as they are, or written as JSON; with ``words`` also a text of words separated by spaces.
    ArtifactError names the row without a list."""
    found = []
    for row, value in enumerate(table.column(column)):
        if isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]"):
            value = _json_list(value, words)
        if isinstance(value, str):
            value = value.split() if words else value
        elif hasattr(value, "tolist"):  # an array, as pandas has it
            value = value.tolist()
        if not isinstance(value, (list, tuple)):
            wanted = "a list (in a csv: one in JSON" + (", or words with spaces between)" if words else ")")
            raise table.error(row, f"{column!r} is {short(value)}, not {wanted}")
        found.append(list(value))
    return found


def _json_list(value: str, words: bool) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value  # words in brackets; or not a list, which is reported below


#: How a table may write integers: Python would also read 1_0 as 10.
_INTEGER = re.compile(r"\s*[+-]?[0-9]+\s*")
_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")


def integer(value: Any) -> int | None:
    """A value of a table as an integer, None when it is not one."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, int) or (isinstance(value, str) and _INTEGER.fullmatch(value)):
        return int(value)
    return None


def _some(names: Iterable[str], most: int = 6) -> str:
    shown = list(names)
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")


def numbers(table: Table, column: str) -> list[float]:
    """A column of numbers. ArtifactError names the first row whose value is not a finite number."""
    values = table.column(column)
    for row, value in enumerate(values):
        written = _NUMBER.fullmatch(value) if isinstance(value, str) else isinstance(value, (int, float))
        if not written or not math.isfinite(float(value)):
            raise table.error(row, f"label {short(value)} is not a number")
    return [float(value) for value in values]
