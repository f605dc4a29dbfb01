"""A table on its way to what a model learns: which columns are read, and what they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..files.table import Table
from .labels import Classes, Names
from .metrics import Metric
from .rows import Prepared
from .tokens import Texts

if TYPE_CHECKING:
    from ..graph.program import Program
    from ..recipes.options import TrainOptions


@dataclass(frozen=True)
class Columns:
    """The columns that a task reads unless the options name others; None for one that it does without.

    Attributes:
        text, pair: the columns of texts
        label: the column of what is learned
    """

    text: str = "text"
    pair: str | None = None
    label: str | None = "label"


@dataclass(frozen=True)
class Reading:
    """A table, the program that learns from it, and how.

    Attributes:
        program: learns from it
        texts: the table, the tokenizer, and how many tokens are kept
        options: as training has them
        columns: what the task reads
        like: the prepared training table, when this is the evaluation table
    """

    program: Program
    texts: Texts
    options: TrainOptions
    columns: Columns
    like: Prepared | None = None

    @property
    def table(self) -> Table:
        """The rows."""
        return self.texts.table

    @property
    def text(self) -> str:
        """The column of the text."""
        return self.options.text or self.columns.text

    @property
    def pair(self) -> str | None:
        """The column of the second text, if there is one."""
        return self.options.text_pair or self.columns.pair

    @property
    def label(self) -> str:
        """The column of what is learned."""
        return self.options.label or self.columns.label or "label"

    def refuse(self, *options: str, learns: str = "no next tokens") -> None:
        """UsageError where one of these ``options`` is set: the task ``learns`` something that it is not for."""
        for name in options:
            if getattr(self.options, name):
                raise UsageError(f"{self.program.name} learns {learns}: leave {name} out")

    def classes(self) -> Classes:
        """The classes in the column of labels."""
        names = None if self.like is None else self.like.names
        return Classes(self.table, self.label, self.program.config, names, self.like is not None)


@dataclass(frozen=True)
class Learned:
    """What a table gives.

    Attributes:
        inputs: of every row, by name
        labels: of every row, by name
        names: numbers of the classes, when the table named them
        metric: measures these rows, where their labels alone do not do
    """

    inputs: Mapping[str, Sequence[Any]]
    labels: Mapping[str, Sequence[Any]]
    names: Names = None
    metric: Metric | None = None
