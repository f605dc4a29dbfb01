"""A tensor that is not there yet: every operator on it is written down instead of run.

A checkpoint larger than memory can be folded by the same code that folds a small one: weights enter as deferred
tensors over memory-mapped files, passes compute with them, and what comes out knows how to compute itself, a tile at a
time, when it is written. What a program asks of a value at once (is it zero? which number is it?) is computed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import LorafxError

aten = torch.ops.aten

#: Operators that look at values and give no tensor whose shape is known without them.
_LOOKS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a tensor is made: by ``op`` from ``args`` and ``kwargs``, in which recipes stand for tensors; or it is there.

    Attributes:
        shape, stride, dtype, device: the tensor's
        there: the tensor itself, if nothing has to be computed
        place: which of the operator's results it is, if there are several
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    there: Tensor | None = None
    op: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    place: int | None = None

    def operands(self) -> list[Recipe]:
        """The recipes it is made of, in order."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs or {})), is_leaf=_is_recipe)
        return [leaf for leaf in leaves if isinstance(leaf, Recipe)]

    def filled(self, value: Callable[[Recipe], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The operator's arguments, with ``value`` of the recipes among them."""

        def fill(leaf: Any) -> Any:
            return value(leaf) if isinstance(leaf, Recipe) else leaf

        return pytree.tree_map(fill, (self.args, dict(self.kwargs or {})), is_leaf=_is_recipe)


def _is_recipe(value: Any) -> bool:
    return isinstance(value, Recipe)


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
            from .tiles import value

            given, named = pytree.tree_map_only(Deferred, value, (args, kwargs or {}))
            return func(*given, **named)
        return _noted(func, args, kwargs or {})


def _noted(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The results of an operator, as deferred tensors."""
    given, named = pytree.tree_map_only(Tensor, recipe_of, (args, kwargs))
    one = next(leaf for leaf in pytree.tree_leaves((given, named), is_leaf=_is_recipe) if isinstance(leaf, Recipe))
    asked = kwargs.get("device")
    device = torch.device(asked) if asked is not None else one.device
    shapes, named_shapes = pytree.tree_map_only(Recipe, _shape, (given, named), is_leaf=_is_recipe)
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
    """How a tensor is made; one that is not deferred is there."""
    if isinstance(tensor, Deferred):
        return tensor.recipe
    plain = tensor.detach()
    return Recipe(plain.shape, plain.stride(), plain.dtype, plain.device, plain)


def deferred(tensor: Tensor) -> Deferred:
    """A tensor that is there, as one that operators note down: memory-mapped weights, above all."""
    return tensor if isinstance(tensor, Deferred) else Deferred(recipe_of(tensor))


def is_deferred(tensor: Tensor) -> bool:
    """Whether what is done with the tensor is noted down."""
    return isinstance(tensor, Deferred)
