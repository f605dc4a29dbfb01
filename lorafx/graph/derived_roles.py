"""Roles from the graph where names do not tell: what meets in an attention, and what goes up, through and down.

A projection whose result reaches argument 0, 1 or 2 of an attention through moves, elementwise operators and norms
alone is its query, key or value; one that reads nothing but an attention is its output. A projection that reads an
elementwise function of others of its block, and gives what these read its width again, comes down from what they went
up to. Anything less plain has no role here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .effects import is_view
from .operands import value_of

aten = torch.ops.aten

_ATTENTION = aten.scaled_dot_product_attention.default
_SIDES = ("attn.query", "attn.key", "attn.value")
#: Operators that only move or repeat entries, though their schema shows no view.
_MOVES = (aten.clone.default, aten.cat.default, aten.index_select.default, aten._to_copy.default)
_MOVES += (aten.repeat_interleave.self_int, aten.stack.default)
#: Norms of query and key, and what they are made of.
_NORMS = (aten.layer_norm.default, aten.rms_norm.default, aten.mean.dim, aten.linalg_vector_norm.default)
#: Elementwise operators that are not activations: residuals, scales, gates, dtypes.
_LINEAR = (aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.neg, aten.to)


@dataclass(frozen=True)
class Projection:
    """One use of a linear weight: what it reads, its size, and its block (stack and number; None outside blocks)."""

    input: fx.Node
    out_features: int
    in_features: int
    block: tuple[str, int] | None


def derived_roles(
    graph: fx.Graph, projections: Mapping[fx.Node, Projection], beside: Collection[fx.Node]
) -> dict[fx.Node, str]:
    """The roles of those of ``projections`` whose place in the graph gives exactly one role.

    ``beside`` are nodes that add to a projection (an adapter): what they read is not followed.
    """
    walk = _Walk(graph, projections, frozenset(beside))
    found: dict[fx.Node, set[str]] = defaultdict(set)
    for node in graph.find_nodes(op="call_function", target=_ATTENTION):
        for projection, role in _around_attention(walk, node):
            found[projection].add(role)
    for node in projections:
        for projection, role in (*_after_attention(walk, node), *_feed_forward(walk, node)):
            found[projection].add(role)
    return {node: next(iter(roles)) for node, roles in found.items() if len(roles) == 1}


class _Walk:
    """Goes backward from values to what they are computed from."""

    def __init__(self, graph: fx.Graph, projections: Mapping[fx.Node, Projection], beside: frozenset[fx.Node]):
        self.projections, self.beside = projections, beside
        self._constant: set[fx.Node] = set()
        for node in graph.nodes:
            computed = node.op == "call_function" and self._constant.issuperset(node.all_input_nodes)
            if node.op == "get_attr" or computed:
                self._constant.add(node)

    def back(self, value: object, *, norms: bool = False) -> tuple[dict[fx.Node, bool], set[fx.Node]]:
        """The projections that ``value`` is made of elementwise, and for each whether through an activation; and all
        else that it is made of, constants aside."""
        ends: dict[fx.Node, bool] = {}
        others: set[fx.Node] = set()
        stack = [(value, False)] if isinstance(value, fx.Node) else []
        seen = set(stack)
        while stack:
            node, activated = stack.pop()
            if node in self.projections:
                ends[node] = ends.get(node, False) or activated
            elif node in self._constant or node in self.beside:
                continue
            elif _is_elementwise(node) or is_view(node) or node.target in _MOVES or (norms and node.target in _NORMS):
                following = {(operand, activated or _is_activation(node)) for operand in _values(node)}
                stack += following - seen
                seen |= following
            else:
                others.add(node)
        return ends, others


def _values(node: fx.Node) -> list[fx.Node]:
    """The operands that are values: not the sizes of a view."""
    return [operand for operand in node.all_input_nodes if isinstance(operand.meta.get("val"), (Tensor, tuple, list))]


def _is_elementwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _is_activation(node: fx.Node) -> bool:
    packet = node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else None
    return _is_elementwise(node) and packet not in _LINEAR


def _around_attention(walk: _Walk, node: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    """What makes query, key and value, where each is made by one projection."""
    sides: dict[fx.Node, list[int]] = defaultdict(list)
    for place, value in enumerate(node.args[:3]):
        ends, _ = walk.back(value, norms=True)
        if len(ends) == 1:
            sides[next(iter(ends))].append(place)
    for projection, places in sides.items():
        if len(places) == 1:
            yield projection, _SIDES[places[0]]
        elif walk.projections[projection].out_features > _width(node.args[places[0]]):
            yield projection, "attn.qkv"  # wider than one of them: they are parts of it


def _width(value: object) -> int:
    """How many channels all heads of (batch, heads, length, channels) have together."""
    shape = value_of(value).shape
    return int(shape[-1]) * int(shape[1]) if len(shape) == 4 else int(shape[-1])


def _after_attention(walk: _Walk, node: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    ends, others = walk.back(walk.projections[node].input)
    if not ends and [other.target for other in others] == [_ATTENTION]:
        yield node, "attn.out"


def _feed_forward(walk: _Walk, node: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    """The roles of a projection down and of the one or two it comes down from."""
    down = walk.projections[node]
    ends, others = walk.back(down.input)
    ups = {end: walk.projections[end] for end in ends}
    beside = all(up.block == down.block and up.in_features == down.out_features for up in ups.values())
    if others or down.block is None or not beside or not any(ends.values()):
        return
    widths = [up.out_features for up in ups.values()]
    if widths == [down.in_features]:
        roles = ["ffn.up"]
    elif widths == [2 * down.in_features]:
        roles = ["ffn.gate_up"]
    elif widths == [down.in_features] * 2 and sum(ends.values()) == 1:
        roles = ["ffn.gate" if activated else "ffn.up" for activated in ends.values()]
    else:
        return
    yield from zip(ups, roles, strict=True)
    yield node, "ffn.down"
