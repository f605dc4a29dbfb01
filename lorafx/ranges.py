"""The values an option may have beyond its type: declared with the option, checked where the options are made."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import RecipeError

#: Classes that a head may have: more than any collection of labels, few enough for their names to be listed.
MOST_LABELS = 10_000_000


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers; ``above`` and ``below`` leave out the end that ``least`` and ``most`` allow."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    whole: bool = False

    def __str__(self) -> str:
        ends = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        numbers = {word: end if isinstance(end, int) else f"{end:g}" for word, end in ends.items() if end is not None}
        return " and ".join(f"{word} {number}" for word, number in numbers.items())

    def flaw(self, value: Any) -> str | None:
        """What is wrong with ``value``, or None when it is inside."""
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
            return "is not a finite number"
        if self.whole and not isinstance(value, numbers.Integral):
            return "is not an integer"
        number: Any = value  # a number of any library's
        inside = (
            (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )
        return None if inside else f"but it is {self}"


def range_of(field: dataclasses.Field[Any]) -> Range | None:
    """The range an option was declared with, or None."""
    return field.metadata.get("range")


def check_ranges(options: Any, where: str) -> None:
    """RecipeError, naming ``where``, the option, its value and its range, for the first option outside its own.

    None is not checked; of a list or table, each value is.
    """
    for field in dataclasses.fields(options):
        allowed, given = range_of(field), getattr(options, field.name)
        if allowed is None or given is None:
            continue
        several = given.values() if isinstance(given, Mapping) else given if isinstance(given, tuple) else (given,)
        for flaw in filter(None, map(allowed.flaw, several)):
            comma = "," if flaw.startswith("but") else ""
            raise RecipeError(f"{where}: {field.name} = {given!r}{comma} {flaw} ({field.metadata['help']})")
