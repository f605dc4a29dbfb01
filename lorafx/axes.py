"""Axes: which channels of which values and tensors stand and fall together.

Every dimension of fixed size gets a *label* for each of its channels; operators say which labels are one channel
(:meth:`Axes.same`), which only have to keep step (:meth:`Axes.tie`, where a vector is broadcast over heads), which form
a row that can go as a whole (a head, when a flat dimension is viewed as heads × channels), of which there is one for
each row (:meth:`Axes.broadcast`), and which must stay (:meth:`Axes.pin`). An operator without a rule pins everything it
touches: the safe answer.

A dimension without labels (a free size, or positions) never shrinks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, fx

from .program import Program
from .tree import get_tensor, has_tensor

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True)
class Axis:
    """Some dimensions of a value, in order, and one entry for each channel along them.

    Attributes:
        dims: which dimensions
        data: labels (or, in other analyses, facts about channels), in the shape of these dimensions
    """

    dims: tuple[int, ...]
    data: Array

    def moved(self, place: Callable[[int], int]) -> Axis:
        """The axis after its dimensions went elsewhere; kept in order."""
        dims = [place(dim) for dim in self.dims]
        order = sorted(range(len(dims)), key=dims.__getitem__)
        return Axis(tuple(dims[i] for i in order), self.data.transpose(order))


#: What is known of a node: its axes; of a node that gives several values, a list of such.
Known: TypeAlias = "list[Any]"


def axis_of(axes: Iterable[Axis], dim: int) -> Axis | None:
    """The axis that has ``dim``."""
    return next((axis for axis in axes if dim in axis.dims), None)


class Classes:
    """Labels joined into classes: the smallest label of each class stands for it."""

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


class Axes:
    """The labels of every value of a program's graph.

    Attributes:
        known: the axes of each node
        members: for each tensor the graph reads, one array of labels a dimension
        reasons: why labels are pinned
        aligned: labels of which only a multiple of a number may stay
        per_row: labels of rows (the last dimension runs inside one), and labels that stay while any of their rows does
    """

    def __init__(self, program: Program, rules: dict[Any, Callable[[Axes, fx.Node], Known]]):
        self.program = program
        self.known: dict[fx.Node, Known] = {}
        self.members: dict[str, list[Array]] = {}
        self.reasons: dict[int, str] = {}
        self._count = 0
        self._same, self._tied = Classes(), Classes()
        self._broadcasts: list[tuple[Array, Array]] = []
        self.per_row: list[tuple[Array, Array]] = []
        self._row_of: list[tuple[Array, Array]] = []
        self._row_count = 0
        self._row_pairs: list[tuple[Array, Array]] = []
        self._held_rows: list[Array] = []
        self.aligned: list[tuple[Array, int]] = []
        self._by_tensor: dict[int, list[Array]] = {}
        for node in program.graph.nodes:
            self.known[node] = self._visit(node, rules)
        self._solve()

    # ---- what rules say

    def new(self, *shape: int) -> Array:
        """Fresh labels."""
        size = int(np.prod(shape))
        labels = np.arange(self._count, self._count + size).reshape(shape)
        self._count += size
        return labels

    def same(self, a: Array, b: Array) -> None:
        """Entries at one place are one channel."""
        self._same.join(a, b)

    def tie(self, a: Array, b: Array) -> None:
        """Entries at one place keep step: one stays while the other does, except where a whole row goes."""
        self._tied.join(a, b)

    def broadcast(self, wide: Array, narrow: Array) -> None:
        """Entries of ``narrow`` are repeated along its dimensions of size 1, to meet those of ``wide``.

        Where these dimensions run inside rows there is one entry a row, whatever channels the row keeps; elsewhere
        entries at one place keep step.
        """
        self._broadcasts.append((wide, narrow))

    def rows(self, labels: Array) -> None:
        """The last dimension of ``labels`` runs inside a row; rows can go as a whole."""
        shape = labels.shape[:-1]
        rows = np.arange(self._row_count, self._row_count + int(np.prod(shape))).reshape(shape)
        self._row_count += rows.size
        self._row_of.append((labels.ravel(), np.broadcast_to(rows[..., None], labels.shape).ravel()))

    def same_rows(self, a: Array, b: Array) -> None:
        """Rows at one place of two arrays (rows, channels) are one row, whatever channels each has."""
        self._row_pairs.append((a[:, 0], b[:, 0]))

    def hold_rows(self, labels: Array) -> None:
        """None of these rows may go."""
        self._held_rows.append(labels)

    def align(self, labels: Array, multiple: int) -> None:
        """Of these channels a multiple of ``multiple`` stays."""
        self.aligned.append((labels, multiple))

    def pin(self, labels: Array, why: str) -> None:
        """These channels stay."""
        for label in labels.ravel().tolist():
            self.reasons.setdefault(label, why)

    def hold(self, axis: Axis, dim: int, why: str) -> None:
        """The size of ``dim`` must not change: rows stay, if it counts rows; else every channel does."""
        if axis.dims[-1] == dim or len(axis.dims) == 1:
            self.pin(axis.data, why)
        else:
            self._held_rows.append(axis.data)

    def axes(self, value: object) -> list[Axis]:
        """The axes of an operand; none for a number."""
        return self.known[value] if isinstance(value, fx.Node) else []

    # ---- going through the graph

    def _visit(self, node: fx.Node, rules: dict[Any, Callable[[Axes, fx.Node], Known]]) -> Known:
        if node.op == "get_attr":
            return self._tensor(node)
        if node.op == "placeholder":
            return []
        # Operators of other libraries, which may not be there, stand in the table by name.
        rule = rules.get(node.target) or rules.get(str(node.target)) if node.op == "call_function" else None
        if rule is not None:
            return rule(self, node)
        why = "an output of the model" if node.op == "output" else f"{_name(node)} has no rule"
        for value in node.all_input_nodes:
            for axis in _flat(self.known[value]):
                self.pin(axis.data, why)
        return []

    def _tensor(self, node: fx.Node) -> Known:
        name = str(node.target)
        if not has_tensor(self.program.root, name):  # an inner graph
            return []
        value = get_tensor(self.program.root, name)
        labels = self._by_tensor.get(id(value))
        if labels is None:
            labels = self._by_tensor[id(value)] = [self.new(size) for size in value.shape]
        self.members[name] = labels
        return [Axis((dim,), data) for dim, data in enumerate(labels) if data.size > 1]

    # ---- classes

    def _solve(self) -> None:
        self.channel = self._same.solve(self._count)
        self.row = self._solve_rows()
        self._solve_broadcasts()
        self._tied.join(np.arange(self._count), self.channel)
        self.step = self._tied.solve(self._count)
        self.held_rows: set[int] = set()
        for held in self._held_rows:
            labels = held.ravel()
            self.held_rows.update(np.unique(self.row[labels]).tolist())
            self.pin(labels[self.row[labels] < 0], "its size is held")
        self._hold_per_row()
        self.held_rows.discard(-1)

    def _solve_broadcasts(self) -> None:
        for wide, narrow in self._broadcasts:
            rows = self.row[wide]
            inside = bool((rows >= 0).all() and (rows == rows[..., :1]).all())
            if inside and narrow.shape[-1] == 1 < wide.shape[-1]:
                self.per_row.append((wide, narrow))
            else:
                self._tied.join(wide, narrow)

    def _hold_per_row(self) -> None:
        """A row stays if its entry must, and an entry if its row must."""
        pinned = np.zeros(self._count, bool)
        pinned[self.channel[np.fromiter(self.reasons, int)]] = True
        for wide, narrow in self.per_row:
            rows = self.row[wide][..., :1]
            entries = np.broadcast_to(narrow, rows.shape)
            self.held_rows.update(rows[pinned[self.channel[entries]]].tolist())
            self.pin(entries[np.isin(rows, list(self.held_rows))], "its row is held")

    def _solve_rows(self) -> Array:
        """The row of each label, -1 where it lies in none. Two rows that one channel lies in are one row."""
        labels = np.concatenate([np.empty(0, int), *(a for a, _ in self._row_of)])
        rows = np.concatenate([np.empty(0, int), *(b for _, b in self._row_of)])
        channels = self.channel[labels]
        joined = Classes()
        order = np.argsort(channels, kind="stable")
        alike = channels[order][1:] == channels[order][:-1]
        joined.join(rows[order][1:][alike], rows[order][:-1][alike])
        of_channel = np.full(self._count, -1)
        of_channel[channels] = rows
        for a, b in self._row_pairs:
            left, right = of_channel[self.channel[a]], of_channel[self.channel[b]]
            known = (left >= 0) & (right >= 0)
            joined.join(left[known], right[known])
            self._held_rows += [a[~known], b[~known]]
        classes = joined.solve(self._row_count)
        return np.where(of_channel >= 0, classes[of_channel], -1)[self.channel] if self._row_count else of_channel

    @property
    def count(self) -> int:
        """How many labels there are."""
        return self._count

    @property
    def row_count(self) -> int:
        """How many rows there are at most."""
        return self._row_count


def stuck(axes: Axes) -> Array:
    """For each label, whether neither its channel alone nor the row it lies in can ever go."""
    pinned = np.zeros(axes.count, bool)
    if axes.reasons:
        pinned[axes.channel[np.fromiter(axes.reasons, int)]] = True
    steps = np.zeros(axes.count, bool)
    steps[axes.step[pinned[axes.channel]]] = True
    rows = np.zeros(axes.row_count + 1, bool)  # the last one, -1, stands for "in no row"
    rows[axes.row[pinned[axes.channel]]] = True
    rows[[-1, *axes.held_rows]] = True
    return steps[axes.step] & rows[axes.row]


def _flat(known: Known) -> list[Axis]:
    return [axis for item in known for axis in (item if isinstance(item, list) else [item])]


def _name(node: fx.Node) -> str:
    return str(node.target)


def sizes_of(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of a node's value: integers, and symbolic expressions where they are free."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return tuple(size if isinstance(size, int) else size.node.expr for size in value.shape)
