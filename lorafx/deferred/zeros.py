"""Which rows and columns of a matrix are certainly zero, derived from how it is made, without computing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..graph.constants import computed
from .kept import keep_bits
from .recipe import Recipe
from .tensor import passing_rows, passing_tiles, recipe_of

aten = torch.ops.aten


class Zeros(NamedTuple):
    """For each row (first dimension) and each column (second), whether all of it is zero."""

    rows: Tensor
    columns: Tensor


def zeros_of(tensor: Tensor, known: dict[Recipe, Zeros] | None = None) -> Zeros:
    """The rows and columns of a tensor of two dimensions or more that must be zero.

    Tensors in memory are read, a tile at a time, and only once with ``known``. Zeros by cancellation, or by operators
    without a rule here, are not found: nothing is reported zero that might not be.
    """
    found = known if known is not None else {}

    def visit(recipe: Recipe, values: Mapping[Recipe, Zeros]) -> Zeros:
        if recipe not in found:
            found[recipe] = _zeros(recipe, values)
        return found[recipe]

    return computed(recipe_of(tensor), _operands, visit)


def _operands(recipe: Recipe) -> list[Recipe]:
    return recipe.operands() if recipe.op in _RULES else []


def _zeros(recipe: Recipe, values: Mapping[Recipe, Zeros]) -> Zeros:
    if recipe.there is not None:
        return _read(recipe)
    rule = _RULES.get(recipe.op)
    found = rule(recipe, [values[one] for one in recipe.operands()]) if rule is not None else None
    rows, columns = _sizes(recipe)
    return found or Zeros(torch.zeros(rows, dtype=torch.bool), torch.zeros(columns, dtype=torch.bool))


def _sizes(recipe: Recipe) -> tuple[int, int]:
    """Rows and columns; a vector is one row, as broadcasting has it."""
    padded = (1, 1, *recipe.shape)
    return (padded[-2], padded[-1]) if len(recipe.shape) <= 2 else (recipe.shape[0], recipe.shape[1])


def _read(recipe: Recipe) -> Zeros:
    rows, count = _sizes(recipe)
    assert recipe.there is not None
    matrix = recipe.there if len(recipe.shape) > 2 else recipe.there.reshape(rows, count)
    if matrix.numel() and not _may_be_zero(matrix, 0) and not _may_be_zero(matrix, 1):
        return Zeros(torch.zeros(rows, dtype=torch.bool), torch.zeros(count, dtype=torch.bool))
    zero_rows, columns = [], torch.ones(count, dtype=torch.bool)
    for tile in passing_tiles(matrix):
        zero = tile == 0
        zero_rows.append(zero.flatten(1).all(1).cpu())
        columns &= zero.movedim(1, 0).flatten(1).all(1).cpu()
    return Zeros(torch.cat(zero_rows) if zero_rows else torch.zeros(0, dtype=torch.bool), columns)


def _may_be_zero(matrix: Tensor, dim: int) -> bool:
    """Whether any row (dimension 0) or column (1) is zero where it is looked at first."""
    looked_at = passing_rows(matrix[:1] if dim else matrix)
    return any(bool(_by_position(rows.select(1 - dim, 0) == 0).all(1).any()) for rows in looked_at)


def _by_position(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)


def _same(recipe: Recipe, operands: list[Zeros]) -> Zeros | None:
    return operands[0]


def _viewed(recipe: Recipe, operands: list[Zeros]) -> Zeros | None:
    return operands[0] if recipe.operands()[0].shape == recipe.shape else None


def _swapped(recipe: Recipe, operands: list[Zeros]) -> Zeros | None:
    dims = sorted(dim % len(recipe.shape) for dim in recipe.args[1:3]) or [0, 1]
    return Zeros(operands[0].columns, operands[0].rows) if dims == [0, 1] else None


def _factors(recipe: Recipe, operands: list[Zeros]) -> Zeros | None:
    """A product is zero where a factor is."""
    if len(recipe.shape) != 2:
        return None
    rows, columns = (torch.zeros(size, dtype=torch.bool) for size in recipe.shape)
    for one in operands:
        rows, columns = rows | one.rows, columns | one.columns
    return Zeros(rows, columns)


def _together(recipe: Recipe, operands: list[Zeros]) -> Zeros | None:
    """A sum, or a choice, is zero where both sides are."""
    *_, first, second = operands
    if any(one.shape != recipe.shape for one in recipe.operands()[-2:]):
        return None
    return Zeros(first.rows & second.rows, first.columns & second.columns)


def _product(recipe: Recipe, operands: list[Zeros]) -> Zeros | None:
    left, right = operands
    return Zeros(left.rows, right.columns)


def _selected(recipe: Recipe, operands: list[Zeros]) -> Zeros | None:
    """Chosen positions: what is zero in all of the other dimension is zero in a part of it."""
    place, index = recipe.args[1] % len(recipe.shape), recipe.operands()[1].there
    if index is None or place > 1:
        return operands[0] if place > 1 else None
    chosen = operands[0][place][index.cpu()]
    return operands[0]._replace(**{Zeros._fields[place]: chosen})


_SAME = (aten._to_copy.default, aten.clone.default, aten.detach.default, aten.alias.default, aten.neg.default)
_RULES: dict[Any, Any] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys((aten.t.default, aten.transpose.int), _swapped),
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default), _viewed),
    aten.mul.Tensor: _factors,
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _together),
    aten.where.self: _together,
    keep_bits: _same,
    aten.mm.default: _product,
    aten.index_select.default: _selected,
}
