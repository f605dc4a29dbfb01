"""Views: where the channels of a value are in another shape of the same numbers.

Also what all moves of channels share: the carrier.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

import numpy as np
import sympy
from torch import fx

from .axes import sizes_of
from .axis import Array, Axis


class Loser(Protocol):
    """Handles the end of an axis."""

    def lose(self, axis: Axis, why: str) -> None:
        """The axis is followed no further: its channels stay."""


class Carrier(Loser, Protocol):
    """What is carried along axes: labels, or facts about channels."""

    def squash(self, axis: Axis, dim: int, why: str) -> Axis | None:
        """``axis`` without ``dim``, whose positions are no longer told apart; None when nothing is left."""
        ...

    def rows(self, data: Array) -> None:
        """A flat dimension was split: the last dimension of ``data`` runs inside a row."""

    def leave(self, data: Array) -> None:
        """The operator does not read these."""

    def step(self, data: Array) -> None:
        """Entries along the last dimension of ``data`` are tied: all stay or all go."""

    def hold(self, data: Array) -> None:
        """No row of ``data`` goes, whatever goes inside one."""

    def among(self, axis: Axis, value: float | None) -> Axis:
        """``axis`` after ``value`` was put beside what there was, along other dimensions; None is more of the same."""
        ...

    def fixed(self, size: int) -> Array:
        """Entries for positions that are only known to stay."""
        ...

    def alike(self, axes: list[Axis], why: str) -> Axis:
        """One axis for several that run over the same channels."""
        ...


#: Dimensions of a value and their sizes.
Sizes: TypeAlias = "tuple[tuple[int, Any], ...]"
Move: TypeAlias = "Callable[[Carrier, fx.Node, Callable[[object], list[Any]]], list[Any]]"


def _segments(ins: Sizes, outs: Sizes) -> tuple[tuple[list[int], list[int]], ...]:
    """Runs of dimensions that hold the same elements before and after; dimensions of size 1 are left out."""
    before, after = (tuple((dim, sympy.sympify(size)) for dim, size in sizes if size != 1) for sizes in (ins, outs))
    return _runs(before, after)


@functools.lru_cache(maxsize=4096)  # symbolic algebra is slow, and blocks repeat
def _runs(ins: Sizes, outs: Sizes) -> tuple[tuple[list[int], list[int]], ...]:
    return tuple(_found(list(ins), list(outs)))


def _found(before: list[tuple[int, Any]], after: list[tuple[int, Any]]) -> Iterator[tuple[list[int], list[int]]]:
    while before or after:
        if not before or not after:  # what is left can only be free sizes that are 1
            yield [dim for dim, _ in before], [dim for dim, _ in after]
            return
        (i, left), (o, right) = before.pop(0), after.pop(0)
        taken, given = [i], [o]
        while left != right and sympy.simplify(left - right) != 0:
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
    for taken, given in _segments(tuple(enumerate(before)), tuple(enumerate(after))):
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


def view(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    """The same numbers in another shape."""
    value = node.args[0]
    return reshaped(carrier, known(value), sizes_of(value), sizes_of(node), str(node.target))


def expand(carrier: Carrier, node: fx.Node, known: Any) -> list[Any]:
    """Entries along a dimension of size 1 are repeated: the same channels, wherever they are."""
    value = node.args[0]
    before, after = sizes_of(value), sizes_of(node)
    shift = len(after) - len(before)
    widened = {dim for dim, size in enumerate(before) if size == 1 and after[dim + shift] != 1}
    return [axis.moved(lambda dim: dim + shift) for axis in squeezed(carrier, known(value), widened, str(node.target))]


def squeezed(carrier: Loser, axes: list[Axis], dims: set[int], why: str) -> list[Axis]:
    """The axes without those of their dimensions of size 1 that are in ``dims``: what is repeated along them."""
    result = []
    for axis in axes:
        kept = tuple(dim for dim in axis.dims if dim not in dims)
        if kept:
            result.append(Axis(kept, axis.data.reshape([axis.data.shape[axis.dims.index(dim)] for dim in kept])))
        else:
            carrier.lose(axis, why)
    return result
