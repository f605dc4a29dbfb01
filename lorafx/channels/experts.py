"""Hidden units of experts: units that an expert does not need go, though each expert needs different ones.

The order of an expert's hidden units is free, as long as every tensor that holds them agrees: permuting them does not
change the function. So each expert puts the units that it needs first, and the ordinary removal takes what lies behind
the longest list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from .axes import Axes, flat, sizes_of
from .axis import Array, Axis, axis_of
from .constant import ConstantChannels
from .grouped import products
from .moves import MOVES
from .needed import grown
from .table import ELEMENTWISE


@dataclass(frozen=True)
class Order:
    """A new order of the hidden units of a mixture's experts.

    Attributes:
        units: the channel of each hidden unit (units,)
        old: for each expert, which unit moves to each place (experts, units)
        places: the tensors that hold the units, and along which dimension
    """

    units: Array
    old: Array
    places: tuple[tuple[str, int], ...]


def reordered(orders: list[Order], name: str, value: Tensor) -> Tensor:
    """The tensor ``name`` (experts, …, …) with its hidden units in their new order."""
    for order in orders:
        for dim in (dim for place, dim in order.places if place == name):
            starts = np.arange(0, value.shape[dim], len(order.units))  # gate and up hold them one after the other
            index = torch.from_numpy((starts[:, None] + order.old[:, None]).reshape(len(order.old), -1))
            across = index[:, :, None] if dim == 1 else index[:, None]
            value = value.take_along_dim(across.to(value.device), dim)
    return value


def ordered(axes: Axes, facts: ConstantChannels, need: Array) -> tuple[Array, list[Order]]:
    """Orders that let experts' hidden units go, and which channels are needed then."""
    result, found = need.copy(), []
    for alike in products(axes).values():
        for node in alike:
            axis = axis_of(axes.axes(node.args[0]), 1)
            hidden = Hidden(axes, facts, alike, axes.channel[axis.data]) if axis is not None else None
            if hidden is None or not hidden.free():
                continue
            wanted = hidden.needs(need)
            places = np.arange(len(hidden.units)) < wanted.sum(1).max()
            if places.sum() < result[hidden.units].sum():
                result[hidden.units] = places
                found.append(Order(hidden.units, np.argsort(~wanted, 1, kind="stable"), hidden.places()))
    return result, found


class Hidden:
    """The units that one of some products with experts reads, and the nodes that hold them.

    Args:
        alike: the products whose rows are those of the same experts
        units: channels, in order
    """

    def __init__(self, axes: Axes, facts: ConstantChannels, alike: list[fx.Node], units: Array):
        self.axes, self.facts, self.alike, self.units = axes, facts, alike, units
        self.experts = sizes_of(alike[0].args[1])[0]
        self._rows = sizes_of(alike[0])[0]
        self._own = np.zeros(axes.count, bool)
        self._own[units.ravel()] = True
        self._own = self._own[axes.channel]
        self._holders = list(self._find())

    def _find(self) -> Iterator[tuple[fx.Node, Axis]]:
        for node, known in self.axes.known.items():
            yield from ((node, axis) for axis in flat(known) if self._own[axis.data].any())

    def free(self) -> bool:
        """Whether every expert may put them in an order of its own: nothing else holds them or is tied to them,
        and every operator treats all of them alike."""
        pinned = np.fromiter(self.axes.pins, int)
        steps = np.zeros(self.axes.count, bool)
        steps[self.axes.tied_class[self._own]] = True
        return (
            len(np.unique(self.units)) == self.units.size == steps.sum()
            and np.array_equal(steps[self.axes.tied_class], self._own)
            and not self._own[pinned].any()
            and not (self.axes.head_row[self._own] >= 0).any()
            and all(self._alike(node, axis) for node, axis in self._holders)
        )

    def _alike(self, node: fx.Node, axis: Axis) -> bool:
        """Whether the node treats all units alike, and each expert's apart from the others'."""
        if node.op != "get_attr" and node.target not in MOVES and node.target not in ELEMENTWISE:
            return node in self.alike
        if isinstance(node.meta["val"], (list, tuple)):
            return True  # its parts are looked at where they are taken
        channels, sizes = self.axes.channel[axis.data], sizes_of(node)
        if channels.ndim > 1 or channels.size % self.units.size:
            return False
        # Rows of values stay with their expert as long as there are as many: no operator here reorders them. Weights
        # have one part for each expert.
        constant = self.facts.constants.reads(node) is not None
        apart = (3, self.experts) if constant else (2, self._rows)
        whole = bool((channels.reshape(-1, self.units.size) == self.units).all())
        return whole and (len(sizes), sizes[0]) == apart and axis.dims[0] > 0

    def needs(self, need: Array) -> Array:
        """Which units each expert needs (experts, units), given what is needed at all."""
        others = need.copy()
        others[self.units] = False
        nodes = [node for node, _ in self._holders if self.facts.constants.reads(node) is None]
        return np.stack(
            [
                grown(self.axes, self.facts.among(slice(e, e + 1), nodes), others.copy(), self.alike)[self.units]
                for e in range(self.experts)
            ]
        )

    def places(self) -> tuple[tuple[str, int], ...]:
        """The tensors that hold the units, and along which dimension."""
        return tuple((str(node.target), axis.dims[0]) for node, axis in self._holders if node.op == "get_attr")
