"""What operators give on fake tensors, found once for the like of their operands.

torch has such a memo too, which takes up to a millisecond to give what it knows, longer than many an operator does: it
makes every size of a result anew by computer algebra, and gives a view a memory of its own first. Here sizes are those
that were found, and a view is made of its operand. What torch would not remember is not remembered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .fake import likeness
from .shapes import plain

_log = logging.getLogger(__name__)

#: Where a mode keeps what is known of its tensors.
_KNOWN = "lorafx_likes"


class _Result(NamedTuple):
    """A tensor's metadata. ``view``: it lies in the memory of the first operand; ``rows``: as one lies by default."""

    size: Sequence[Any]
    stride: Sequence[Any]
    offset: Any
    dtype: torch.dtype
    device: torch.device
    view: bool
    rows: bool

    def made(self, mode: FakeTensorMode, args: Sequence[Any]) -> Tensor:
        from torch._subclasses.fake_tensor import in_kernel_invocation_manager

        guards = nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()
        with in_kernel_invocation_manager(mode), guards:
            if self.view:
                value = torch.as_strided(args[0], self.size, self.stride, self.offset)
            elif self.rows:
                value = torch.empty(self.size, dtype=self.dtype, device="meta")
            else:
                value = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")
        return FakeTensor(mode, value, self.device)


def _told(value: Any) -> Any:
    """All of an operand that a fake result depends on, as something hashable."""
    if isinstance(value, Tensor):
        return likeness(value), likeness(value.storage_offset())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_told(item) for item in value)
    return likeness(value)


def _key(mode: Any, operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """None for what has no tensor of the mode alone, or a result that depends on values."""
    operands = [*args, *kwargs.values()]
    flat = [item for value in operands for item in (value if isinstance(value, (list, tuple)) else (value,))]
    held = [value for value in flat if isinstance(value, Tensor)]
    if not held or not all(plain(value, mode) for value in held) or mode.propagate_real_tensors:
        return None
    settings = mode.shape_env and mode.shape_env.settings
    options = torch.get_default_dtype(), torch._C._get_default_device(), torch.is_inference_mode_enabled(), settings
    return operator, options, _told(args), tuple((name, _told(value)) for name, value in sorted(kwargs.items()))


def _result(mode: Any, operator: Any, args: Sequence[Any], kwargs: dict[str, Any], found: Any) -> _Result | None:
    """What to remember of a result, if it is made of it just as it was."""
    from torch._subclasses.fake_tensor import _BypassDispatchCache

    if not isinstance(found, Tensor) or operator._schema.is_mutable or not plain(found, mode) or found.requires_grad:
        return None
    try:
        mode._validate_cache_key(operator, args, kwargs)
    except _BypassDispatchCache:
        return None
    sizes = (*found.shape, *found.stride(), found.storage_offset())
    if any(isinstance(size, SymInt) and size.node._hint is None for size in sizes):  # it depends on values
        return None
    flat = [item for value in (*args, *kwargs.values()) for item in (value if isinstance(value, list) else [value])]
    shared = [value for value in flat if isinstance(value, Tensor) and _memory(value) == _memory(found)]
    if shared and not (operator.is_view and shared[0] is args[0] and found is not args[0]):
        return None
    told = (tuple(found.shape), found.stride(), found.storage_offset(), found.dtype, found.device, bool(shared))
    results = (_Result(*told, rows) for rows in (True, False))
    return next((result for result in results if _told(result.made(mode, args)) == _told(found)), None)


def _memory(value: Tensor) -> int:
    return value.untyped_storage()._cdata


@contextmanager
def remembered_likes() -> Iterator[None]:
    """Within, fake tensor modes that begin run an operator once for the like of its operands, unless torch's own memo
    is off. How they run operators is no promise of torch's: versions that do it otherwise remember as they do."""
    from torch._dynamo import config  # half a second, which what traces nothing need not wait

    mode: Any = FakeTensorMode
    own = vars(mode).get("_dispatch_impl")
    if own is None or not hasattr(mode, "_validate_cache_key") or not config.fake_tensor_cache_enabled:
        _log.debug("operators are remembered as torch does")  # or this one, further out
        yield
        return
    mode._dispatch_impl = _remembering(own)
    try:
        with config.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        mode._dispatch_impl = own


def _remembering(own: Callable[..., Any]) -> Callable[..., Any]:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    def run(self: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        ready = isinstance(func, torch._ops.OpOverload) and get_proxy_mode() is None
        key = _key(self, func, args, kwargs) if ready else None
        if key is None:
            return own(self, func, types, args, kwargs)
        known = vars(self).setdefault(_KNOWN, {})
        if known.get(key) is not None:
            return known[key].made(self, args)
        found = own(self, func, types, args, kwargs)
        if key not in known:
            known[key] = _result(self, func, args, kwargs, found)
        return found

    return run
