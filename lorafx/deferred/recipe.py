"""How a tensor is made: a record of the operators and tensors it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a tensor is made: by ``op`` from ``args`` and ``kwargs``, in which recipes stand for tensors; or it is in
    memory.

    Attributes:
        shape, stride, dtype, device: the tensor's
        there: the tensor itself, if nothing has to be computed
        op, args, kwargs: the operator that makes it, and what of
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
        return self._operands

    @cached_property
    def _operands(self) -> list[Recipe]:
        # Needed for every part of every tensor, and slow to compute.
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs or {})), is_leaf=is_recipe)
        return [leaf for leaf in leaves if isinstance(leaf, Recipe)]

    def filled(self, value: Callable[[Recipe], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The operator's arguments, with ``value`` of the recipes among them."""

        def fill(leaf: Any) -> Any:
            return value(leaf) if isinstance(leaf, Recipe) else leaf

        return pytree.tree_map(fill, (self.args, dict(self.kwargs or {})), is_leaf=is_recipe)


def is_recipe(value: Any) -> bool:
    """Whether a value among an operator's arguments stands for a tensor."""
    return isinstance(value, Recipe)


def there(tensor: Tensor) -> Recipe:
    """The recipe of a tensor that has its values."""
    plain = tensor.detach()
    return Recipe(plain.shape, plain.stride(), plain.dtype, plain.device, plain)
