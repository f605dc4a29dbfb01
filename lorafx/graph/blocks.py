"""Blocks: which repeated blocks of a model are meant, by their index."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError

_RANGE = re.compile(r"(-?[0-9]{1,9})(?:\.\.(-?[0-9]{1,9}))?")


@dataclass(frozen=True)
class Blocks:
    """Block ranges, inclusive; negative ends count from the last block of a stack (``-1`` is the last)."""

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, spec: str | int | Sequence[int | str]) -> Blocks:
        """Parse ``"0..5"``, ``"0..5,8"``, ``-1`` or a list of such. Raises :class:`UsageError`."""
        pieces = spec.split(",") if isinstance(spec, str) else [spec] if isinstance(spec, int) else spec
        if not isinstance(pieces, Sequence) or not pieces:
            raise UsageError(f"blocks {spec!r}: give an index, a range such as '0..5', or a list of them")
        return cls(tuple(cls._range(spec, str(piece).strip()) for piece in pieces))

    @staticmethod
    def _range(spec: object, piece: str) -> tuple[int, int]:
        found = _RANGE.fullmatch(piece)
        if found is None:
            raise UsageError(f"blocks {spec!r}: {piece!r} is neither an index nor a range such as '0..5'")
        first, last = int(found[1]), int(found[2] or found[1])
        # With mixed signs only the model decides which end is larger.
        if (first < 0) == (last < 0) and first > last:
            raise UsageError(f"blocks {spec!r}: {piece!r} ends before it starts; write '{last}..{first}'")
        return first, last

    def contains(self, block: int, last_block: int) -> bool:
        """Whether ``block`` is in a range, in a stack whose largest block index is ``last_block``."""

        def resolve(end: int) -> int:
            return end if end >= 0 else last_block + 1 + end

        return any(resolve(first) <= block <= resolve(last) for first, last in self.ranges)

    def __str__(self) -> str:
        return ",".join(f"{first}" if first == last else f"{first}..{last}" for first, last in self.ranges)
