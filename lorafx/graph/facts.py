"""What passes record for others to read: small types over the rows that a program's history keeps under a title.

A history keeps plain JSON values, so any pass may have titles and rows of its own; only what other modules read has a
type here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from .edit import Edit
    from .program import Program


@dataclass(frozen=True)
class Fact:
    """One row; subclasses define its title and its fields."""

    title: ClassVar[str]

    @classmethod
    def read(cls, row: Any) -> Self | None:
        """The fact in a row under this title; None for a row of another form, which is not ours."""
        names = {entry.name for entry in dataclasses.fields(cls)}
        return cls(**row) if isinstance(row, Mapping) and row.keys() == names else None

    @classmethod
    def noted(cls, program: Program) -> list[Self]:
        """All facts of this kind in a program's history, oldest first."""
        return [fact for row in program.facts(cls.title) if (fact := cls.read(row)) is not None]

    def note(self, edit: Edit) -> None:
        """Record the fact in the history, for the current pass."""
        edit.facts.setdefault(self.title, []).append(dataclasses.asdict(self))


@dataclass(frozen=True)
class Gathered(Fact):
    """A weight was left with the columns it uses: how long ``dimension`` was, and how long it is now."""

    title: ClassVar[str] = "Gathered"

    weight: str
    dimension: int
    before: int
    after: int


@dataclass(frozen=True)
class Removed(Fact):
    """A tensor lost channels: its sizes before and after, written as lists."""

    title: ClassVar[str] = "Removed"

    tensor: str
    before: str
    after: str


@dataclass(frozen=True)
class TakenOut(Fact):
    """A branch whose value was one vector left the graph: the module that gave it, how many operators went with it, and
    what is left of it (``nothing``, or ``a vector``)."""

    title: ClassVar[str] = "Taken out"

    module: str
    operators: int
    left: str


@dataclass(frozen=True)
class ZeroButKept(Fact):
    """Positions (``zero`` of ``of``) along a dimension of a weight that are all zeros and stay, and why."""

    title: ClassVar[str] = "Zero but kept"

    weight: str
    dimension: int
    zero: int
    of: int
    why: str
