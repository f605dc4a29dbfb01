"""What a Trainer is given of a table: rows of model inputs, and what goes with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from .metrics import Metric


class Rows(Dataset[dict[str, Any]]):
    """Rows of model inputs: ``rows[i]`` is a dict of one row's."""

    def __init__(self, features: Mapping[str, Sequence[Any]]):
        self.features = dict(features)

    def __len__(self) -> int:
        return len(next(iter(self.features.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.features.items()}

    @property
    def digest(self) -> str:
        """sha256 of all rows in their order: the same for two tables that give a model the same inputs."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(json.dumps(self[index], sort_keys=True, default=lambda value: value.tolist()).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Prepared:
    """What a Trainer is given: the rows and how to batch them.

    Attributes:
        rows: a dataset of model inputs
        collator: makes a batch of a list of rows; None for the Trainer's own choice
        names: numbers of the classes, when the table named them
        cut: how many rows were longer than what is kept of one
        metric: measures these rows, where that takes more than their labels; else chosen by the model's task
    """

    rows: Any
    collator: Any = None
    names: Mapping[str, int] | None = None
    cut: int = 0
    metric: Metric | None = None
