"""Operators that only move channels about: the same move for labels and for facts about channels.

Each function takes the axes of the operands and gives those of the result. What a move cannot follow it hands to the
``Carrier``, which knows what that means for what is carried: labels are pinned or tied, facts are forgotten.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

import numpy as np
import sympy
import torch
from torch import fx

from .axes import Array, Axis, axis_of, sizes_of

aten = torch.ops.aten


class Carrier(Protocol):
    """What is carried along axes."""

    def lose(self, axis: Axis, why: str) -> None:
        """The axis is followed no further: its channels stay."""

    def squash(self, axis: Axis, dim: int, why: str) -> Axis | None:
        """``axis`` without ``dim``, whose positions are not told apart any more; None when nothing is left."""
        ...

    def rows(self, data: Array) -> None:
        """A flat dimension was split: the last dimension of ``data`` runs inside a row."""

    def alike(self, axes: list[Axis], why: str) -> Axis:
        """One axis for several that run over the same channels."""
        ...


Move: TypeAlias = "Callable[[Carrier, fx.Node, Callable[[object], list[Any]]], list[Any]]"


# ---- views


def _segments(ins: list[tuple[int, Any]], outs: list[tuple[int, Any]]) -> Iterator[tuple[list[int], list[int]]]:
    """Runs of dimensions that hold the same elements before and after; dimensions of size 1 are left out."""
    before = [(dim, sympy.sympify(size)) for dim, size in ins if size != 1]
    after = [(dim, sympy.sympify(size)) for dim, size in outs if size != 1]
    while before or after:
        if not before or not after:  # what is left can only be free sizes that are 1
            yield [dim for dim, _ in before], [dim for dim, _ in after]
            return
        (i, left), (o, right) = before.pop(0), after.pop(0)
        taken, given = [i], [o]
        while sympy.simplify(left - right) != 0:
            ratio = sympy.cancel(right / left)
            longer = ratio > 1 if ratio.is_number else sympy.denom(ratio) == 1
            if longer and before:
                dim, size = before.pop(0)
                taken.append(dim)
                left *= size
            elif after:
                dim, size = after.pop(0)
                given.append(dim)
                right *= size
            else:
                break
        yield taken, given


def reshaped(
    carrier: Carrier, axes: list[Axis], before: tuple[Any, ...], after: tuple[Any, ...], why: str
) -> list[Axis]:
    """The axes of a value of sizes ``before`` that is viewed with sizes ``after``."""
    rank = len(before)  # dimensions of the result are numbered from here on while both are in play
    current = list(axes)
    for taken, given in _segments(list(enumerate(before)), list(enumerate(after))):
        touched = [axis for axis in current if set(axis.dims) & set(taken)]
        current = [axis for axis in current if axis not in touched]
        if len(taken) == len(given) == 1:
            renamed = {taken[0]: rank + given[0]}
            current += [axis.moved(lambda dim: renamed.get(dim, dim)) for axis in touched]  # noqa: B023  (used at once)
            continue
        sizes = [before[dim] for dim in taken], [after[dim] for dim in given]
        if not touched:
            continue
        if not all(isinstance(size, int) for part in sizes for size in part):
            for axis in touched:
                rest: Axis | None = axis
                for dim in taken:
                    if rest is not None and dim in rest.dims:
                        rest = carrier.squash(rest, dim, why)
                current += [rest] if rest is not None else []
        elif len(touched) > 1:
            for axis in touched:
                carrier.lose(axis, why)
        else:
            current.append(_regrouped(carrier, touched[0], taken, sizes[0], [rank + dim for dim in given], sizes[1]))
    return [axis.moved(lambda dim: dim - rank) for axis in current if min(axis.dims) >= rank]


def _regrouped(
    carrier: Carrier, axis: Axis, taken: list[int], old: list[int], given: list[int], new: list[int]
) -> Axis:
    """One axis whose dimensions ``taken`` become ``given``; those it does not have are repeated along."""
    rest = [dim for dim in axis.dims if dim not in taken]
    order = [axis.dims.index(dim) for dim in (*rest, *(dim for dim in taken if dim in axis.dims))]
    data = axis.data.transpose(order)
    kept = data.shape[: len(rest)]
    data = data.reshape(*kept, *(size if dim in axis.dims else 1 for dim, size in zip(taken, old, strict=True)))
    data = np.broadcast_to(data, (*kept, *old)).reshape(*kept, *new)
    if len(new) > 1:
        carrier.rows(data)
    return Axis((*rest, *given), data)


def _view(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    value = node.args[0]
    return reshaped(carrier, known(value), sizes_of(value), sizes_of(node), str(node.target))  # type: ignore[arg-type]


def _identity(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    return known(node.args[0])


# ---- order


def rank_of(node: object) -> int:
    """How many dimensions a node's value has."""
    return node.meta["val"].dim()  # type: ignore[union-attr]


def _transpose(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    rank, given = rank_of(node), list(node.args[1:3]) or [0, 1]
    a, b = (int(dim) % rank for dim in given)  # type: ignore[arg-type]
    return [axis.moved(lambda dim: {a: b, b: a}.get(dim, dim)) for axis in known(node.args[0])]


def _permute(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    rank = rank_of(node)
    order = [int(dim) % rank for dim in node.args[1]]  # type: ignore[union-attr]
    return [axis.moved(order.index) for axis in known(node.args[0])]


def _expand(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    shift = rank_of(node) - rank_of(node.args[0])
    return [axis.moved(lambda dim: dim + shift) for axis in known(node.args[0])]


# ---- parts


def part(carrier: Carrier, axes: list[Axis], dim: int, index: slice | int, why: str) -> list[Axis]:
    """The axes of a slice or, for a number, of one position along ``dim``, which then is gone."""
    result = []
    for axis in axes:
        if dim in axis.dims:
            place = axis.dims.index(dim)
            data = axis.data[(slice(None),) * place + (index,)]
            dims = axis.dims if isinstance(index, slice) else tuple(d for d in axis.dims if d != dim)
            if dims and data.size:
                result.append(Axis(dims, data))
            elif data.size:
                carrier.lose(Axis((0,), data.reshape(1)), why)
        else:
            result.append(axis)
    return result if isinstance(index, slice) else [axis.moved(lambda d: d - (d > dim)) for axis in result]


def slice_bounds(node: fx.Node, size: int) -> tuple[int, int, int] | None:
    """Start, end and step of a slice of a dimension of fixed size; None when they are no numbers."""
    start, end, step = (*node.args[2:], *(None, None, 1)[len(node.args) - 2 :])
    if not all(value is None or isinstance(value, int) for value in (start, end, step)):
        return None
    return slice(start, end, step).indices(size)  # type: ignore[return-value]


def _slice(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    axes, rank = known(node.args[0]), rank_of(node)
    dim = int(node.args[1]) % rank if len(node.args) > 1 else 0  # type: ignore[arg-type]
    axis = axis_of(axes, dim)
    if axis is None:
        return axes
    bounds = slice_bounds(node, axis.data.shape[axis.dims.index(dim)])
    if bounds is None or bounds[2] != 1:
        carrier.lose(axis, str(node.target))
        return [other for other in axes if other is not axis]
    return part(carrier, axes, dim, slice(*bounds), str(node.target))


def _select(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    axes, (dim, index) = known(node.args[0]), node.args[1:3]
    dim = int(dim) % rank_of(node.args[0])  # type: ignore[arg-type]
    axis = axis_of(axes, dim)
    if axis is not None and not isinstance(index, int):
        carrier.lose(axis, str(node.target))
        axes = [other for other in axes if other is not axis]
    return part(carrier, axes, dim, index if isinstance(index, int) else 0, str(node.target))


def pieces(node: fx.Node) -> tuple[int, list[Any]]:
    """The dimension that a split, chunk or unbind cuts, and the sizes of its pieces."""
    value = node.args[0]
    rank = rank_of(value)
    default = 1 if node.target is aten.unbind.int else 2
    dim = int(node.args[default]) if len(node.args) > default else 0  # type: ignore[arg-type]
    dim %= rank
    if node.target is aten.unbind.int:
        return dim, [1] * value.meta["val"].shape[dim]  # type: ignore[union-attr]
    return dim, [piece.shape[dim] for piece in node.meta["val"]]


def _split(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    axes = known(node.args[0])
    dim, sizes = pieces(node)
    axis = axis_of(axes, dim)
    if axis is not None and not all(isinstance(size, int) for size in sizes):
        carrier.lose(axis, str(node.target))
        axes, axis = [other for other in axes if other is not axis], None
    result, start = [], 0
    for size in sizes:
        index = start if node.target is aten.unbind.int else slice(start, start + size)
        whole = axis is None and isinstance(index, slice)
        result.append(list(axes) if whole else part(carrier, axes, dim, index, str(node.target)))
        start = start + size if axis is not None else 0
    return result


def _getitem(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    value, index = known(node.args[0]), node.args[1]
    inside = bool(value) and isinstance(value[0], list) and isinstance(index, int)
    return value[index] if inside else []


# ---- together


def _cat(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    values: Any = node.args[0]
    dim = int(node.args[1]) % rank_of(node) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    axes = [known(value) for value in values]
    along = [axis_of(found, dim) for found in axes]
    result: list[Axis] = []
    if all(axis is not None and axis.dims == along[0].dims for axis in along):  # type: ignore[union-attr]
        place = along[0].dims.index(dim)  # type: ignore[union-attr]
        result.append(Axis(along[0].dims, np.concatenate([axis.data for axis in along], place)))  # type: ignore
    else:
        for axis in along:
            if axis is not None:
                carrier.lose(axis, str(node.target))
    others = [[axis for axis in found if dim not in axis.dims] for found in axes]
    for first in others[0]:
        twins = [axis_of(found, first.dims[0]) for found in others[1:]]
        if all(twin is not None and twin.dims == first.dims for twin in twins):
            result.append(carrier.alike([first, *twins], str(node.target)))  # type: ignore[list-item]
        else:
            for axis in (first, *twins):
                if axis is not None:
                    carrier.lose(axis, str(node.target))
    return result


_VIEWS = ("view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int")
_VIEWS += ("unsqueeze.default", "squeeze.default", "squeeze.dim", "squeeze.dims")
_IDENTITIES = ("contiguous.default", "clone.default", "detach.default", "alias.default", "dropout.default")
_IDENTITIES += ("to.dtype", "to.device", "to.dtype_layout", "to.other", "type_as.default", "_to_copy.default")
_IDENTITIES += ("lift_fresh_copy.default", "feature_dropout.default")


def _operators(names: tuple[str, ...], move: Move) -> dict[Any, Move]:
    found = {}
    for name in names:
        packet, _, overload = name.partition(".")
        found[getattr(getattr(aten, packet), overload)] = move
    return found


#: Every operator that only moves channels.
MOVES: dict[Any, Move] = {
    **_operators(_VIEWS, _view),
    **_operators(_IDENTITIES, _identity),
    **_operators(("transpose.int", "t.default"), _transpose),
    **_operators(("permute.default",), _permute),
    **_operators(("expand.default",), _expand),
    **_operators(("slice.Tensor",), _slice),
    **_operators(("select.int",), _select),
    **_operators(("split.Tensor", "split_with_sizes.default", "chunk.default", "unbind.int"), _split),
    **_operators(("cat.default",), _cat),
    operator.getitem: _getitem,
}
