"""Features spread over several axes: what operators compute row by row between two values with features on the last.

A block-diagonal product is a reshape, a product with one matrix a block, and a reshape back; sums of groups and
rotations of pairs are similar. Such operators are linear in a row, wherever its axes are, so they can be applied to the
columns of a matrix as to activations, and their own matrix is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.constants import computed
from ..graph.operands import operator_of
from .regions import AffineAnalysis, Region
from .spread_rules import LAYOUTS, PLAIN, SPLITS, VIEWS, alike, fixed, occurrences, shape_of
from .values import Value, dense

#: How many entries behind a value are followed, each one operator further back: blocks, casts and a reordering take a
#: dozen.
_DEPTH = 16


@dataclass(frozen=True, eq=False)
class Spread:
    """A node's value as a linear map of each row of ``entry``, a value with its features on the last axis.

    Attributes:
        entry: that value
        node: whose value this is
        rows: the axes that the rows are along, in the order they have in ``entry``; all others are the features'
        chunks: how many parts each row counts as: more than one where the rows' axes and the features' became one axis
        parts: what it is computed from; the entry itself is computed from nothing
        step: computes it from those
        key: what the map is made of; equal keys are equal maps
        nodes: the operators from the entry on
        reads: names of the tensors it reads
    """

    entry: fx.Node
    node: fx.Node
    rows: tuple[int, ...]
    chunks: int = 1
    parts: tuple[Spread, ...] = ()
    step: Callable[..., Tensor] | None = None
    key: Any = "entry"
    nodes: frozenset[fx.Node] = frozenset()
    reads: frozenset[str] = frozenset()

    @property
    def ends(self) -> bool:
        """Whether the features are on the last axis again, and each row is where it was."""
        shape = shape_of(self.node) or ()
        lead = self.chunks == 1 and self.rows == tuple(range(len(shape) - 1))
        return bool(self.parts) and lead and fixed(shape[-1:]) and alike(shape[:-1], _lead(self.entry))

    def run(self, values: Tensor) -> Tensor:
        """The map of each row of ``values``: (rows, features) to (rows, new features)."""
        start = values.reshape(len(values), *[1] * (len(_lead(self.entry)) - 1), values.shape[-1])

        def parts(spread: Spread) -> tuple[Spread, ...]:
            return spread.parts

        def compute(spread: Spread, known: Mapping[Spread, Tensor]) -> Tensor:
            return spread.step(*(known[part] for part in spread.parts)) if spread.step else start

        whole: Spread = self
        return computed(whole, parts, compute).reshape(len(values), -1)


def spread(analysis: AffineAnalysis, node: fx.Node) -> Iterator[Region]:
    """A region for features that were spread over several axes and are on the last one again."""
    for found in _spreads(analysis, node):
        if found.ends:
            readers = [n for n in found.nodes if found.entry in n.args]
            reader = min(readers, key=lambda n: n.name) if readers else None
            for inner in analysis.inputs(found.entry, -1):
                way = None
                if inner.bypass is not None and reader is not None:
                    way = (*inner.bypass, (node, reader, reader.args.index(found.entry)))
                yield replace(
                    inner,
                    root=node,
                    nodes=inner.nodes | found.nodes,
                    reads=inner.reads | found.reads,
                    bypass=way,
                    key=("spread", found.key, inner.key),
                    parts=(inner,),
                    compose=partial(_mapped, found, analysis.device),
                    groups=1,
                )


def _mapped(found: Spread, device: torch.device, inner: Value) -> Value:
    matrix, offset = inner
    columns = dense(matrix, int(found.entry.meta["val"].shape[-1]), device)
    return found.run(columns.t()).t(), None if offset is None else found.run(offset[None])[0]


def _lead(entry: fx.Node) -> tuple[Any, ...]:
    return tuple(entry.meta["val"].shape[:-1])


# ---- finding spreads


def _spreads(analysis: AffineAnalysis, node: fx.Node) -> list[Spread]:
    """``node`` as a map of every entry behind it, nearest first: itself before anything is spread."""
    known: dict[fx.Node, list[Spread]] = analysis.spreads
    # Without recursion: a graph is deeper than the stack of calls.
    waiting = [node]
    while waiting:
        last = waiting[-1]
        operands = _activations(analysis, last) if last not in known and last.target in LAYOUTS else []
        missing = [operand for operand in operands if operand not in known]
        waiting += missing
        if not missing:
            waiting.pop()
            if last not in known:
                found = [*_entry(last), *_continued(analysis, last, operands)]
                known[last] = found[:_DEPTH]
    return known[node]


def _activations(analysis: AffineAnalysis, node: fx.Node) -> list[fx.Node]:
    found = [n for n in node.all_input_nodes if shape_of(n) is not None or n.target in SPLITS]
    return [n for n in found if analysis.constants.reads(n) is None]


def _entry(node: fx.Node) -> Iterator[Spread]:
    shape = shape_of(node) or ()
    if len(shape) > 1 and fixed(shape[-1:]) and node.meta["val"].is_floating_point():
        yield Spread(node, node, tuple(range(len(shape) - 1)))


def _continued(analysis: AffineAnalysis, node: fx.Node, operands: list[fx.Node]) -> Iterator[Spread]:
    whole = shape_of(node) or node.target in SPLITS
    for first in analysis.spreads[operands[0]] if operands and whole else ():
        parts = [first, *(_fellow(first, analysis.spreads[operand]) for operand in operands[1:])]
        fellows = [part for part in parts if part is not None]
        if len(fellows) == len(parts):
            found = _viewed(node, first) if node.target in VIEWS else _computed(analysis, node, tuple(fellows))
            if found is not None:
                nodes = frozenset([node]).union(*(part.nodes for part in fellows))
                reads = found.reads.union(*(part.reads for part in fellows))
                yield replace(found, nodes=nodes, reads=reads, key=analysis.constants.short(found.key))


def _fellow(first: Spread, others: list[Spread]) -> Spread | None:
    """The one of ``others`` with the same entry, rows and shape."""
    for other in others:
        same = (first.entry, first.rows, first.chunks) == (other.entry, other.rows, other.chunks)
        if same and alike(shape_of(first.node), shape_of(other.node)):
            return other
    return None


def _viewed(node: fx.Node, part: Spread) -> Spread | None:
    """A view splits the features of each row differently, or makes the rows' axes and the first of the features' one
    axis."""
    shape, before, lead = node.meta["val"].shape, part.node.meta["val"].shape, _lead(part.entry)
    count = len(part.rows)
    if part.rows != tuple(range(count)) or not fixed(before[count:]):
        return None
    size = part.chunks * math.prod(before[count:])
    whole, rest = shape[: len(lead)], shape[len(lead) :]
    if len(rest) and fixed(rest) and alike(whole, lead) and math.prod(rest) == size:
        rows, chunks, sizes = tuple(range(len(lead))), 1, (*[1] * (len(lead) - 1), *rest)
    elif len(shape) > 1 and fixed(shape[1:]) and 0 not in shape[1:] and not size % math.prod(shape[1:]):
        rows, chunks, sizes = (0,), size // math.prod(shape[1:]), tuple(shape[1:])
    else:
        return None
    key = ("view", chunks, sizes, part.key)
    return Spread(part.entry, node, rows, chunks, (part,), lambda value: value.reshape(-1, *sizes), key)


def _computed(analysis: AffineAnalysis, node: fx.Node, parts: tuple[Spread, ...]) -> Spread | None:
    """An operator with constant operands, if any, that keeps rows apart."""
    first, activations = parts[0], [part.node for part in parts]
    constants = [value for value in node.all_input_nodes if value not in activations]
    reads = [analysis.constants.reads(value) for value in constants]
    # Each activation once: a value times itself is not linear. Keyword arguments may mean anything.
    named = node.kwargs and node.target not in PLAIN
    if named or occurrences(node, activations) != len(parts) or any(read is None for read in reads):
        return None
    rows = LAYOUTS[node.target](node, activations, first.rows)
    if rows is None:
        return None
    keys: dict[fx.Node, Any] = {value: analysis.constants.key(value) for value in constants}
    keys.update({part.node: part.key for part in parts})

    def step(*values: Tensor) -> Tensor:
        if node.target in PLAIN:
            return values[0]
        given = dict(zip(activations, values, strict=True)) | {value: _wide(analysis, value) for value in constants}
        return operator_of(node)(*fx.map_arg(node.args, given.__getitem__))

    key = str(node.target), first.rows, repr(fx.map_arg(node.args, keys.__getitem__))
    read = frozenset[str]().union(*(names for names in reads if names))
    return Spread(first.entry, node, rows, first.chunks, parts, step, key, reads=read)


def _wide(analysis: AffineAnalysis, constant: fx.Node) -> Tensor:
    value = analysis.constants.value(constant, torch.float64)
    return value.to(torch.complex128) if value.is_complex() else value
