"""The texts that models are compared on, as token ids, and the folds that hold each of them out once."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import methods
from examples import assets

FOLDS = 5

Row = dict[str, Any]


def held_out(rows: Sequence[Row], fold: int) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and those that ``fold`` holds out: every fifth, beginning with the fold's number."""
    return [row for number, row in enumerate(rows) if number % FOLDS != fold], list(rows[fold::FOLDS])


@dataclass(frozen=True)
class Texts:
    """A data set of labelled texts.

    Attributes:
        files: its csv files (text, label), fetched when asked for
        length: tokens kept of a text
        epochs: passes over four fifths of it in a training
    """

    files: Callable[[], tuple[Path, ...]]
    length: int
    epochs: float


DATA = {
    "movies": Texts(lambda: assets.movie_split(), methods.LENGTH, methods.EPOCHS),
    "imdb": Texts(lambda: (assets.imdb(),), 128, 1.0),
}


def encoded(name: str, folder: Path) -> list[Row]:
    """The rows of a data set, tokenised once: kept in ``folder``, and read from there after that."""
    import numpy as np

    file, texts = folder / f"{name}-{DATA[name].length}.npz", DATA[name]
    if not file.is_file():
        rows = tokenised(texts)
        ids = [row["input_ids"] for row in rows]
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial.npz")
        np.savez_compressed(
            partial,
            ids=np.concatenate([np.asarray(row, np.uint16) for row in ids]),
            lengths=np.asarray([len(row) for row in ids], np.uint16),
            labels=np.asarray([row["labels"] for row in rows], np.uint8),
        )
        partial.replace(file)
    with np.load(file) as kept:
        ids, lengths, labels = kept["ids"].astype(np.int64), kept["lengths"].astype(int), kept["labels"].tolist()
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    return [_row(part.tolist(), label) for part, label in zip(parts, labels, strict=True)]


def _row(ids: list[int], label: int) -> Row:
    """What MiniLM's tokenizer says of a single text."""
    return {"input_ids": ids, "token_type_ids": [0] * len(ids), "attention_mask": [1] * len(ids), "labels": label}


def tokenised(texts: Texts) -> list[Row]:
    """The rows of a data set as MiniLM's tokenizer has them, in the files' order."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.minilm())
    found: list[Row] = []
    for path in texts.files():
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=texts.length)["input_ids"]
        found += [_row(part, int(row["label"])) for part, row in zip(ids, rows, strict=True)]
    return found
