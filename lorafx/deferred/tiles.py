"""Computing deferred tensors a tile at a time: which part of each operand a part of the result needs.

A part is a range along one dimension. Operators that work element by element need the same part of their operands, a
matrix product the rows of one and all of the other, a transposed matrix the other dimension. For any other operator
everything is computed, once: slower, but right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LorafxError
from ..graph.constants import computed
from .recipe import Recipe

aten = torch.ops.aten

#: Elements of a tile: 4 MB in fp64, which stays in the processor's cache. Half and twice this size take longer.
TILE = 1 << 19


class Part(NamedTuple):
    """``size`` positions from ``start`` on along ``dim``."""

    dim: int
    start: int
    size: int


class Wanted(NamedTuple):
    """A recipe's value, or a part of it."""

    recipe: Recipe
    part: Part | None


def value_of(recipe: Recipe) -> Tensor:
    """All of a tensor."""
    if recipe.there is not None:
        return recipe.there
    if not recipe.shape:
        return Tiles(recipe).part(None)
    result = torch.empty(recipe.shape, dtype=recipe.dtype, device=recipe.device)
    place = 0
    for tile in tiles_of(recipe):
        result[place : place + len(tile)] = tile
        place += len(tile)
    return result


def tiles_of(recipe: Recipe) -> Iterator[Tensor]:
    """A tensor with at least one dimension, in ranges of its first: together all of it, none larger than a tile
    unless one position is."""
    rows = recipe.shape[0]
    step = max(1, TILE // max(1, math.prod(recipe.shape[1:])))
    parts, index, start = Tiles(recipe), _rows_of(recipe), 0
    while start < rows:
        size = min(step, rows - start)
        if index is not None:  # for rows that lie far apart, everything between them would be computed too
            far = (index[start : start + size] - index[start]).abs() >= 2 * step
            size = int(far.int().argmax()) if bool(far.any()) else size
        yield parts.part(Part(0, start, size))
        start += size


def _rows_of(recipe: Recipe) -> Tensor | None:
    """Which rows of another tensor these are, if they were chosen; looked for behind what leaves each in its place."""
    while recipe.there is None:
        chosen = recipe.op is aten.index_select.default
        if chosen and recipe.args[1] % len(recipe.shape) == 0:
            return recipe.operands()[1].there
        if not chosen and recipe.op not in _IN_PLACE:
            return None
        recipe = recipe.operands()[0]
    return None


class Tiles:
    """The parts of one deferred tensor. What every part needs in full is computed once and kept."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self._whole: dict[Recipe, Any] = {}

    def part(self, part: Part | None) -> Tensor:
        """One part, or all of it."""
        known: dict[Wanted, list[Wanted]] = {}  # values kept on the way must not change the plan

        def needs(wanted: Wanted) -> list[Wanted]:
            if wanted not in known:
                known[wanted] = self._needs(wanted)
            return known[wanted]

        found = computed(Wanted(self.recipe, part), needs, self._compute)
        size = list(self.recipe.shape)
        if part is not None:
            size[part.dim] = part.size
        if list(found.shape) != size or found.dtype != self.recipe.dtype:
            raise LorafxError(f"{self.recipe.op} gives other parts than it was taken to; please report this model")
        return found

    def _needs(self, wanted: Wanted) -> list[Wanted]:
        recipe, part = wanted
        if recipe.there is not None or recipe in self._whole:
            return []
        way = _way(recipe, part) if part is not None else None
        if way is not None:
            return list(dict.fromkeys(Wanted(one, at) for one, at in zip(recipe.operands(), way, strict=True)))
        if part is not None:
            return [Wanted(recipe, None)]
        return list(dict.fromkeys(Wanted(one, None) for one in recipe.operands()))

    def _compute(self, wanted: Wanted, values: Mapping[Wanted, Any]) -> Any:
        recipe, part = wanted
        whole = recipe.there if recipe.there is not None else self._whole.get(recipe)
        way = _way(recipe, part) if part is not None and whole is None else None
        if way is not None:
            assert part is not None
            parts = iter([values[Wanted(one, at)] for one, at in zip(recipe.operands(), way, strict=True)])
            args, kwargs = recipe.filled(lambda _: next(parts))
            return _PARTLY.get(recipe.op, _called)(recipe, part, args, kwargs)
        if whole is None and part is not None:
            whole = values[Wanted(recipe, None)]
        if whole is None:
            args, kwargs = recipe.filled(lambda one: values[Wanted(one, None)])
            whole = recipe.op(*args, **kwargs)
            whole = whole if recipe.place is None else whole[recipe.place]
            if recipe is not self.recipe:
                self._whole[recipe] = whole
        return whole if part is None else whole.narrow(*part)


# ---- which part of each operand; None where all is needed, and no answer where the operator is not known

_Way = list[Part | None]


def _way(recipe: Recipe, part: Part) -> _Way | None:
    if recipe.place is not None:
        return None
    if recipe.op in _WAYS:
        return _WAYS[recipe.op](recipe, part)
    if torch.Tag.pointwise in recipe.op.tags or recipe.op in _UNARY:
        return [_broadcast(recipe, one, part) for one in recipe.operands()]
    return None


def _broadcast(recipe: Recipe, operand: Recipe, part: Part) -> Part | None:
    dim = part.dim - (len(recipe.shape) - len(operand.shape))
    return None if dim < 0 or operand.shape[dim] == 1 else Part(dim, part.start, part.size)


def _product(recipe: Recipe, part: Part) -> _Way:
    """Of a matrix and a matrix or vector."""
    return [part, None] if part.dim == 0 else [None, part]


def _products(recipe: Recipe, part: Part) -> _Way:
    """Of one matrix and another, each of a stack."""
    return [[part, part], [part, None], [None, part]][part.dim]


def _transposed(recipe: Recipe, part: Part) -> _Way:
    first, second = (0, 1) if recipe.op is aten.t.default else (d % len(recipe.shape) for d in recipe.args[1:3])
    return [part._replace(dim={first: second, second: first}.get(part.dim, part.dim))]


def _permuted(recipe: Recipe, part: Part) -> _Way:
    return [part._replace(dim=recipe.args[1][part.dim] % len(recipe.shape))]


def _unsqueezed(recipe: Recipe, part: Part) -> _Way | None:
    place = recipe.args[1] % len(recipe.shape)
    return None if part.dim == place else [part._replace(dim=part.dim - (part.dim > place))]


def _viewed(recipe: Recipe, part: Part) -> _Way | None:
    """A view that leaves the first dimension alone, or all of them."""
    (old,) = recipe.operands()
    same = recipe.shape if old.shape == recipe.shape else recipe.shape[:1]
    return [part] if part.dim < len(same) and old.shape[: len(same)] == same else None


def _sliced(recipe: Recipe, part: Part) -> _Way | None:
    given: tuple[Any, ...] = (*recipe.args, *(None, 0, 0, None, 1)[len(recipe.args) :])
    _, dim, start, _, step = given
    (old,) = recipe.operands()
    dim, start = dim % len(recipe.shape), start or 0
    if part.dim != dim:
        return [part]
    start = start if start >= 0 else max(0, start + old.shape[dim])
    return [part._replace(start=start + part.start)] if step == 1 else None


def _selected(recipe: Recipe, part: Part) -> _Way:
    """Chosen positions: of the chosen dimension, what lies between the first and the last of this part."""
    _, index = recipe.operands()
    dim = recipe.args[1] % len(recipe.shape)
    if part.dim != dim:
        return [part, None]
    if index.there is None:
        return [None, part._replace(dim=0)]
    chosen = index.there[part.start : part.start + part.size]
    low, high = int(chosen.min()), int(chosen.max())
    return [Part(dim, low, high - low + 1), part._replace(dim=0)]


def _joined(recipe: Recipe, part: Part) -> _Way | None:
    """Tensors joined along another dimension than the part's."""
    dim = recipe.args[1] if len(recipe.args) > 1 else 0
    return None if part.dim == dim % len(recipe.shape) else [part for _ in recipe.operands()]


_IN_PLACE = (aten._to_copy.default, aten.clone.default, aten.detach.default, aten.alias.default)
_UNARY = (*_IN_PLACE, aten.expand.default)
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_WAYS: dict[Any, Callable[[Recipe, Part], _Way | None]] = {
    aten.mm.default: _product,
    aten.mv.default: _product,
    aten.bmm.default: _products,
    aten.t.default: _transposed,
    aten.transpose.int: _transposed,
    aten.permute.default: _permuted,
    aten.unsqueeze.default: _unsqueezed,
    **dict.fromkeys(_VIEWS, _viewed),
    aten.slice.Tensor: _sliced,
    aten.index_select.default: _selected,
    aten.cat.default: _joined,
}


# ---- computing a part from those of the operands


def _called(recipe: Recipe, part: Part, args: Any, kwargs: Any) -> Tensor:
    return recipe.op(*args, **kwargs)


def _resized(recipe: Recipe, part: Part, args: Any, kwargs: Any) -> Tensor:
    """An operator that is told the size of its result: here that of the part."""
    size = list(recipe.shape)
    size[part.dim] = part.size
    # A part of the operand may lie in memory otherwise than all of it.
    return args[0].reshape(size) if recipe.op in _VIEWS else args[0].expand(size)


def _cut(recipe: Recipe, part: Part, args: Any, kwargs: Any) -> Tensor:
    dim = recipe.args[1] % len(recipe.shape) if len(recipe.args) > 1 else 0
    return args[0] if part.dim == dim else recipe.op(*args, **kwargs)


def _chosen(recipe: Recipe, part: Part, args: Any, kwargs: Any) -> Tensor:
    value, dim, index = args
    _, chosen = recipe.operands()
    if part.dim == dim % len(recipe.shape) and chosen.there is not None:
        index = index - int(index.min())
    return recipe.op(value, dim, index)


_PARTLY: dict[Any, Callable[[Recipe, Part, Any, Any], Tensor]] = {
    **dict.fromkeys((*_VIEWS, aten.expand.default), _resized),
    aten.slice.Tensor: _cut,
    aten.index_select.default: _chosen,
}
