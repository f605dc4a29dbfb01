"""Units: what can be removed together through the input of one weight — a neuron, a head, a key-value group.

Found from the axis analysis, so that closing every gate of a unit leaves nothing of it: the rows that make it, the
columns that read it, the query and key of a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .axes import Array, Axes, axis_of
from .axis_table import RULES
from .program import Program
from .site import Site


@dataclass(frozen=True)
class Units:
    """The removable units that one weight reads.

    Attributes:
        site: the use of the weight
        of: for each of its input channels, the number of its unit (in,)
        costs: how many numbers of the weights under consideration go with each unit
        inner: for each unit, how many numbers one position of the input holds of it (a head's channels)
        attends: whether the units are heads, which attention mixes over positions
        total: how many numbers all weights under consideration hold
    """

    site: Site
    of: Array
    costs: Array
    inner: Array
    attends: bool
    total: int

    @property
    def module(self) -> str:
        """The path of the module that reads them."""
        return self.site.module

    def __str__(self) -> str:
        return f"{self.site.module} ({len(self.costs)} units)"


class UnitAnalysis:
    """Finds the units of a program's sites.

    Args:
        program: the program
        weights: the sites whose numbers count as costs
    """

    def __init__(self, program: Program, weights: Iterable[Site]):
        self.axes = Axes(program, RULES)
        pinned = np.zeros(self.axes.count, bool)
        if self.axes.reasons:
            pinned[self.axes.channel[np.fromiter(self.axes.reasons, int)]] = True
        stuck = pinned[self.axes.channel]
        self._step_stuck = np.zeros(self.axes.count, bool)
        self._step_stuck[self.axes.step[stuck]] = True
        self._row_stuck = np.zeros(self.axes.row_count + 1, bool)
        self._row_stuck[self.axes.row[stuck]] = True
        self._row_stuck[[*self.axes.held_rows]] = True
        considered = {site.parameter for site in weights}
        self.total = sum(program.tensor(name).numel() for name in considered)
        self._costs = self._cost_of_labels(considered)

    def find(self, site: Site) -> Units | str:
        """The units that ``site`` reads, or why they cannot be removed."""
        value = site.input
        axis = axis_of(self.axes.axes(value), value.meta["val"].dim() - 1)
        if axis is None or len(axis.dims) > 1:
            return "its input has no channels that could be removed"
        labels = axis.data
        rows = self.axes.row[labels]
        grouped = bool((rows >= 0).all())
        names = rows if grouped else self.axes.step[labels]
        stuck = (self._row_stuck if grouped else self._step_stuck)[names]
        if stuck.any():
            return f"its input cannot shrink: {self._reason(labels[stuck])}"
        unique, of = np.unique(names, return_inverse=True)
        order = np.argsort(np.unique(of, return_index=True)[1], kind="stable")  # numbered as they come
        number = np.empty_like(order)
        number[order] = np.arange(len(order))
        of = number[of]
        every = self.axes.row if grouped else self.axes.step
        costs = np.bincount(
            np.searchsorted(unique, every[np.isin(every, unique)]), self._costs[np.isin(every, unique)], len(unique)
        )
        return Units(site, of, costs[np.argsort(number, kind="stable")], np.bincount(of), grouped, self.total)

    def _cost_of_labels(self, weights: set[str]) -> Array:
        """For each label, how many numbers of the weights lie at it."""
        costs = np.zeros(self.axes.count)
        for name in weights & set(self.axes.members):
            dims = self.axes.members[name]
            total = int(np.prod([labels.size for labels in dims]))
            for labels in dims:
                np.add.at(costs, labels, total / labels.size)
        return costs

    def _reason(self, labels: Array) -> str:
        classes = set(self.axes.step[labels].tolist())
        found = (why for label, why in self.axes.reasons.items() if int(self.axes.step[label]) in classes)
        return next(found, "its rows are held")
