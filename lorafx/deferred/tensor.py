"""A tensor that is not computed yet: every operator on it is recorded instead of run.

A checkpoint larger than memory can be folded by the same code that folds a small one: weights enter as deferred
tensors over memory-mapped files, passes compute with them, and the results know how to compute themselves, a tile at a
time, when they are written. Where a value is needed at once (is it zero? which number is it?) it is computed at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import LorafxError
from ..files.pages import release
from .recipe import Recipe, is_recipe, there
from .tiles import tiles_of, value_of

aten = torch.ops.aten

#: How many bytes of tiles are read before memory is released.
_HELD = 1 << 27

#: Operators that look at values and give no tensor whose shape is known without them.
_LOOKS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Deferred(Tensor):
    """A tensor over a :class:`Recipe`. Operators on it give deferred tensors; none of them may write to it."""

    recipe: Recipe

    @staticmethod
    def __new__(cls, recipe: Recipe) -> Deferred:
        result = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, recipe.shape, strides=recipe.stride, dtype=recipe.dtype, device=recipe.device
        )
        result.recipe = recipe
        return result

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        made = "there" if self.recipe.there is not None else str(self.recipe.op)
        return f"Deferred({tuple(self.shape)}, {self.dtype}, {made})"

    def __deepcopy__(self, memo: Any) -> Deferred:
        return Deferred(self.recipe)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            raise LorafxError(f"{func} would write to a weight that is computed later; please report this model")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise LorafxError(f"{func} is random, and a weight that is computed later is not; please report this model")
        if func in (aten.detach.default, aten.alias.default):
            return Deferred(args[0].recipe)
        if any(tag in func.tags for tag in _LOOKS) or func is aten.equal.default:
            given, named = pytree.tree_map_only(Deferred, value, (args, kwargs or {}))
            return func(*given, **named)
        return _noted(func, args, kwargs or {})


def _noted(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The results of an operator, as deferred tensors."""
    given, named = pytree.tree_map_only(Tensor, recipe_of, (args, kwargs))
    one = next(leaf for leaf in pytree.tree_leaves((given, named), is_leaf=is_recipe) if isinstance(leaf, Recipe))
    asked = kwargs.get("device")
    device = torch.device(asked) if asked is not None else one.device
    shapes, named_shapes = pytree.tree_map_only(Recipe, _shape, (given, named), is_leaf=is_recipe)
    if asked is not None:
        named_shapes["device"] = torch.device("meta")
    result = func(*shapes, **named_shapes)

    def made(found: Tensor, place: int | None = None) -> Deferred:
        size, stride = found.shape, found.stride()
        return Deferred(Recipe(size, stride, found.dtype, device, None, func, given, named, place))

    if isinstance(result, Tensor):
        return made(result)
    return type(result)(made(found, place) for place, found in enumerate(result))


def _shape(recipe: Recipe) -> Tensor:
    return torch.empty_strided(recipe.shape, recipe.stride, dtype=recipe.dtype, device="meta")


def recipe_of(tensor: Tensor) -> Recipe:
    """How a tensor is made; one that is not deferred is its own recipe."""
    return tensor.recipe if isinstance(tensor, Deferred) else there(tensor)


def deferred(tensor: Tensor) -> Deferred:
    """A tensor in memory (a memory-mapped weight, above all) as one on which operators are recorded."""
    return tensor if isinstance(tensor, Deferred) else Deferred(recipe_of(tensor))


def is_deferred(tensor: Tensor) -> bool:
    """Whether operators on the tensor are recorded."""
    return isinstance(tensor, Deferred)


def value(tensor: Tensor) -> Tensor:
    """The values of a tensor, deferred or not."""
    return value_of(recipe_of(tensor))


def tiles(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor with at least one dimension, in ranges of its first: together all of it, none larger than a tile
    unless one position is."""
    yield from tiles_of(recipe_of(tensor))


def passing_tiles(tensor: Tensor) -> Iterator[Tensor]:
    """:func:`tiles` of a tensor that is gone through once: the memory of what was read for them is given back now and
    then, and at the end. It does not grow with the tensor."""
    held = 0
    for tile in tiles(tensor):
        yield tile
        held += tile.numel() * tile.element_size()
        if held > _HELD:
            forget(tensor)
            held = 0
    forget(tensor)


def passing_rows(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor that is there, in ranges of its rows that are gone through once: the memory of each is given back after
    it. A few numbers of every row take as much as all of them, for memory comes in pages."""
    size = math.prod(tensor.shape[1:]) * tensor.element_size()
    for rows in tensor.split(max(1, _HELD // max(1, size))):
        yield rows
        forget(rows)


def forget(tensor: Tensor) -> None:
    """Release the memory of mapped files that the tensor was computed from; it is read again when needed."""
    stack, seen = [recipe_of(tensor)], set()
    while stack:
        recipe = stack.pop()
        if recipe in seen:
            continue
        seen.add(recipe)
        stack.extend(recipe.operands())
        held = recipe.there
        if held is not None and held.device.type == "cpu" and held.is_contiguous():
            release(held.data_ptr(), held.numel() * held.element_size())


def chosen_from(tensor: Tensor, shape: torch.Size) -> dict[int, Tensor] | None:
    """Which positions of a tensor of ``shape`` are left, along each dimension that lost some, in one that was made of
    it by choosing positions; None for any other."""
    found = _chosen(tensor, lambda recipe: recipe.shape == shape)
    return found[1] if found is not None else None


def chosen_or_computed(made: dict[Recipe, Tensor], tensor: Tensor) -> Tensor:
    """The values of a tensor: positions of one that is ``made``, if it was made by choosing them; else they are
    computed, and added to those made."""
    found = _chosen(tensor, made.__contains__)
    if found is None:
        return made.setdefault(recipe_of(tensor), value(tensor))
    recipe, kept = found
    held = made[recipe]
    for dim, index in kept.items():
        held = held.index_select(dim, index)
    return held


def _chosen(tensor: Tensor, wanted: Callable[[Recipe], bool]) -> tuple[Recipe, dict[int, Tensor]] | None:
    """The ``wanted`` recipe that a tensor was made of by choosing positions, and those left along each dimension that
    lost some; None when it was made in another way."""
    recipe, kept = recipe_of(tensor), dict[int, Tensor]()
    while not wanted(recipe):
        if recipe.op is not aten.index_select.default:
            if recipe.op not in (aten.detach.default, aten.alias.default, aten.clone.default):
                return None
        else:
            dim, index = recipe.args[1] % len(recipe.shape), recipe.operands()[1].there
            if index is None:
                return None
            kept[dim] = index[kept[dim]] if dim in kept else index
        recipe = recipe.operands()[0]
    return recipe, kept
