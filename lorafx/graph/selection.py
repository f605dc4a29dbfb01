"""What a pass would rewrite and what it would not, and why: plain data, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

#: A pass's kind of site: the use of a weight, a node, a name, a plan. Selections are read-only, so the type is
#: covariant.
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Miss(Generic[T_co]):
    """A site that was not taken, and why."""

    site: T_co
    reason: str


@dataclass(frozen=True)
class Selection(Generic[T_co]):
    """What a pass would rewrite (``taken``) and what it would not (``missed``). Printable: this is the dry run."""

    taken: tuple[T_co, ...]
    missed: tuple[Miss[T_co], ...] = ()
