"""Leave a user's model as it was after it is traced and run: attributes, tensors, modes, hooks, config."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

_CONTAINERS = (dict, list, set, deque)


@contextmanager
def intact(model: nn.Module) -> Iterator[None]:
    """Restore ``model`` when the block ends, also by an error, and the random state of torch, numpy and Python.

    Restored are the attributes of every module and of the model's own objects in them (training modes, hooks,
    submodules and configs among them), the contents of containers, and the values of tensors except parameters, which
    are too large to copy beforehand: see :func:`unwritten`.
    """
    undo: list[Callable[[], None]] = [_random_state()]
    # What other libraries keep in a module (a logger, say) leads out of the model.
    own = {_library(module) for module in model.modules()} - {"torch"}
    _save(model, own, undo, set())
    try:
        yield
    finally:
        for put_back in undo:
            put_back()


def _library(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _save(value: Any, own: set[str], undo: list[Callable[[], None]], seen: set[int]) -> None:
    """Add to ``undo`` what puts ``value`` and everything it holds back. What is held is alive, so ids do not repeat."""
    if id(value) in seen:
        return
    seen.add(id(value))
    held: list[Any] = []
    if isinstance(value, FakeTensor):
        return  # left behind by a trace, without values
    if isinstance(value, Tensor):
        undo.append(_parameter_state(value) if isinstance(value, nn.Parameter) else _tensor_state(value))
    elif isinstance(value, _CONTAINERS):
        undo.append(_content(value))
        held = list(value.values()) if isinstance(value, dict) else list(value)
    elif isinstance(value, (tuple, frozenset)):
        held = list(value)
    elif isinstance(value, (nn.Module, SimpleNamespace)) or (_library(value) in own and not isinstance(value, type)):
        held = [value.__dict__] if hasattr(value, "__dict__") else []
    for inner in held:
        _save(inner, own, undo, seen)


def _content(container: Any) -> Callable[[], None]:
    before = container.copy()

    def put_back() -> None:
        changed = len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=True))
        if isinstance(container, dict):
            changed = changed or any(container[key] is not before[key] for key in before)
        if changed:
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(before)

    return put_back


def _tensor_state(value: Tensor) -> Callable[[], None]:
    before = value.detach().clone()

    def put_back() -> None:
        # What did not change is not touched, not even its version counter.
        if value.shape != before.shape:
            value.data = before
        elif not value.is_meta and not torch.equal(value, before):
            value.data.copy_(before)

    return put_back


def _parameter_state(value: nn.Parameter) -> Callable[[], None]:
    trains, gradient = value.requires_grad, value.grad

    def put_back() -> None:
        value.requires_grad_(trains)
        value.grad = gradient

    return put_back


def _random_state() -> Callable[[], None]:
    numpy: Any = sys.modules.get("numpy")
    torchs, pythons = torch.get_rng_state(), random.getstate()
    numpys = None if numpy is None else numpy.random.get_state()

    def put_back() -> None:
        torch.set_rng_state(torchs)
        random.setstate(pythons)
        if numpy is not None:
            numpy.random.set_state(numpys)

    return put_back


# ---- parameters


@contextmanager
def unwritten(model: nn.Module) -> Iterator[None]:
    """Undo what running ``model`` writes into its parameters (``nn.Embedding(max_norm=…)`` does) and buffers; none is
    copied that is not written."""
    writes = _Writes(model)
    try:
        with writes:
            yield
    finally:
        with torch.no_grad():
            for value, before in writes.before.values():
                value.copy_(before)
        if writes.compiled:  # code compiled under a dispatch mode would fail without it later, in the caller's hands
            torch.compiler.reset()


class _Writes(TorchDispatchMode):
    """Copies a tensor of a model before the first operator that writes into its storage."""

    #: Else an operator over functions (a branch that a model leaves to ``torch.cond``) does not run under this mode.
    supports_higher_order_operators = True

    def __init__(self, model: nn.Module):
        super().__init__()
        held = [*model.parameters(), *model.buffers()]
        self.watched = {_storage(value): value for value in held if not value.is_meta}
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.compiled = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator):
            self.compiled = True  # their functions are compiled, and write into nothing
        elif func._schema.is_mutable:
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            given.update(kwargs or {})
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._keep(given.get(argument.name))
        return func(*args, **(kwargs or {}))

    def _keep(self, written: Any) -> None:
        for value in written if isinstance(written, (list, tuple)) else [written]:
            key = _storage(value) if isinstance(value, Tensor) else None
            if key in self.watched and key not in self.before:
                self.before[key] = (self.watched[key], self.watched[key].detach().clone())


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata
