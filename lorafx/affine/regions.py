"""Affine regions: parts of a graph that compute ``y = M x + c`` from one tensor, however many operators they take.

Adapters, gates and scalings around a linear layer are such regions, so merging them needs no knowledge of any method.
An embedding is affine in its one-hot index and a convolution in its patches, so all weights are one case.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from ..graph.constants import Constants, computed, operands_first
from ..graph.operands import is_float
from ..graph.tree import copy_tree
from .values import Value

#: What has to become an identity: an operator; the reader of the value that stays in its place, and as which argument.
Bypass: TypeAlias = "tuple[tuple[fx.Node, fx.Node, int], ...] | None"


@dataclass(frozen=True)
class Origin:
    """What a region is affine in: a node's value, its one-hot encoding, or its convolution patches."""

    kind: str
    node: fx.Node
    geometry: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Region:
    """A node's value as an affine map of an origin.

    Attributes:
        root: the node whose value this is
        origin: what it is affine in
        axis: the feature axis of the value: -1, or 1 (channels) after a convolution
        nodes: the operators of the region
        reads: names of the tensors it reads
        carrier: the operator that applies a full weight, which can take over the whole map; None when there is none
        bypass: all operators between the origin and the value that have to become identities if one carrier computes
            the map, inner first, see :data:`Bypass`; None when that is impossible
        key: what the map is made of; equal keys are equal maps
        parts: the regions that this one is made of
        compose: computes the map from those of its parts
        shifts: whether the map has an offset
        groups: at least how many equal blocks the matrix has on its diagonal; 0 for a diagonal matrix: any number
    """

    root: fx.Node
    origin: Origin
    axis: int
    nodes: frozenset[fx.Node]
    reads: frozenset[str]
    carrier: fx.Node | None
    bypass: Bypass
    key: Hashable
    parts: tuple[Region, ...]
    compose: Callable[..., Value]
    shifts: bool = False
    groups: int = 0

    def identities(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """What has to become an identity, and what stays in its place, inner first; looked up on access, as another
        region may have replaced it."""
        for node, reader, place in self.bypass or ():
            kept = reader.args[place]
            assert isinstance(kept, fx.Node)
            yield node, kept

    def evaluate(self) -> Value:
        """The map, in fp64."""
        regions: dict[Hashable, Region] = {}

        def parts(key: Hashable) -> list[Hashable]:
            found = regions[key].parts
            regions.update({part.key: part for part in found})
            return [part.key for part in found]

        def compute(key: Hashable, values: Mapping[Hashable, Value]) -> Value:
            return regions[key].compose(*(values[part.key] for part in regions[key].parts))

        regions[self.key] = self
        return computed(self.key, parts, compute)


def origin(node: fx.Node, kind: str, axis: int, geometry: tuple[Any, ...] = ()) -> Region:
    """The identity map of an origin."""
    origin = Origin(kind, node, geometry)
    return Region(node, origin, axis, frozenset(), frozenset(), None, (), kind, (), lambda: (None, None))


#: Yields the regions that end in a node, given the regions that end in its operands.
Rule: TypeAlias = "Callable[[AffineAnalysis, fx.Node], Iterator[Region]]"


class AffineAnalysis:
    """Finds, for any node of a graph, the affine regions that end in it; nearest origin first."""

    #: A region never needs more nested origins than this; deeper ones could only be larger.
    depth = 8

    def __init__(self, root: nn.Module, rules: Mapping[Any, Rule]):
        self.rules = rules
        # From the tensors as they are now: what one region folds into must not affect the value of another.
        self.constants = Constants(copy_tree(root))
        self.device = next((p.device for p in root.parameters()), torch.device("cpu"))
        #: What is known of features on several axes (:mod:`lorafx.affine.spread`).
        self.spreads: dict[fx.Node, list[Any]] = {}
        self._known: dict[fx.Node, list[Region]] = {}

    def regions(self, node: fx.Node) -> list[Region]:
        """The regions ending in ``node``: the same value as maps of increasingly distant origins."""
        for behind in operands_first(node, lambda n: n.all_input_nodes, self._known):
            self._known[behind] = list(self._find(behind))
        return self._known[node]

    def _find(self, node: fx.Node) -> Iterator[Region]:
        rule = self.rules.get(node.target)
        if rule is not None and is_float(node) and node.meta["val"].dim() > 0:
            for region in itertools.islice(rule(self, node), self.depth):
                yield replace(region, key=self.constants.short(region.key))

    def inputs(self, node: fx.Node, axis: int) -> Iterator[Region]:
        """``node`` itself as an origin (features last), then the regions behind it with features on ``axis``."""
        if axis == -1:
            yield origin(node, "value", axis)
        for region in self.regions(node):
            if region.axis == axis:
                yield region

    def constant(self, value: object) -> Operand | None:
        """A constant operand: a number, a tensor, or an expression of tensors; None when it is not a constant."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            number = partial(torch.tensor, float(value), dtype=torch.float64, device=self.device)
            return Operand(number, frozenset(), value)
        if not isinstance(value, fx.Node) or not is_float(value):
            return None
        reads = self.constants.reads(value)
        if reads is None:
            return None
        return Operand(partial(self.constants.value, value, torch.float64), reads, self.constants.key(value))


@dataclass(frozen=True)
class Operand:
    """A constant: how to compute it in fp64, the tensors it reads, and what it is made of."""

    value: Callable[[], Tensor]
    reads: frozenset[str]
    key: Hashable
