"""Affine regions: parts of a graph that compute ``y = M x + c`` from one tensor, however many operators they take.

Adapters, gates and scalings around a linear layer are such regions, so merging them needs no knowledge of any method.
An embedding is affine in its one-hot index and a convolution in its patches, which makes all weights one case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from .constants import Constants

#: A matrix (out, in), its diagonal when it is diagonal, or None for the identity; and an offset or None. All fp64.
Value = tuple[Tensor | None, Tensor | None]


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
        bypass: operators on the carrier's way that become identities, each with the operand that stays, inner first
        key: what the map is made of; equal keys are equal maps
        evaluate: composes the map, in fp64
        shifts: whether the map has an offset
    """

    root: fx.Node
    origin: Origin
    axis: int
    nodes: frozenset[fx.Node]
    reads: frozenset[str]
    carrier: fx.Node | None
    bypass: tuple[tuple[fx.Node, fx.Node], ...]
    key: tuple[Any, ...]
    evaluate: Callable[[], Value]
    shifts: bool = False


def origin(node: fx.Node, kind: str, axis: int, geometry: tuple[Any, ...] = ()) -> Region:
    """The identity map of an origin."""
    origin = Origin(kind, node, geometry)
    return Region(node, origin, axis, frozenset(), frozenset(), None, (), (kind,), lambda: (None, None))


#: Yields the regions that end in a node, given the regions that end in its operands.
Rule: TypeAlias = "Callable[[AffineAnalysis, fx.Node], Iterator[Region]]"


class AffineAnalysis:
    """Finds, for any node of a graph, the affine regions that end in it; nearest origin first."""

    #: A region never needs more nested origins than this; deeper ones could only be larger.
    depth = 8

    def __init__(self, root: nn.Module, rules: Mapping[Any, Rule]):
        self.rules = rules
        self.constants = Constants(root)
        self.device = next((p.device for p in root.parameters()), torch.device("cpu"))
        self._known: dict[fx.Node, list[Region]] = {}

    def regions(self, node: fx.Node) -> list[Region]:
        """The regions ending in ``node``: the same value as maps of ever more distant origins."""
        if node not in self._known:
            rule = self.rules.get(node.target)
            value = node.meta.get("val")
            float_tensor = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0
            found = list(rule(self, node))[: self.depth] if rule is not None and float_tensor else []
            self._known[node] = found
        return self._known[node]

    def inputs(self, node: fx.Node, axis: int) -> Iterator[Region]:
        """``node`` itself as an origin (features last), then the regions behind it with features on ``axis``."""
        if axis == -1:
            yield origin(node, "value", axis)
        for region in self.regions(node):
            if region.axis == axis:
                yield region

    def constant(self, value: object) -> Operand | None:
        """A constant operand: a number, a tensor, or an expression of tensors; None when it is no constant."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            number = partial(torch.tensor, float(value), dtype=torch.float64, device=self.device)
            return Operand(number, frozenset(), value)
        if not isinstance(value, fx.Node) or not _is_float(value):
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
    key: object


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
