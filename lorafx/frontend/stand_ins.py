"""Replacements for what a tracer cannot follow in a model's code: sparse tensors laid out densely, and a
parameter's data as a view of the parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _laid_out(indices: Tensor, values: Tensor, size: Sequence[int] | None = None, **options: Any) -> Tensor:
    """The dense tensor of a sparse one; numbers in the same place are summed, as in sparse tensors."""
    if size is None:  # read from the indices' values, which a trace does not have; capture refuses the model with this
        raise NotImplementedError("a sparse tensor whose size depends on its indices")
    wide = torch.zeros([*size], dtype=options.get("dtype") or values.dtype, device=values.device)
    return wide.index_put(tuple(indices.unbind(0)), values.to(wide.dtype), accumulate=True)


def _as_it_is(value: Tensor, *_: Any, **__: Any) -> Tensor:
    return value


def _count(value: Tensor) -> int:
    """The most of a dense tensor's numbers that are stored where it is sparse."""
    return value.numel()


def _product(a: Tensor, b: Tensor, *_: Any) -> Tensor:
    return a @ b


class StandIns(TorchFunctionMode):
    """While it is entered, code that builds sparse tensors computes with dense ones, and ``.data`` is a detached view:
    the same values, and no gradient flows through either's parameter more than before."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        stand_in = _STAND_INS.get(func)
        sparse = any(isinstance(value, Tensor) and value.layout != torch.strided for value in args)
        if stand_in is None or sparse:  # the layout of a sparse tensor that was there before is not changed
            return func(*args, **given)
        return stand_in(*args, **given)


_data: Any = Tensor.data
_STAND_INS: dict[Any, Callable[..., Any]] = {
    torch.sparse_coo_tensor: _laid_out,
    torch.sparse.mm: _product,
    torch.sparse.addmm: lambda bias, a, b, **scales: torch.addmm(bias, a, b, **scales),
    Tensor.coalesce: _as_it_is,
    Tensor.to_dense: _as_it_is,
    Tensor._nnz: _count,
    _data.__get__: Tensor.detach,
}
