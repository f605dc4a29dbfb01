"""Sentence embeddings from pairs of texts: each text is embedded by itself, and pairs are told apart from all other
texts of a batch, or have a target similarity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .labels import numbers
from .metrics import Metric
from .reading import Learned, Reading

#: Texts compared with all others at a time.
_CHUNK = 1000


def learn_pairs(reading: Reading) -> Learned:
    """The inputs of both texts of every row, side by side, and which texts they are; with a label, the target cosine.

    Raises:
        ArtifactError: a label that is not a cosine
        UsageError: a batch in which there is nothing to tell a pair from; a column of labels that the options do not
            mention
    """
    options, table = reading.options, reading.table
    pair = reading.pair or "text_pair"
    reading.refuse("chat", "packing")
    if options.label is None and "label" in table.columns:
        raise UsageError(
            f"{table.name}: there is a column 'label': say label='label' to learn it as the cosine of each pair, or "
            "label='' to learn that pairs belong together"
        )
    if not options.label and options.batch_size < 2:
        raise UsageError("batch_size = 1: a pair is told from the others of its batch, and there are none; give 2")
    sides = [reading.texts.encode(column) for column in (reading.text, pair)]
    inputs = {key: [list(both) for both in zip(*(side[key] for side in sides), strict=True)] for key in sides[0]}
    if not options.label:
        known: dict[str, int] = {}
        both = zip(table.texts(reading.text), table.texts(pair), strict=True)
        labels = [[known.setdefault(text, len(known)) for text in texts] for texts in both]
        return Learned(inputs, {"labels": labels}, metric=FOUND)
    wanted = numbers(table, options.label)
    for row, value in enumerate(wanted):
        if abs(value) > 1:
            raise table.error(row, f"label {value:g} is not a cosine, which lies between -1 and 1; scale the column")
    return Learned(inputs, {"labels": wanted}, metric=SIMILAR)


@dataclass(frozen=True)
class PairCollator:
    """Makes a batch of pairs: inputs of (pairs, 2, length), and labels. ``padding`` makes a batch of single texts."""

    padding: Any

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch of ``rows``."""
        names = [name for name in rows[0] if name != "labels"]
        flat = [{name: row[name][side] for name in names} for row in rows for side in (0, 1)]
        padded = self.padding(flat)
        batch = {name: value.unflatten(0, (-1, 2)) for name, value in padded.items()}
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


# ---- what is measured


def _as_they_are(embeddings: Tensor, labels: Any) -> Tensor:
    return torch.nn.functional.normalize(embeddings.float(), dim=-1)


def _ranks(embeddings: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For every first text the rank of its own second text among those of all rows, leaving out others that also belong
    to it; 1 is the nearest."""
    first, second = embeddings[:, 0], embeddings[:, 1]
    ranks = []
    for start in range(0, len(first), _CHUNK):
        here = np.arange(start, min(start + _CHUNK, len(first)))
        scores = first[here] @ second.T
        alike = (labels[here, None] == labels[None]).any(-1)
        own = scores[np.arange(len(here)), here]
        ranks.append(1 + ((scores >= own[:, None]) & ~alike).sum(1))
    return np.concatenate(ranks)


def _at_once(embeddings: np.ndarray, labels: np.ndarray) -> float:
    return float((_ranks(embeddings, labels) == 1).mean())


def _reciprocal(embeddings: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"mrr": float((1 / _ranks(embeddings, labels)).mean())}


def _places(values: np.ndarray) -> np.ndarray:
    """The rank of every value; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where either is always the same."""
    one, other = _places(a), _places(b)
    return float(np.corrcoef(one, other)[0, 1]) if np.ptp(one) and np.ptp(other) else 0.0


def _correlation(embeddings: np.ndarray, labels: np.ndarray) -> float:
    return spearman((embeddings[:, 0] * embeddings[:, 1]).sum(-1).astype(float), labels)


FOUND = Metric("recall_at_1", True, _as_they_are, _at_once, _reciprocal)
SIMILAR = Metric("spearman", True, _as_they_are, _correlation)
