"""Which dead channels go: as many as leave every tensor rectangular, with widths that suit the hardware."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .axes import Axes, flat
from .axis import Array, Axis


@dataclass(frozen=True)
class Widths:
    """Which widths are wanted.

    Attributes:
        round_to: widths are multiples of this, where the full width is more
        at_least: the smallest width, unless the full one is smaller
        uniform: the same widths in every block
    """

    round_to: int = 1
    at_least: int = 1
    uniform: bool = False

    def of(self, count: int, full: int) -> int:
        """The width for ``count`` channels out of ``full``."""
        wanted = max(count, self.at_least, 1)
        return min(full, -(-wanted // self.round_to) * self.round_to)


class Removal:
    """The channels that go, given those that are needed.

    Starts with all that nothing needs, and takes back what would leave a tensor empty, ragged or of another width than
    is wanted, until nothing changes.
    """

    def __init__(self, axes: Axes, need: Array, widths: Widths):
        self.axes = axes
        self.widths = widths
        self._step = np.zeros(axes.count, bool)
        self._step[axes.tied_class[need[axes.channel]]] = True
        self._row = np.zeros(axes.row_count + 1, bool)  # the last one, -1, stands for "in no row"
        self._row[axes.head_row[need[axes.channel]]] = True
        self._row[[-1, *axes.held_rows]] = True
        self.values = _distinct(axes)
        self._settle()

    def stays(self, labels: Array) -> Array:
        """For each label, whether its channel stays."""
        return self._step[self.axes.tied_class[labels]] & self._row[self.axes.head_row[labels]]

    def shape(self, axis: Axis) -> tuple[int, ...]:
        """The sizes of an axis' dimensions afterwards."""
        kept = self.stays(axis.data)
        sizes = []
        for _ in range(kept.ndim - 1):
            alive = kept.reshape(kept.shape[0], -1).any(1)
            sizes.append(int(alive.sum()))
            kept = kept[alive.argmax()]
        return (*sizes, int(kept.sum()))

    def _restore(self, labels: Array) -> None:
        self._step[self.axes.tied_class[labels]] = True
        self._row[self.axes.head_row[labels]] = True

    # ---- until nothing changes

    def _settle(self) -> None:
        while True:
            before = self._step.sum() + self._row.sum()
            for data in self.values:
                self._rectangle(data)
            for wide, narrow in self.axes.per_row:
                self._per_row(wide, narrow)
            for labels in self._widest():
                self._restore(labels)
            for labels, multiple in self.axes.aligned:
                self._align(labels, multiple)
            if before == self._step.sum() + self._row.sum():
                return

    def _rectangle(self, data: Array) -> None:
        """Every part of a value keeps something; rows that stay keep the same number of channels."""
        flat = data.reshape(-1, data.shape[-1])
        kept = self.stays(flat)
        counts = kept.sum(1)
        if not counts.any():
            rows = self.axes.head_row[flat[0]]
            self._restore(flat[0, : self.widths.of(1, flat.shape[1])])
            # A head that stays alone stays whole: kernels, caches and configs know one width of query, key and value.
            self._restore(flat[0][(rows == rows[0]) & (rows >= 0)])
            return
        structured = data.ndim > 1 or bool((self.axes.head_row[flat] < 0).all())
        most = int(counts.max())
        target = self.widths.of(most, flat.shape[1]) if structured else most
        # A row stays for all that has it (query, key and value of a head), even if one of them could do without.
        rows = self.axes.head_row[flat[:, 0]]
        inside = (rows >= 0) & (self.axes.head_row[flat] == rows[:, None]).all(1)
        alive = np.where(inside & (data.ndim > 1), self._row[rows], counts > 0)
        for row in np.flatnonzero(alive & (counts < target)):
            self._restore(self._fewest(flat[row][~kept[row]], target - counts[row]))
        if data.ndim > 2:
            self._rectangle_of_rows(data, alive.reshape(data.shape[:-1]), target)

    def _per_row(self, wide: Array, narrow: Array) -> None:
        """A row and its entry stay together."""
        alive = self.stays(wide).any(-1, keepdims=True) | self.stays(narrow)
        self._restore(np.broadcast_to(narrow, alive.shape)[alive])
        self._row[self.axes.head_row[wide[..., :1][alive]]] = True

    def _fewest(self, lacking: Array, count: int) -> Array:
        """The first of these labels that together bring back enough; one may be in several places (gate and up of a
        unit)."""
        _, first, places = np.unique(self.axes.tied_class[lacking], return_index=True, return_counts=True)
        order = np.argsort(first)
        enough = np.searchsorted(np.cumsum(places[order]), count) + 1
        return lacking[first[order][:enough]]

    def _rectangle_of_rows(self, data: Array, alive: Array, target: int) -> None:
        """Rows in rows: where one stays, the same number stay beside it."""
        counts = alive.sum(-1)
        most = int(counts.max())
        for place in zip(*np.nonzero((counts > 0) & (counts < most)), strict=True):
            for lacking in np.flatnonzero(~alive[place])[: most - int(counts[place])]:
                self._restore(data[place][lacking][:target])

    def _align(self, labels: Array, multiple: int) -> None:
        while (kept := self.stays(labels)).sum() % multiple and not kept.all():
            self._restore(labels[~kept][:1])

    def _widest(self) -> Iterator[Array]:
        """With uniform widths, what to take back so that a tensor of one place is alike in every block."""
        if not self.widths.uniform:
            return
        groups: dict[tuple[str, int, int], list[Array]] = {}
        for name, dims in self.axes.members.items():
            for dim, labels in enumerate(dims):
                if labels.size > 1:
                    groups.setdefault((re.sub(r"\.\d+\.", ".*.", name), dim, labels.size), []).append(labels)
        for alike in groups.values():
            rows = max(len(self._rows(labels)) for labels in alike)
            inside = max(int(self.stays(labels).sum()) // max(1, len(self._rows(labels))) for labels in alike)
            for labels in alike:
                yield from self._take_back(labels, rows, inside)

    def _rows(self, labels: Array) -> Array:
        """The rows that stay among labels; one for all when they lie in none."""
        rows = self.axes.head_row[labels]
        return np.unique(rows[self.stays(labels)])

    def _take_back(self, labels: Array, rows: int, inside: int) -> Iterator[Array]:
        every, staying = np.unique(self.axes.head_row[labels]), self._rows(labels)
        chosen = [*staying, *(row for row in every if row not in staying)][:rows]
        for row in chosen:
            own = labels[self.axes.head_row[labels] == row]
            kept = self.stays(own)
            if kept.sum() < inside:
                yield own[~kept][: inside - int(kept.sum())]


def _distinct(axes: Axes) -> list[Array]:
    """The labels of every axis of every value and tensor, each once."""
    found: dict[tuple[tuple[int, ...], bytes], Array] = {}
    for known in axes.known.values():
        for axis in flat(known):
            found.setdefault((axis.data.shape, np.ascontiguousarray(axis.data).tobytes()), axis.data)
    return list(found.values())
