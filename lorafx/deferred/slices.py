"""What rows and columns hold, found by reading no more of a tensor than necessary.

A row that is not zero mostly shows it in its first few numbers. Rows still undecided are read on, a tile at a time,
unless the way the tensor is made shows that they are zero (:mod:`.zeros`). So weights that are computed as they are
written give the same results as those in memory, without a second copy of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from .recipe import Recipe
from .tensor import Deferred, deferred, forget, passing_rows, passing_tiles, recipe_of, value
from .tiles import TILE, Part, Tiles
from .zeros import zeros_of

#: Numbers of each row or column that are looked at first.
_FIRST = 4
#: How many numbers are read before memory is released.
_HELD = 1 << 26
#: Results for tensors that are computed later. Their values are fixed: what they are made from is not written to.
_KNOWN: WeakKeyDictionary[Recipe, dict[tuple[str, int], Tensor]] = WeakKeyDictionary()

_Differs = Callable[[Tensor], Tensor]


def nonzero(tensor: Tensor, dim: int, among: Tensor | None = None) -> Tensor:
    """For each position along ``dim``, whether anything there is not zero.

    Args:
        tensor: with two dimensions or more, of numbers or truth values, deferred or not
        among: of rows (``dim`` 0) the columns, of all else the rows, that count (bool); all of them when None
    """

    def told(block: Tensor) -> Tensor:
        return _told(block, dim, counted, lambda tile: tile != 0)

    counted = None if among is None or bool(among.all()) else among
    if counted is not None:
        return _by_blocks(tensor, dim, told)
    return _kept(tensor, "nonzero", dim, lambda: _by_blocks(tensor, dim, told))


def uniform(tensor: Tensor, dim: int) -> Tensor:
    """For each position along ``dim`` the one finite number that is found there, in fp64; NaN where there are several,
    or none."""
    if tensor.dim() == 1:
        held = value(tensor.detach()).double().cpu()
        return torch.where(held.isfinite(), held, torch.nan)
    return _kept(tensor, "uniform", dim, lambda: _by_blocks(tensor, dim, lambda block: _uniform(block, dim)))


def _uniform(tensor: Tensor, dim: int) -> Tensor:
    if not tensor.numel():
        return torch.full(tensor.shape[dim : dim + 1], torch.nan, dtype=torch.float64)
    first = _by_position(Tiles(recipe_of(tensor)).part(Part(_other(dim), 0, 1)), dim)[:, :1].clone()
    shape = [-1 if place == dim else 1 for place in range(tensor.dim())]
    varies = _told(tensor, dim, None, lambda tile: tile != first.reshape(shape))
    held = first[:, 0].double().cpu()
    return torch.where(~varies & held.isfinite(), held, torch.nan)


def squares(tensor: Tensor) -> list[Tensor]:
    """For each dimension of two or more, the sum of squares at each position along it, in fp64; a tensor without values
    is one of ones. Read a tile at a time."""
    if tensor.is_meta:
        return [torch.full((size,), tensor.numel() / max(1, size), dtype=torch.float64) for size in tensor.shape]
    sums = [torch.zeros(size, dtype=torch.float64) for size in tensor.shape]
    place = 0
    for tile in passing_tiles(tensor.detach()):
        found = tile.double().square()
        for dim, total in enumerate(sums):
            part = total.narrow(0, place, len(tile)) if dim == 0 else total
            part += _by_position(found, dim).sum(1).cpu()
        place += len(tile)
    return sums


def _kept(tensor: Tensor, what: str, dim: int, tell: Callable[[], Tensor]) -> Tensor:
    if not isinstance(tensor, Deferred):
        return tell()
    known = _KNOWN.setdefault(tensor.recipe, {})
    if (what, dim) not in known:
        known[what, dim] = tell()
    return known[what, dim]


def _by_blocks(tensor: Tensor, dim: int, tell: Callable[[Tensor], Tensor]) -> Tensor:
    """The results for each position along ``dim``; of the rows of a tensor that may be mapped, a range at a time."""
    held = tensor.recipe.there if isinstance(tensor, Deferred) else None
    if dim or held is None:
        return tell(tensor)
    return torch.cat([tell(deferred(rows)) for rows in passing_rows(held)])


def _other(dim: int) -> int:
    return 1 if dim == 0 else 0


def _by_position(tile: Tensor, dim: int) -> Tensor:
    return tile.movedim(dim, 0).flatten(1)


def _told(tensor: Tensor, dim: int, among: Tensor | None, differs: _Differs) -> Tensor:
    """For each position along ``dim``, whether ``differs`` holds of any number there; what is zero does not differ."""
    found = torch.zeros(tensor.shape[dim], dtype=torch.bool)
    open_ = torch.ones_like(found)
    held = 0
    for number, tile in enumerate(_ranges(tensor, _other(dim), among)):
        if number and not bool((open_ & ~found).any()):
            break
        if number == 1 and isinstance(tensor, Deferred) and dim < 2:
            open_ &= ~zeros_of(tensor)[dim]
            if not bool((open_ & ~found).any()):
                break
        found |= _by_position(differs(tile()), dim).any(1).cpu()
        held += TILE
        if isinstance(tensor, Deferred) and held > _HELD:
            forget(tensor)
            held = 0
    if isinstance(tensor, Deferred):
        forget(tensor)
    return found


def _ranges(tensor: Tensor, dim: int, among: Tensor | None) -> Iterator[Callable[[], Tensor]]:
    """The positions ``among`` those along ``dim``, a few at first and then as many as a tile holds; each computed when
    it is called."""
    size = tensor.shape[dim]
    wanted = np.arange(size) if among is None else np.flatnonzero(among.cpu().numpy())
    most = max(1, TILE // max(1, tensor.numel() // max(1, size)))
    parts, place, step = Tiles(recipe_of(tensor)), 0, min(_FIRST, most)
    while place < len(wanted):
        start = int(wanted[place])
        part = Part(dim, start, min(step, size - start))
        end = int(np.searchsorted(wanted, start + part.size))
        yield partial(_chosen, parts, part, torch.from_numpy(wanted[place:end] - start))
        place, step = end, most


def _chosen(parts: Tiles, part: Part, inside: Tensor) -> Tensor:
    held = parts.part(part)
    return held if len(inside) == part.size else held.index_select(part.dim, inside.to(held.device))
