"""What one operator says about the labels it reads: an account that is closed after each rule.

Every label of every operand has to be accounted for: it goes on in the result, is one with (or tied to) a label
that does, is contracted, is left out unread, or is pinned. A rule that forgets an axis therefore cannot free it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from .axis import Array, Axis


class Classes:
    """Labels joined into classes (union-find): the smallest label of a class represents it."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Array, Array]] = []

    def join(self, a: Array, b: Array) -> None:
        """Entries at one place of two arrays (broadcast against each other) are of one class."""
        a, b = np.broadcast_arrays(a, b)
        self._pairs.append((a.ravel(), b.ravel()))

    def solve(self, count: int) -> Array:
        """The class of each of ``count`` labels."""
        lowest = np.arange(count)
        if not self._pairs:
            return lowest
        left = np.concatenate([a for a, _ in self._pairs])
        right = np.concatenate([b for _, b in self._pairs])
        while True:
            before = lowest.copy()
            smaller = np.minimum(lowest[left], lowest[right])
            np.minimum.at(lowest, lowest[left], smaller)
            np.minimum.at(lowest, lowest[right], smaller)
            lowest = lowest[lowest]
            if np.array_equal(before, lowest):
                return lowest


class Account:
    """What one rule says about labels."""

    def __init__(self) -> None:
        self._joined: list[tuple[Array, Array]] = []
        self._closed: list[Array] = []

    def join(self, a: Array, b: Array) -> None:
        """Entries at one place (broadcast against each other) stay or go together."""
        a, b = np.broadcast_arrays(a, b)
        self._joined.append((a.ravel(), b.ravel()))

    def close(self, labels: Array) -> None:
        """These are accounted for."""
        self._closed.append(labels.ravel())

    def open(self, read: list[Array]) -> Array:
        """Those of the labels ``read`` that the result does not account for."""
        labels = np.unique(np.concatenate([np.empty(0, int), *(data.ravel() for data in read)]))
        sides = [side for pair in self._joined for side in pair]
        every = np.unique(np.concatenate([labels, *self._closed, *sides]))
        spoken = np.zeros(len(every), bool)
        for closed in self._closed:
            spoken[np.searchsorted(every, closed)] = True
        pairs = [(np.searchsorted(every, a), np.searchsorted(every, b)) for a, b in self._joined]
        while True:
            before = int(spoken.sum())
            for a, b in pairs:
                spoken[a[spoken[b]]] = True
                spoken[b[spoken[a]]] = True
            if before == spoken.sum():
                return labels[~spoken[np.searchsorted(every, labels)]]


def fitted(axes: list[Axis], value: Any) -> tuple[list[Axis], list[Axis]]:
    """The axes that lie on dimensions of ``value`` of their own, entry by entry, and the others.

    Rules compute axes from what an operator should do; its fake value shows what it does. An axis of one entry has no
    channels either: it is broadcast, or the only entry there is.
    """
    places = [dim for axis in axes for dim in axis.dims]
    good: list[Axis] = []
    others: list[Axis] = []
    for axis in axes:
        alone = all(places.count(dim) == 1 for dim in axis.dims)
        fits = isinstance(value, Tensor) and alone and axis.data.size > 1 and _lies_on(axis, value)
        (good if fits else others).append(axis)
    return good, others


def _lies_on(axis: Axis, value: Tensor) -> bool:
    inside = bool(axis.dims) and min(axis.dims) >= 0 and max(axis.dims) < value.dim()
    sizes = [value.shape[dim] for dim in axis.dims] if inside else []
    # Sizes that are not numbers are free, and asking whether they equal one would specialise them.
    return inside and all(isinstance(size, int) for size in sizes) and tuple(sizes) == axis.data.shape
