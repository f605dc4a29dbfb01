"""In the last layers, compute only the tokens that are read.

A classifier reads one token of the last block's output. What that block computes for the others after its keys and
values is not used: five sixths of its products. So a selection moves up through all operators that compute each token
by itself and that nothing else reads; above them, a slice of one token takes its place.

Sizes are compared as the tracer has them: numbers, or expressions of its symbols.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

aten = torch.ops.aten
#: The end of a slice without one.
_END = 2**63 - 1


class Row(NamedTuple):
    """One place along one axis of a value; the last is -1."""

    axis: int
    place: int


#: What of its arguments a node reads to compute a row of its result, an argument that is not there as it is; None where
#: that cannot be computed by itself.
Rule = Callable[[fx.Node, Row], "Mapping[fx.Node, Row] | None"]


def read_rows(graph: fx.Graph, *, through_attention: bool = True) -> int:
    """Compute single rows where no more is read, in place; how many nodes then compute less.

    Args:
        graph: of ATen operators, with the shapes of their results in ``meta``; those of what computes less stay as they
            were, so the graph is to be traced again
        through_attention: whether an attention computes one query where one is read, its product beside that of keys
            and values
    """
    rules = {**_RULES, **(_ATTENTION if through_attention else {})}
    reads = _reads(graph, rules)
    if not any(node.target in _PRODUCTS for node in reads):
        return 0
    slices: dict[tuple[fx.Node, Row], fx.Node] = {}
    for node in list(graph.nodes):
        for argument, row in reads[node][1].items() if node in reads else ():
            if argument not in reads:
                node.replace_input_with(argument, _sliced(graph, slices, argument, row, node))
        if node in reads and node.target in _SIZED:
            sizes = list(_args(node)[1])
            sizes[reads[node][0].axis] = 1
            node.args = (_args(node)[0], sizes, *_args(node)[2:])
        selected = _selected(node)
        if selected is not None and _args(node)[0] in reads:
            node.args = (_args(node)[0], selected.axis, 0, *((1,) if node.target is aten.slice.Tensor else ()))
    return len(reads)


def computed_by_row(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose results are read in one row only, which can be computed by itself; dropout is ignored."""
    return set(_reads(graph, {**_RULES, **_ATTENTION, aten.dropout.default: _first}))


def _reads(graph: fx.Graph, rules: Mapping[Any, Rule]) -> dict[fx.Node, tuple[Row, Mapping[fx.Node, Row]]]:
    """The nodes of whose results one row is read, that row, and what of their arguments it takes."""
    asked: dict[fx.Node, set[Row | None]] = defaultdict(set)  # None is all of it
    found: dict[fx.Node, tuple[Row, Mapping[fx.Node, Row]]] = {}
    for node in reversed(list(graph.nodes)):
        row = next(iter(asked[node])) if len(asked[node]) == 1 else None
        # Rules read arguments by position; a keyword argument makes it another form of the operator.
        known = node.target in rules and (not node.kwargs or node.target in _NAMED)
        taken = rules[node.target](node, row) if row is not None and known else None
        if row is not None and taken is not None:
            found[node] = row, taken
        else:
            selected = _selected(node)
            taken = {} if selected is None else {_args(node)[0]: selected}
        for argument in node.all_input_nodes:
            asked[argument].add(taken.get(argument))
    return found


def _selected(node: fx.Node) -> Row | None:
    """The row that a node selects."""
    if node.op != "call_function" or node.target not in (aten.select.int, aten.slice.Tensor):
        return None
    source, axis, place, *rest = (*_args(node), *(0, 0, _END)[len(_args(node)) - 1 :])
    if not isinstance(source, fx.Node) or not isinstance(axis, int) or not isinstance(place, int) or node.kwargs:
        return None
    if node.target is aten.slice.Tensor and (place, *rest) not in ((0, 1), (0, 1, 1), (-1, _END), (-1, _END, 1)):
        return None
    shape = _shape(source)
    return None if shape is None else Row(axis % len(shape), place)


def _sliced(
    graph: fx.Graph, slices: dict[tuple[fx.Node, Row], fx.Node], value: fx.Node, row: Row, before: fx.Node
) -> fx.Node:
    """A slice of one row, made once."""
    if (value, row) not in slices:
        end = row.place + 1 if row.place != -1 else _END
        with graph.inserting_before(before):
            made = graph.call_function(aten.slice.Tensor, (value, row.axis, row.place, end))
        made.meta["val"] = aten.slice.Tensor(value.meta["val"], *made.args[1:])
        slices[value, row] = made
    return slices[value, row]


# ---- rules


def _each(node: fx.Node, row: Row) -> Mapping[fx.Node, Row] | None:
    """Elementwise, with arguments that are broadcast."""
    shape, taken = _shape(node), dict[fx.Node, Row]()
    for argument in node.all_input_nodes:
        if not isinstance(argument.meta.get("val"), torch.Tensor):
            return None
        own = _shape(argument)
        axis = row.axis - (len(shape or ()) - len(own or ()))
        if own is None or shape is None or (axis >= 0 and own[axis] not in (1, shape[row.axis])):
            return None
        if axis >= 0 and own[axis] != 1:
            taken[argument] = Row(axis, row.place)
    return taken


def _idle(node: fx.Node, row: Row) -> Mapping[fx.Node, Row] | None:
    """Dropout that drops nothing."""
    source, _, training = _args(node)
    return None if training is not False or not isinstance(source, fx.Node) else {source: row}


def _first(node: fx.Node, row: Row) -> Mapping[fx.Node, Row] | None:
    return {_args(node)[0]: row}


def _of_features(node: fx.Node, row: Row) -> Mapping[fx.Node, Row] | None:
    """A linear layer: the last axis of its first argument is used up."""
    source, *others = node.all_input_nodes
    shape = _shape(source)
    if source is not _args(node)[0] or shape is None or row.axis >= len(shape) - 1 or source in others:
        return None
    return {source: row}


def _normed(node: fx.Node, row: Row) -> Mapping[fx.Node, Row] | None:
    shape, over = _shape(_args(node)[0]), _args(node)[1]
    if shape is None or row.axis >= len(shape) - len(over) or _args(node)[0] in _args(node)[2:]:
        return None
    return {_args(node)[0]: row}


def _along(node: fx.Node, row: Row) -> Mapping[fx.Node, Row] | None:
    """What computes over axes that it keeps: softmax, sums."""
    shape, axes = _shape(_args(node)[0]), _args(node)[1]
    sums = node.target is not aten.softmax.int
    kept = not sums or (len(_args(node)) > 2 and _args(node)[2] is True)
    if shape is None or not kept:
        return None
    over = {axis % len(shape) for axis in (axes if isinstance(axes, list | tuple) else [axes])}
    return None if row.axis in over or not over else {_args(node)[0]: row}


def _product(node: fx.Node, row: Row) -> Mapping[fx.Node, Row] | None:
    """A product of matrices, a row of which is one of the first."""
    first, second = _args(node)
    shape, own = _shape(node), _shape(first)
    if shape is None or own is None or len(own) < 2 or first is second or row.axis != len(shape) - 2:
        return None
    return {first: Row(len(own) - 2, row.place)}


def _attention(node: fx.Node, row: Row) -> Mapping[fx.Node, Row] | None:
    """An attention, a row of which is one query, and what is added to its scores."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, _args(node), strict=False)), **node.kwargs}
    query: Any = given["query"]
    shape = _shape(node)
    mask: Any = given.get("attn_mask")
    if given.get("is_causal") or given.get("dropout_p") or shape is None or row.axis != len(shape) - 2:
        return None
    if query in (given["key"], given["value"], mask):
        return None
    taken: dict[Any, Row] = {query: row}
    own = _shape(mask) if mask is not None else (1, 1)
    if own is None or len(own) < 2 or own[-2] not in (1, shape[-2]) or mask in (given["key"], given["value"]):
        return None
    if own[-2] != 1:
        taken[mask] = Row(len(own) - 2, row.place)
    return taken


def _selected_along(node: fx.Node, row: Row) -> Mapping[fx.Node, Row] | None:
    """Places of another axis, the same for every row."""
    source, axis, places = _args(node)
    shape = _shape(source)
    if shape is None or axis % len(shape) == row.axis or source is places:
        return None
    return {source: row}


def _turned(node: fx.Node, row: Row) -> Mapping[fx.Node, Row] | None:
    shape = _shape(node)
    if shape is None:
        return None
    order = list(range(len(shape)))
    if node.target is aten.transpose.int:
        first, second = (axis % len(shape) for axis in _args(node)[1:3])
        order[first], order[second] = second, first
    else:
        order = [axis % len(shape) for axis in _args(node)[1]]
    return {_args(node)[0]: Row(order[row.axis], row.place)}


def _reshaped(node: fx.Node, row: Row) -> Mapping[fx.Node, Row] | None:
    """A change of shape that leaves the axis as it is."""
    shape, own = _shape(node), _shape(_args(node)[0])
    if shape is None or own is None or shape[row.axis] == 1:
        return None
    before = math.prod(shape[: row.axis])
    same = [axis for axis, size in enumerate(own) if size == shape[row.axis] and math.prod(own[:axis]) == before]
    return {_args(node)[0]: Row(same[0], row.place)} if len(same) == 1 else None


def _expanded(node: fx.Node, row: Row) -> Mapping[fx.Node, Row] | None:
    shape, own = _shape(node), _shape(_args(node)[0])
    axis = row.axis - (len(shape or ()) - len(own or ()))
    if shape is None or own is None or (axis >= 0 and own[axis] not in (1, shape[row.axis])):
        return None
    return {} if axis < 0 or own[axis] == 1 else {_args(node)[0]: Row(axis, row.place)}


def _untouched(node: fx.Node, row: Row) -> Mapping[fx.Node, Row] | None:
    """A slice of another axis, or of all there is."""
    axis, *rest = (*_args(node)[1:], *(0, 0, _END, 1)[len(_args(node)) - 1 :])
    source, shape = _args(node)[0], _shape(_args(node)[0])
    if shape is None or (axis % len(shape) == row.axis and tuple(rest) != (0, _END, 1)):
        return None
    return {source: row}


_PER_ELEMENT = (
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar, aten.where.self),
    *(aten.gelu.default, aten.relu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default),
    *(aten.erf.default, aten.exp.default, aten.neg.default, aten.rsqrt.default, aten.sqrt.default),
    *(aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default),
    *(
        aten.bitwise_not.default,
        aten.logical_not.default,
        aten.bitwise_and.Tensor,
        aten.lt.Scalar,
        aten.gt.Scalar,
        aten.eq.Scalar,
    ),
)
_SIZED = (aten.view.default, aten.reshape.default, aten.expand.default)
_RULES: dict[Any, Rule] = {
    **dict.fromkeys(_PER_ELEMENT, _each),
    aten.dropout.default: _idle,
    aten.linear.default: _of_features,
    aten.layer_norm.default: _normed,
    aten.rms_norm.default: _normed,
    aten.transpose.int: _turned,
    aten.permute.default: _turned,
    aten.view.default: _reshaped,
    aten.reshape.default: _reshaped,
    aten.flatten.using_ints: _reshaped,
    aten.unflatten.int: _reshaped,
    aten.slice.Tensor: _untouched,
    aten.index_select.default: _selected_along,
}
_ATTENTION: dict[Any, Rule] = {
    aten.scaled_dot_product_attention.default: _attention,
    aten.matmul.default: _product,
    aten.softmax.int: _along,
    aten.sum.dim_IntList: _along,
    aten.expand.default: _expanded,
}
#: Operators that may have keyword arguments: these change nothing there, or are read.
_NAMED = (*_PER_ELEMENT, aten.scaled_dot_product_attention.default)
_PRODUCTS = (aten.linear.default, aten.matmul.default, aten.scaled_dot_product_attention.default)


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _shape(node: Any) -> tuple[Any, ...] | None:
    """The sizes of a tensor, numbers or expressions."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in value.shape)
