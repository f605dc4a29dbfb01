"""The results of frequent operators on fake tensors, from the sizes of their operands alone. torch runs their
decompositions, a dozen operators each, over symbolic sizes: eight milliseconds for a linear, less than one here. The
values are the same: any case not covered here is left to torch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

aten: Any = torch.ops.aten
_log = logging.getLogger(__name__)

#: A result, or several, as sizes and dtypes; None where the case is not covered.
Told = list[tuple[Sequence[Any], torch.dtype]] | None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Told:
    known = _matrix(weight) and _is_size(x.shape[-1:], weight.shape[1]) and x.dtype == weight.dtype
    if x.dim() < 2 or not known or not _fits(bias, weight.shape[0], x.dtype):
        return None
    return [((*x.shape[:-1], weight.shape[0]), x.dtype)]


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Told:
    known = _matrix(b) and a.dim() == 2 and _is_size(a.shape[1:], b.shape[0]) and a.dtype == b.dtype
    if not known or (beta, alpha) != (1, 1) or not _fits(bias, b.shape[1], a.dtype):
        return None
    return [((a.shape[0], b.shape[1]), a.dtype)]


def _layer_norm(x: Tensor, shape: Sequence[Any], weight: Any = None, bias: Any = None, *_: Any, **__: Any) -> Told:
    told = _native_layer_norm(x, shape, weight, bias)
    return told and told[:1]


def _native_layer_norm(x: Tensor, shape: Sequence[Any], weight: Any = None, bias: Any = None, *_: Any) -> Told:
    """In half precision the statistics have another dtype, which depends on the device."""
    if len(shape) != 1 or not isinstance(shape[0], int) or not _is_size(x.shape[-1:], shape[0]):
        return None
    if x.dtype not in (torch.float32, torch.float64) or x.device.type != "cpu" or not in_rows(x):
        return None
    if not all(_fits(value, shape[0], x.dtype) for value in (weight, bias)):
        return None
    statistics = (*x.shape[:-1], 1), x.dtype
    return [(x.shape, x.dtype), statistics, statistics]


def _dropout(x: Tensor, p: float, train: bool | None = True) -> Told:
    """Else the operator gives its own input."""
    if not train or not 0.0 < p < 1.0 or not _floating(x):
        return None
    return [(x.shape, x.dtype), (x.shape, torch.bool)]


def _softmax(x: Tensor, dim: int, other: Any = None) -> Told:
    """``other``: a dtype, or whether there is to be another."""
    return [(x.shape, x.dtype)] if other in (None, False, x.dtype) and x.dim() and _floating(x) else None


def _alike(x: Tensor, *numbers: Any, **_: Any) -> Told:
    """Of one tensor, and of plain numbers, which leave a floating dtype as it is."""
    plain = all(isinstance(number, (int, float)) for number in numbers)
    return [(x.shape, x.dtype)] if plain and _floating(x) else None


def _clone(x: Tensor, *, memory_format: Any = None) -> Told:
    rows = memory_format is torch.contiguous_format or (memory_format is None and in_rows(x))
    return [(x.shape, x.dtype)] if rows else None


def _mean(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: Any = None) -> Told:
    """The one of norms: of the last dimension, which stays as one of size 1."""
    last = dims is not None and [*dims] in ([-1], [x.dim() - 1]) and keepdim and dtype is None
    return [((*x.shape[:-1], 1), x.dtype)] if last and _floating(x) else None


def _unsafe_view(x: Tensor, size: Sequence[Any]) -> Told:
    """Of a product, whose rows get the dimensions back that they had."""
    given = not any(isinstance(part, int) and part < 0 for part in size)
    return [(tuple(size), x.dtype)] if given and in_rows(x) and _product(size) == _product(x.shape) else None


_RULES: dict[Any, Callable[..., Told]] = {
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.layer_norm.default: _layer_norm,
    aten.native_layer_norm.default: _native_layer_norm,
    aten.native_dropout.default: _dropout,
    aten._softmax.default: _softmax,
    aten._safe_softmax.default: _softmax,
    aten.clone.default: _clone,
    aten.mean.dim: _mean,
    aten._unsafe_view.default: _unsafe_view,
    **dict.fromkeys((aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.silu.default), _alike),
    **dict.fromkeys((aten.tanh.default, aten.cos.default, aten.sin.default, aten.neg.default), _alike),
    **dict.fromkeys((aten.rsqrt.default, aten.pow.Tensor_Scalar, aten.mul.Scalar, aten.add.Scalar), _alike),
}


def _matrix(weight: Tensor) -> bool:
    return weight.dim() == 2 and all(isinstance(size, int) for size in weight.shape)


def _is_size(found: Sequence[Any], size: int) -> bool:
    """Whether it is known to be this one; a symbol may turn out to be, which torch notes as a condition."""
    return len(found) == 1 and isinstance(found[0], int) and found[0] == size


def _fits(value: Tensor | None, size: int, dtype: torch.dtype) -> bool:
    return value is None or (value.dim() == 1 and _is_size(value.shape, size) and value.dtype == dtype)


def _product(size: Sequence[Any]) -> Any:
    """How many numbers that is, as torch writes it: two that are written alike are equal under no condition."""
    return math.prod(part.node.expr if isinstance(part, torch.SymInt) else sympy.Integer(part) for part in size)


def _floating(x: Tensor) -> bool:
    return x.is_floating_point() and in_rows(x)


def in_rows(x: Tensor) -> bool:
    """Whether it is known to be laid out in rows, so that what is made from it is, too."""
    from torch._prims_common import is_contiguous_for_memory_format_or_false

    return is_contiguous_for_memory_format_or_false(x, memory_format=torch.contiguous_format)


def told(mode: FakeTensorMode, operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What ``operator`` gives for fake tensors of ``mode``, a tensor or several; None where the case is not covered
    here."""
    rule = _RULES.get(operator)
    held = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if rule is None or not all(plain(value, mode) for value in held) or len({value.device for value in held}) != 1:
        return None
    found = rule(*args, **kwargs)
    if found is None:
        return None
    device = held[0].device
    made = [FakeTensor(mode, torch.empty(size, dtype=dtype, device="meta"), device) for size, dtype in found]
    return made[0] if len(operator._schema.returns) == 1 else tuple(made)


def plain(value: Tensor, mode: FakeTensorMode) -> bool:
    """Whether it is a fake tensor of ``mode`` and nothing else: no constant, its numbers in memory as they are."""
    fake = isinstance(value, FakeTensor) and value.fake_mode is mode and value.constant is None
    return fake and value.layout is torch.strided and not (value.is_quantized or value.is_conj() or value.is_neg())


@contextmanager
def told_at_once() -> Iterator[None]:
    """Within it traces ask :func:`told` first, where torch asks for its own fast rules. That place is not part of
    torch's public interface: with versions that have them elsewhere, traces are as slow as torch's."""
    try:
        from torch._prims_common import is_contiguous_for_memory_format_or_false  # noqa: F401
        from torch._subclasses.fake_impls import get_fast_op_impls
    except ImportError as error:
        _log.debug("traces take their usual time: %s", error)
        yield
        return
    table = get_fast_op_impls()
    ours = {operator: _rule(operator, table) for operator in _RULES if operator not in table}
    table.update(ours)
    try:
        yield
    finally:
        for operator in ours:
            table.pop(operator, None)


def _rule(operator: Any, table: dict[Any, Any]) -> Callable[..., Any]:
    def rule(mode: FakeTensorMode, *args: Any, **kwargs: Any) -> Any:
        found = told(mode, operator, args, kwargs)
        if found is not None:
            return found
        own = table.pop(operator)  # as if there were none
        try:
            with mode:
                return operator(*args, **kwargs)
        finally:
            table[operator] = own

    return rule
