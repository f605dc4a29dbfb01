"""Captures that tests share: each is made once in a process and never changed.

Passes give new programs, and what they train has storage of its own, so tests may rewrite, fold and train what they
make of a shared capture. A test that needs to change one copies it first. This is checked: what a test was given is
hashed when it is made and again when the test ends (:func:`check`, called by the plug-in).
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from ..frontend.capture import capture
from ..graph.program import Program as Data
from ..graph.tree import aliases, get_tensor, named_tensors, put_tensor, tensor_hash
from ..public import Program

P = ParamSpec("P")
T = TypeVar("T")

#: A tiny program takes a few megabytes and a worker sees most files of the suite. More than the largest round that one
#: file makes (five models under nine recipes, with the five captures), or each of its tests would make them again.
KEPT = 64

_kept: OrderedDict[Hashable, Any] = OrderedDict()
_hashes: dict[Hashable, Hashable] = {}
_handed: set[Hashable] = set()


def shared(make: Callable[P, T]) -> Callable[P, T]:
    """``make`` with its results kept: programs, modules, and mappings of them.

    Arguments are compared by value, however they are passed: ``captured()`` is ``captured(bert)``. Making one uses its
    own random state, so that a test sees the same numbers whether or not it is the first to ask.
    """
    signature = inspect.signature(make)

    @functools.wraps(make)
    def held(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        key = (make.__module__, make.__qualname__, bound.args, tuple(sorted(bound.kwargs.items())))
        if key not in _kept:
            with torch.random.fork_rng(devices=()):
                made = make(*args, **kwargs)
            _kept[key], _hashes[key] = made, _hash(made)
        _kept.move_to_end(key)
        _handed.add(key)
        while len(_kept) > KEPT:
            _check(next(iter(_kept)))
            del _hashes[_kept.popitem(last=False)[0]]
        return _kept[key]

    return held


def kept() -> frozenset[Hashable]:
    """What is kept now, told apart from what was."""
    return frozenset(_kept)


@shared
def of_folder(folder: Path, **options: Any) -> Program:
    """The shared capture of a checkpoint folder; not to be changed."""
    return capture(folder, **options)


def own(root: nn.Module, name: str) -> nn.Parameter:
    """Give a tensor of a program, under all of its names, storage of its own, which a test may write to."""
    old = get_tensor(root, name)
    fresh = nn.Parameter(old.detach().clone(), old.requires_grad)
    for alias in aliases(root, name):
        put_tensor(root, alias, fresh)
    return fresh


def check() -> None:
    """Raise AssertionError when something that was handed out since the last check is not what was made."""
    while _handed:
        _check(_handed.pop())


def _check(key: Any) -> None:
    _handed.discard(key)
    if key in _kept and _hash(_kept[key]) != _hashes[key]:
        del _kept[key], _hashes[key]  # the next test gets a new one
        raise AssertionError(f"the shared {key[1]}{key[2]} was changed; change a copy, in storage of its own")


def _hash(value: Any) -> Hashable:
    return tuple(_parts(value))


def _parts(value: Any) -> Iterator[Hashable]:
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _parts(part)
        return
    root: nn.Module = value.root if isinstance(value, Data) else value
    for name, tensor in named_tensors(root):
        yield name, tensor.requires_grad, "" if tensor.is_meta else tensor_hash(tensor)
    if isinstance(value, Data):
        # An export traces the model itself, hooks and all.
        yield sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks) for module in value.source.model.modules()
        )
        yield value.stage, tuple(value.roles.items()), len(value.history), len(value.graph.nodes)
