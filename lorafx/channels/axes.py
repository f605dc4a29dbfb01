"""Axes: which channels of which values and tensors stay or go together.

Every dimension of fixed size gets a *label* for each of its channels; operators say which labels are one channel
(:meth:`Axes.same`), which are only tied (:meth:`Axes.tie`, where a vector is broadcast over heads), which form
a row that can go as a whole (a head, when a flat dimension is viewed as heads × channels), of which there is one for
each row (:meth:`Axes.broadcast`), and which must stay (:meth:`Axes.pin`). Labels that an operator reads to compute
other channels are contracted (:meth:`Axes.contract`); entries that its result repeats for other channels are read
(:meth:`Axes.reads`).

It fails closed: an operator without a rule, a rule that raises, a label that a rule leaves unmentioned, an axis that
does not fit the operator's value, a value that is changed in place — each of these pins what it touches.

A dimension without labels (a free size, or positions) never shrinks.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import fx

from ..graph.effects import written
from ..graph.operands import value_of
from ..graph.program import Program
from ..graph.tree import get_tensor, has_tensor
from .account import Account, Classes, fitted
from .axis import Array, Axis, Known

_log = logging.getLogger(__name__)


class Axes:
    """The labels of every value of a program's graph.

    Args:
        program: the program
        rules: what is known of operators, by target or by the target's name
        distrusted: names of nodes whose rules proved wrong, and why: they pin what they touch

    Attributes:
        changing: the nodes whose values are changed in place
        known: the axes of each node
        members: for each tensor that the graph reads, one array of labels for each dimension
        pins: the pinned labels, and why each is
        channel: for each label the class of labels that are one channel with it, by its smallest label
        tied_class: for each label the class of labels that it is tied to
        head_row: for each label the row it lies in (the channels of one head, say), negative outside rows
        held_rows: the rows that must stay
        contracted: for each node, the labels it reads to compute other channels
        read: for each node, pairs of arrays: entries of the second are read wherever those of the first are needed
        aligned: labels of which a multiple of some number has to stay
        per_row: labels of rows (the last dimension runs inside one), and labels that stay while any of their rows does
    """

    def __init__(
        self,
        program: Program,
        rules: dict[Any, Callable[[Axes, fx.Node], Known]],
        distrusted: Mapping[str, str] | None = None,
    ):
        self.program = program
        self.rules = rules
        self.distrusted = distrusted or {}
        self.changing = written(program.root, program.graph)
        self.known: dict[fx.Node, Known] = {}
        self.contracted: dict[fx.Node, list[Array]] = defaultdict(list)
        self.read: dict[fx.Node, list[tuple[Array, Array]]] = defaultdict(list)
        self._account = Account()
        self.members: dict[str, list[Array]] = {}
        self.pins: dict[int, str] = {}
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
            self.known[node] = self._visit(node)
        self._solve()

    # ---- called by rules

    def new(self, *shape: int) -> Array:
        """Fresh labels."""
        size = int(np.prod(shape))
        labels = np.arange(self._count, self._count + size).reshape(shape)
        self._count += size
        return labels

    def same(self, a: Array, b: Array) -> None:
        """Entries at one place are one channel."""
        self._same.join(a, b)
        self._account.join(a, b)

    def tie(self, a: Array, b: Array) -> None:
        """Entries at one place are tied: one stays while the other does, except where a whole row goes."""
        self._tied.join(a, b)
        self._account.join(a, b)

    def broadcast(self, wide: Array, narrow: Array) -> None:
        """Entries of ``narrow`` are repeated along its dimensions of size 1, to meet those of ``wide``.

        Where these dimensions run inside rows there is one entry for each row, whichever channels the row keeps;
        elsewhere entries at one place are tied.
        """
        self._broadcasts.append((wide, narrow))
        self._account.join(wide, narrow)

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
        self._account.close(labels)
        for label in labels.ravel().tolist():
            self.pins.setdefault(label, why)

    def hold(self, axis: Axis, dim: int, why: str) -> None:
        """The size of ``dim`` must not change: rows stay, if it counts rows; else every channel does."""
        if axis.dims[-1] == dim or len(axis.dims) == 1:
            self.pin(axis.data, why)
        else:
            self._held_rows.append(axis.data)

    def contract(self, node: fx.Node, labels: Array) -> None:
        """``node`` reads these channels to compute others: they are needed unless ``needed`` knows that it needs
        fewer."""
        self.contracted[node].append(labels)
        self._account.close(labels)

    def reads(self, node: fx.Node, result: Array, operand: Array) -> None:
        """Where an entry of ``result`` is needed, ``node`` reads the entry of ``operand`` there."""
        self.read[node].append((result, operand))

    def leave(self, labels: Array) -> None:
        """The current operator does not read these."""
        self._account.close(labels)

    def axes(self, value: object) -> list[Axis]:
        """The axes of an operand; none for a number."""
        return self.known[value] if isinstance(value, fx.Node) else []

    # ---- walking the graph

    def _visit(self, node: fx.Node) -> Known:
        if node.op == "get_attr":
            return self._held(node, self._tensor(node), [])
        if node.op == "placeholder":
            return []
        read = [axis for value in node.all_input_nodes for axis in flat(self.known[value])]
        self._account = Account()
        known = self._judged(node)
        self._account.close(np.concatenate([np.empty(0, int), *(axis.data.ravel() for axis in flat(known))]))
        self.pin(self._account.open([axis.data for axis in read]), f"{node.target} does not say what becomes of it")
        return self._held(node, known, read)

    def _judged(self, node: fx.Node) -> Known:
        """What the operator's rule says; nothing, with all it reads pinned, where there is no rule to trust."""
        # Operators of other libraries, which may not be installed, are in the table by name.
        rule = self.rules.get(node.target) or self.rules.get(str(node.target)) if node.op == "call_function" else None
        if node.op == "output":
            return self._pinned(node, "an output of the model")
        if node.name in self.distrusted:
            return self._pinned(node, self.distrusted[node.name])
        if rule is None:
            return self._pinned(node, f"{node.target} has no rule")
        try:
            return self._fitting(node, rule(self, node))
        except Exception as error:
            # All that is lost are channels that could have gone; folding must not fail because of a rule.
            _log.warning("%s: the channels of %s stay: %s: %s", node.name, node.target, type(error).__name__, error)
            return self._pinned(node, f"the rule of {node.target} failed")

    def _pinned(self, node: fx.Node, why: str) -> Known:
        for value in node.all_input_nodes:
            for axis in flat(self.known[value]):
                self.pin(axis.data, why)
        return []

    def _fitting(self, node: fx.Node, known: Known) -> Known:
        """The part of a rule's answer that fits the node's value; the rest is pinned."""
        several = any(isinstance(item, list) for item in known)
        values = node.meta.get("val")
        parts = list(zip(known, values or (), strict=True)) if several else [(known, values)]
        fitting = []
        for axes, value in parts:
            fits, others = fitted(axes, value)
            for axis in others:
                self.pin(axis.data, f"{node.target} gives it another size")
            fitting.append(fits)
        return fitting if several else fitting[0]

    def _held(self, node: fx.Node, known: Known, read: list[Axis]) -> Known:
        """A value that is changed in place, here or through one that shares its memory, keeps its channels."""
        if node in self.changing:
            for axis in [*read, *flat(known)]:
                self.pin(axis.data, "a value that is changed in place")
        return known

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
        self.head_row = self._solve_rows()
        self._solve_broadcasts()
        self._tied.join(np.arange(self._count), self.channel)
        self.tied_class = self._tied.solve(self._count)
        self.held_rows: set[int] = set()
        for held in self._held_rows:
            labels = held.ravel()
            self.held_rows.update(np.unique(self.head_row[labels]).tolist())
            self.pin(labels[self.head_row[labels] < 0], "its size is held")
        self._hold_per_row()
        self.held_rows.discard(-1)

    def _solve_broadcasts(self) -> None:
        for wide, narrow in self._broadcasts:
            rows = self.head_row[wide]
            inside = bool((rows >= 0).all() and (rows == rows[..., :1]).all())
            if inside and narrow.shape[-1] == 1 < wide.shape[-1]:
                self.per_row.append((wide, narrow))
            else:
                self._tied.join(wide, narrow)

    def _hold_per_row(self) -> None:
        """A row stays if its entry must stay, and an entry if its row must stay."""
        pinned = self.pinned
        for wide, narrow in self.per_row:
            rows = self.head_row[wide][..., :1]
            entries = np.broadcast_to(narrow, rows.shape)
            self.held_rows.update(rows[pinned[self.channel[entries]]].tolist())
            self.pin(entries[np.isin(rows, list(self.held_rows))], "its row is held")

    def _solve_rows(self) -> Array:
        """The row of each label, -1 where it is in none. Two rows that share a channel are one row."""
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
    def pinned(self) -> Array:
        """For each channel class, whether one of its labels is pinned."""
        result = np.zeros(self._count, bool)
        result[self.channel[np.fromiter(self.pins, int)]] = True
        return result

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
    pinned = axes.pinned[axes.channel]
    steps = np.zeros(axes.count, bool)
    steps[axes.tied_class[pinned]] = True
    rows = np.zeros(axes.row_count + 1, bool)  # the last one, -1, stands for "in no row"
    rows[axes.head_row[pinned]] = True
    rows[[-1, *axes.held_rows]] = True
    return steps[axes.tied_class] & rows[axes.head_row]


def flat(known: Known) -> list[Axis]:
    """The axes of a node's value, or of all its values."""
    return [axis for item in known for axis in (item if isinstance(item, list) else [item])]


def sizes_of(node: object) -> tuple[Any, ...]:
    """The sizes of a node's value: integers, and symbolic expressions where they are free."""
    return tuple(size if isinstance(size, int) else size.node.expr for size in value_of(node).shape)
