"""Tables: read csv, tsv, jsonl, json and parquet, and know the place of every row, so that a message can name it.

Python's own csv and json readers give the line of every row; a table of texts fits in memory. Anything larger is what a
dataset of one's own is for: :func:`lorafx.train` takes rows of model inputs as they are.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, UsageError, did_you_mean, first_line
from .folder import is_lfs_pointer

#: Longest csv field, in characters; the reader's own default is 131,072.
_LONGEST_FIELD = 2**31 - 1


@dataclass(frozen=True)
class Table:
    """Rows of named columns, and where each row stands in its file.

    Attributes:
        name: its name in messages, the path of the file
        columns: a list of values per column, all of one length; None where a row has no value
        places: where each row is, e.g. ``line 7``
        classes: the class names that a dataset has for the integers of a column, by column
    """

    name: str
    columns: Mapping[str, list[Any]]
    places: Sequence[str]
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.places)

    def column(self, name: str) -> list[Any]:
        """The values of a column. ArtifactError when there is none of that name, or a row has no value for it."""
        if name not in self.columns:
            hint, have = did_you_mean(name, self.columns), ", ".join(map(repr, self.columns)) or "none"
            raise ArtifactError(f"{self.name}: no column {name!r}{hint}; its columns: {have}")
        values = self.columns[name]
        for row, value in enumerate(values):
            if value is None:
                raise self.error(row, f"no value for {name!r}; fill it in or remove the row")
        return values

    def texts(self, name: str) -> list[str]:
        """A column of texts. ArtifactError names the first row whose value is not a text."""
        values = self.column(name)
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise self.error(row, f"{name!r} is {short(value)}, not a text")
        return values

    def error(self, row: int, what: str) -> ArtifactError:
        """The error of one row: file, place, and what is wrong."""
        return ArtifactError(f"{self.name}, {self.places[row]}: {what}")


def short(value: object) -> str:
    """A value as shown in a message."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


# ---- reading


def read_table(path: str | PathLike[str]) -> Table:
    """Read a ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` or ``.parquet`` file.

    Raises:
        ArtifactError: no such file, an unknown suffix, an empty file, or a row that cannot be read (with its line)
        UsageError: a parquet file without pyarrow to read it
    """
    file = Path(path)
    reader = _READERS.get(file.suffix.lower())
    if not file.is_file():
        raise ArtifactError(f"{file}: {'a folder, not a file' if file.is_dir() else 'no such file'}")
    if reader is None:
        raise ArtifactError(f"{file}: unknown kind of table {file.suffix!r}; known: {', '.join(_READERS)}")
    if is_lfs_pointer(file):
        raise ArtifactError(f"{file}: a git-lfs pointer, not the table; run `git lfs pull` in that folder")
    try:
        table = reader(file)
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{file}: not UTF-8 text (byte {error.start}); convert it first") from None
    if not len(table):
        raise ArtifactError(f"{file}: no rows")
    return table


def _read_csv(file: Path, delimiter: str = ",") -> Table:
    rows: list[list[str]] = []
    places: list[str] = []
    with file.open(encoding="utf-8-sig", newline="") as stream, _long_fields():
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        line = 1
        try:
            for row in reader:
                if row:
                    rows.append(row)
                    places.append(f"line {line}")
                line = reader.line_num + 1
        except csv.Error as error:
            raise ArtifactError(f"{file}, line {line}: {error}; check the quotes") from None
    if not rows:
        raise ArtifactError(f"{file}: empty; its first line names the columns")
    header, *body = rows
    for name in header:
        if header.count(name) > 1:
            raise ArtifactError(f"{file}, line 1: two columns are called {name!r}")
    for row, place in zip(body, places[1:], strict=True):
        if len(row) != len(header):
            found = f"{len(row)} fields where the first line names {len(header)}"
            raise ArtifactError(f"{file}, {place}: {found}; quote texts that contain {delimiter!r}")
    columns = {name: [row[position] for row in body] for position, name in enumerate(header)}
    return Table(str(file), columns, places[1:])


@contextmanager
def _long_fields() -> Iterator[None]:
    # The limit is a setting of the whole process.
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_tsv(file: Path) -> Table:
    return _read_csv(file, "\t")


def _read_jsonl(file: Path) -> Table:
    rows, places = [], []
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                rows.append(_json(line, f"{file}, line {number}"))
                places.append(f"line {number}")
    return _from_rows(str(file), rows, places)


def _read_json(file: Path) -> Table:
    text = file.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return _read_jsonl(file)
    rows = _json(text, str(file))
    return _from_rows(str(file), rows, [f"row {number}" for number in range(1, len(rows) + 1)])


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: not valid JSON ({error})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where it has two values of one name, of which a parser keeps the last."""
    names = [name for name, _ in pairs]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise ValueError(f"two values are called {twice!r}")
    return dict(pairs)


def _from_rows(name: str, rows: Sequence[Any], places: Sequence[str]) -> Table:
    for row, place in zip(rows, places, strict=True):
        if not isinstance(row, Mapping):
            raise ArtifactError(f"{name}, {place}: expected an object of named values, found {short(row)}")
    names = dict.fromkeys(key for row in rows for key in row)
    return Table(name, {key: [row.get(key) for row in rows] for key in names}, places)


def _read_parquet(file: Path) -> Table:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UsageError(f"{file}: reading parquet needs pyarrow; pip install 'lorafx[parquet]'") from None
    try:
        table = parquet.read_table(file)
    except (ArrowException, OSError) as error:
        raise ArtifactError(f"{file}: not a readable parquet file ({first_line(error)})") from None
    return table_of(table.to_pydict(), str(file))


_READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def table_of(value: Any, name: str = "data") -> Table:
    """A table from a path, a mapping of columns, rows (mappings), a ``datasets.Dataset``, or a frame of pandas."""
    if isinstance(value, Table):
        return value
    if isinstance(value, (str, PathLike)):
        return read_table(value)
    if is_frame(value):
        return _of_columns(name, _frame_columns(value, name))
    if hasattr(value, "column_names") and hasattr(value, "__len__"):
        columns = {column: list(value[column]) for column in value.column_names}
        return _of_columns(name, columns, _declared(getattr(value, "features", None) or {}))
    if isinstance(value, Mapping):
        return _of_columns(name, value)
    if not isinstance(value, Iterable):
        raise UsageError(f"{name}: expected a file, columns or rows, got {type(value).__name__}")
    rows = list(value)
    return _from_rows(name, rows, [f"row {number}" for number in range(1, len(rows) + 1)])


def _of_columns(name: str, value: Mapping[Any, Any], classes: Mapping[str, Sequence[str]] | None = None) -> Table:
    lengths = {column: len(values) for column, values in value.items()}
    most = max(lengths.values(), default=0)
    lacking = [column for column, length in lengths.items() if length != most]
    if lacking:
        found = lengths[lacking[0]]
        raise ArtifactError(f"{name}: column {lacking[0]!r} has {found} values where others have {most}")
    columns = {str(column): list(values) for column, values in value.items()}
    return Table(name, columns, [f"row {number}" for number in range(1, most + 1)], classes or {})


# ---- tables of other libraries


def is_frame(value: Any) -> bool:
    """Whether ``value`` is a frame of pandas; without importing it."""
    return type(value).__module__.partition(".")[0] == "pandas" and hasattr(value, "columns")


def _frame_columns(frame: Any, name: str) -> dict[str, list[Any]]:
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise ArtifactError(f"{name}: two columns are called {twice!r}")
    # What pandas has for no value (NaN, NaT, NA) is None here. A list in a cell is a value.
    plain = frame.astype(object).where(frame.notna(), None)
    return {str(column): plain[column].tolist() for column in plain.columns}


def _declared(features: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """The class names of ``datasets.ClassLabel`` columns, and of lists of them."""
    found = {name: getattr(getattr(feature, "feature", feature), "names", None) for name, feature in features.items()}
    return {name: list(names) for name, names in found.items() if names}
