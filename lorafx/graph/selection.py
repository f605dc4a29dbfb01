"""What a pass would rewrite and what it would not, and why: plain data, free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .site import Site


@dataclass(frozen=True)
class Miss:
    """A site that was not taken, and why."""

    site: Site
    reason: str


@dataclass(frozen=True)
class Selection:
    """What a pass would rewrite (``taken``) and what it would not (``missed``). Printable: this is the dry run."""

    taken: tuple[Site, ...]
    missed: tuple[Miss, ...] = ()
