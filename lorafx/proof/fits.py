"""Compare one tensor of a merge with base and adapter: every number of it, a tile at a time.

It is judged twice. No number may be further from the exact one (fp64, from the files) than rounding explains; and the
change as a whole must be the update: in half precision a small update, and so a skipped merge, can vanish in each
number's rounding, but not in all of them together. If it fails, known mistakes are tried, and the first that fits is
named.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..deferred.tensor import deferred, forget, passing_tiles
from ..formats.changes import Change, Factors, Stack, Whole

#: Unit roundoff of the sums that make an update: fp32, whatever the weights are.
_SUMS = 2.0**-24
#: Roundings of an update on its way in the weights' dtype: the product, its scale, and one for a cast.
_ROUNDINGS = 3
#: … and of a row that is rescaled to a length: the sum, the length, the quotient, the product.
_LENGTHS = 5
#: How much of the update must be there. Rounding on the way moves few numbers by a place: 1 within some hundredths; a
#: skipped merge is 0, one done twice 2.
_THERE = (0.8, 1.2)
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Made:
    """How a tensor should have been made: from the base's, by weighted changes."""

    name: str
    base: Tensor
    changes: tuple[tuple[float, Change], ...]

    def value(self) -> Tensor:
        """The exact tensor, deferred."""
        old = deferred(self.base.detach())
        if len(self.changes) == 1 and self.changes[0][0] == 1.0:
            return deferred(self.changes[0][1].updated(old))
        exact = old.double()
        for weight, change in self.changes:
            exact = exact + (change.updated(old) - old.double()) * weight
        return deferred(exact)

    def amplitude(self) -> Tensor | None:
        """For each number the product of the lengths of the two vectors whose dot product its update is, deferred; None
        where the update is not a dot product. It bounds the rounding of the sum (Cauchy–Schwarz)."""
        old = deferred(self.base.detach())
        sizes = [abs(weight) * (_lengths(change).updated(old) - old.double()).abs() for weight, change in self.products]
        return deferred(torch.stack(sizes).sum(0)) if len(sizes) > 1 else deferred(sizes[0]) if sizes else None

    @property
    def products(self) -> list[tuple[float, Factors | Stack]]:
        """The changes that are products of two factors."""
        return [(weight, change) for weight, change in self.changes if isinstance(change, (Factors, Stack))]

    @property
    def lengths(self) -> bool:
        """Whether rows were rescaled to lengths (DoRA)."""
        return any(isinstance(change, Factors) and change.magnitude is not None for _, change in self.changes)

    def times(self, factor: float) -> Made:
        """The same with an update this many times as large."""
        return dataclasses.replace(self, changes=tuple((weight * factor, change) for weight, change in self.changes))


def _lengths(change: Factors | Stack) -> Factors | Stack:
    """The same change with the lengths of its factors' vectors, a product of rank 1."""
    if isinstance(change, Factors):
        a, b = (value.detach().flatten(1).double() for value in (change.a, change.b))
        lengths = a.norm(dim=0, keepdim=True), b.norm(dim=1, keepdim=True)
        return dataclasses.replace(change, a=lengths[0], b=lengths[1], magnitude=None)
    a = change.a.detach().double().reshape(change.experts, -1, change.a.shape[1]).norm(dim=1)
    b = change.b.detach().double().reshape(change.b.shape[0], -1, change.experts).norm(dim=1)
    return dataclasses.replace(change, a=a, b=b)


@dataclass(frozen=True)
class Fit:
    """How a tensor found compares with one way it could have been made.

    Attributes:
        largest: the largest difference from the exact value (fp64)
        excess: the largest difference as a share of what rounding allows at that place
        there: how much of the rounded update is present (1 is all); None where rounding leaves nothing of it
        times: how many times the exact update is present; None without an update
    """

    largest: float
    excess: float
    there: float | None
    times: float | None

    @property
    def ok(self) -> bool:
        """Whether it was made this way."""
        return self.excess <= 1.0 and (self.there is None or _THERE[0] <= self.there <= _THERE[1])


def fit(found: Tensor, made: Made, unit: float | None = None) -> Fit:
    """Compare ``found`` with ``made``, computed with this unit roundoff; by default that of its dtype."""
    exact, sizes = made.value(), made.amplitude()
    unit = torch.finfo(found.dtype).eps / 2 if unit is None else unit
    least = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
    inner = (made.products[0][1].a.shape[0] + 2) * _SUMS if made.products else 0.0
    largest = excess = 0.0
    sums = torch.zeros(4, dtype=torch.float64)
    tensors = [found.detach(), made.base.detach(), exact, *([] if sizes is None else [sizes])]
    for new, old, want, *size in zip(*map(_rows, tensors), strict=True):
        update = want - old.double()
        distance = (new.double() - want).abs()
        allowed = unit * (want.abs() * (1 + _LENGTHS * made.lengths) + _ROUNDINGS * update.abs()) + least
        if size:
            allowed = (
                allowed + max(inner, _SUMS) * size[0] + made.lengths * math.sqrt(want.shape[-1]) * _SUMS * want.abs()
            )
        share = distance / allowed
        # NaN is further than any number.
        largest = max(largest, float(torch.nan_to_num(distance, nan=math.inf).max()))
        excess = max(excess, float(torch.nan_to_num(share, nan=math.inf).max()))
        before = old.to(new.dtype).double()
        rounded, moved = want.to(new.dtype).double() - before, new.double() - before
        sums += torch.stack(
            [(moved * rounded).sum(), rounded.square().sum(), (moved * update).sum(), update.square().sum()]
        )
    for tensor in tensors:
        forget(tensor)
    there, times = (float(sums[at] / sums[at + 1]) if sums[at + 1] > 0 else None for at in (0, 2))
    return Fit(largest, excess * (1 - 1e-9), there, times)


def _rows(tensor: Tensor) -> Iterator[Tensor]:
    return passing_tiles(tensor if tensor.dim() else tensor.reshape(1))


# ---- one tensor


def judge(found: Tensor, made: Made, tied: Sequence[Made] = ()) -> tuple[Fit, str]:
    """How a tensor fits, and what is wrong with it, if anything. ``tied`` says how the tensors that it is tied to in
    the base were made."""
    first = fit(found, made)
    if first.ok:
        return first, ""
    for other in _as_well(made, found.dtype):
        again = fit(found, other)
        if again.ok:
            return again, ""
    return first, _cause(found, made, first, tied)


def _as_well(made: Made, dtype: torch.dtype) -> Iterator[Made]:
    """Other ways that count as right: the base, the adapter, or both in the merge's dtype from the start."""
    old = dataclasses.replace(made, base=deferred(made.base.detach()).to(dtype)) if made.base.dtype != dtype else None
    if old is not None:
        yield old
    for start in (made, old):
        if start is not None and made.products and dtype in _HALVES:
            yield dataclasses.replace(start, changes=tuple((w, _rounded(c, dtype)) for w, c in start.changes))


def _rounded(change: Change, dtype: torch.dtype) -> Change:
    if not isinstance(change, (Factors, Stack)):
        return change
    return dataclasses.replace(change, a=change.a.to(dtype), b=change.b.to(dtype))


def _cause(found: Tensor, made: Made, first: Fit, tied: Sequence[Made]) -> str:
    if not math.isfinite(first.largest):
        return "it holds numbers that are none (nan or inf)"
    for cause, other in _others(made, first):
        if _is(found, other):
            return cause
    for other in tied:
        if _is(found, dataclasses.replace(other, base=made.base)):
            return f"tie not kept apart: it has what the adapter makes of {other.name}"
    if not made.changes:
        return "changed, though the adapter does not change it"
    for half in _HALVES:
        narrow = torch.finfo(half).eps / 2
        if torch.finfo(found.dtype).eps / 2 < narrow and fit(found, made, narrow).ok and _holds(found, half):
            return f"rounded twice: its numbers are those of {str(half).removeprefix('torch.')}"
    times = first.times
    if times is not None and _is(found, made.times(times)):
        return f"wrong scale: {times:.4g} times the update"
    return f"made in no way that is known here{'' if times is None else f'; {times:.3g} times the update is in it'}"


def _is(found: Tensor, made: Made) -> bool:
    return any(fit(found, one).ok for one in (made, *_as_well(made, found.dtype)))


def _others(made: Made, first: Fit) -> Iterator[tuple[str, Made]]:
    """Known mistakes, with the tensor that each makes."""
    if not made.changes:
        return
    yield "skipped: it is the base's", dataclasses.replace(made, changes=())
    if all(isinstance(change, Whole) for _, change in made.changes):
        return
    yield "merged twice", made.times(2.0)
    yield "subtracted: the update has the wrong sign", made.times(-1.0)
    for cause, swap in _WRONG.items():
        changes = tuple((weight, swap(change)) for weight, change in made.changes)
        if any(new is not None for _, new in changes):
            kept = tuple((w, new or old) for (w, new), (_, old) in zip(changes, made.changes, strict=True))
            yield cause, dataclasses.replace(made, changes=kept)


def _without_lengths(change: Change) -> Change | None:
    wanted = isinstance(change, Factors) and change.magnitude is not None
    return dataclasses.replace(change, magnitude=None) if wanted else None


def _experts_slowest(change: Change) -> Change | None:
    """B read as (out, experts, rank), as A is."""
    if not isinstance(change, Stack) or change.experts == 1:
        return None
    out = change.b.shape[0]
    return dataclasses.replace(change, b=change.b.reshape(out, change.experts, -1).transpose(1, 2).reshape(out, -1))


def _experts_fastest(change: Change) -> Change | None:
    """A read as (rank, experts, in), as B is."""
    if not isinstance(change, Stack) or change.experts == 1:
        return None
    features = change.a.shape[1]
    a = change.a.reshape(-1, change.experts, features).transpose(0, 1).reshape(-1, features)
    return dataclasses.replace(change, a=a)


def _turned(change: Change) -> Change | None:
    """The update of a square weight, transposed."""
    if isinstance(change, Factors) and change.a.dim() == 2 and change.a.shape[1] == change.b.shape[0]:
        return dataclasses.replace(change, a=change.b.t(), b=change.a.t(), magnitude=None)
    if isinstance(change, Stack) and change.a.shape[1] == change.b.shape[0]:
        return dataclasses.replace(change, transposed=not change.transposed)
    return None


_WRONG = {
    "its magnitudes (DoRA) were left out": _without_lengths,
    "transposed expert layout: B's experts were taken for its slowest index": _experts_slowest,
    "transposed expert layout: A's experts were taken for its fastest index": _experts_fastest,
    "transposed: the update was added the other way round": _turned,
}


def _holds(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether every number can be represented in ``dtype``."""
    return all(torch.equal(tile.to(dtype).to(tile.dtype), tile) for tile in _rows(tensor.detach()))
