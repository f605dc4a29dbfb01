"""Units: what can be removed together through the input of one weight — a neuron, a head, a key-value group.

Found from the axis analysis, so that closing every gate of a unit leaves nothing of it: the rows that make it, the
columns that read it, the query and key of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor, fx

from ..deferred.slices import squares
from ..graph.program import Program
from ..graph.rows import computed_by_row
from ..graph.selection import Miss, Selection
from ..graph.site import Site
from .axes import Axes
from .axis import Array, axis_of
from .costs import WHOLE, Prices, kind_of
from .table import RULES


@dataclass(frozen=True)
class Units:
    """The removable units that one weight reads.

    Attributes:
        site: the use of the weight
        of: for each of its input channels, the number of its unit (in,)
        costs: what goes with each unit costs: numbers of the weights under consideration and a head's attention, or
            measured seconds
        read_squares: reads those weights for :attr:`squares`
        mixing: what attention costs over all units, if they are heads and it is counted beside the total; else 0
        fixed: the seconds that go only when every unit goes
        total: the cost of all numbers of the weights under consideration, or the seconds of the whole model
        kind: their name in tables of latencies
    """

    site: Site
    of: Array
    costs: Array
    read_squares: Callable[[], Array]
    mixing: float
    fixed: float
    total: float
    kind: str

    @property
    def squares(self) -> Array:
        """For each unit, the sum of squares of the numbers that go with it; the weights are read on access."""
        return self.read_squares()

    @property
    def module(self) -> str:
        """The path of the module that reads them."""
        return self.site.module

    def __str__(self) -> str:
        return f"{self.site.module} ({len(self.costs)} units)"


def units_of(found: Selection[Site], find: Callable[[Site], Units | str], instead: str = "") -> Selection[Site | Units]:
    """What ``find`` makes of the weights that were selected: the units they read, or a reason why they are missed.

    ``instead`` says what happens to those, before the reason.
    """
    units = [(site, find(site)) for site in found.taken]
    missed = [Miss(site, f"{instead}{why}") for site, why in units if isinstance(why, str)]
    return Selection(tuple(own for _, own in units if isinstance(own, Units)), (*found.missed, *missed))


class RemovableUnits:
    """Finds the units of a program's sites.

    Args:
        program: the program
        weights: the sites whose numbers count as costs
        prices: what a number and a channel of attention cost
    """

    def __init__(self, program: Program, weights: Iterable[Site], prices: Prices | None = None):
        self.prices = prices or Prices()
        self.axes = Axes(program, RULES)
        stuck = self.axes.pinned[self.axes.channel]
        self._step_stuck = np.zeros(self.axes.count, bool)
        self._step_stuck[self.axes.tied_class[stuck]] = True
        self._row_stuck = np.zeros(self.axes.row_count + 1, bool)
        self._row_stuck[self.axes.head_row[stuck]] = True
        self._row_stuck[[*self.axes.held_rows]] = True
        names = {site.parameter for site in weights}
        number, timed = self.prices.number, self.prices.latency
        self.total = timed[WHOLE] if timed else sum(number * program.tensor(name).numel() for name in names)
        self._names = sorted(names & self.axes.members.keys())
        self._costs = self._summed(lambda _, value, dim: number * (value.numel() // max(1, value.shape[dim])))

    def find(self, site: Site) -> Units | str:
        """The units that ``site`` reads, or why they cannot be removed."""
        value = site.input
        axis = axis_of(self.axes.axes(value), value.meta["val"].dim() - 1)
        if axis is None or len(axis.dims) > 1:
            return "its input has no channels that could be removed"
        labels = axis.data
        rows = self.axes.head_row[labels]
        grouped = bool((rows >= 0).all())
        names = rows if grouped else self.axes.tied_class[labels]
        stuck = (self._row_stuck if grouped else self._step_stuck)[names]
        if stuck.any():
            return f"its input cannot shrink: {self._reason(labels[stuck])}"
        unique, of = np.unique(names, return_inverse=True)
        order = np.argsort(np.unique(of, return_index=True)[1], kind="stable")  # numbered as they come
        number = np.empty_like(order)
        number[order] = np.arange(len(order))
        of = number[of]
        every = self.axes.head_row if grouped else self.axes.tied_class
        inside = np.isin(every, unique)
        places = number[np.searchsorted(unique, every[inside])]

        def by_unit(sums: Array) -> Array:
            return np.bincount(places, sums[inside], len(unique))

        mixing = self.prices.channel * np.bincount(of) * grouped  # rows of channels are heads
        costs, fixed = by_unit(self._costs) + mixing, 0.0
        kind = kind_of(site, len(unique), site.node in self._alone)
        if self.prices.latency:
            each, fixed = self.prices.of(site, kind)
            costs = np.full(len(unique), each)
        return Units(site, of, costs, lambda: by_unit(self._squares), float(mixing.sum()), fixed, self.total, kind)

    @cached_property
    def _alone(self) -> set[fx.Node]:
        return computed_by_row(self.axes.program.graph)

    @cached_property
    def _squares(self) -> Array:
        sums = {name: squares(self.axes.program.tensor(name)) for name in self._names}
        return self._summed(lambda name, value, dim: sums[name][dim].numpy())

    def _summed(self, measure: Callable[[str, Tensor, int], Array | float]) -> Array:
        """For each label, the sum of ``measure`` over the weights' positions that have this label."""
        sums = np.zeros(self.axes.count)
        for name in self._names:
            for dim, labels in enumerate(self.axes.members[name]):
                np.add.at(sums, labels, measure(name, self.axes.program.tensor(name), dim))
        return sums

    def _reason(self, labels: Array) -> str:
        classes = set(self.axes.tied_class[labels].tolist())
        found = (why for label, why in self.axes.pins.items() if int(self.axes.tied_class[label]) in classes)
        return next(found, "its rows are held")
