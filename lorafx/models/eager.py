"""Running an eager model, and finding out what it uses where an input is left out."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .intact import unwritten
from .tokenizers import pad_token

_log = logging.getLogger(__name__)

#: What a model may use in place of an input that is left out; which of them, is found by running it.
FILLS: tuple[str, ...] = ("ones", "zeros", "positions")


def filled(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """A tensor of ones, of zeros, or of positions along the last axis."""
    if kind == "positions":
        return torch.arange(shape[-1], dtype=dtype, device=device).expand(shape).contiguous()
    return (torch.ones if kind == "ones" else torch.zeros)(shape, dtype=dtype, device=device)


def answers(model: nn.Module, inputs: Mapping[str, Any]) -> list[Any]:
    """The outputs of ``model`` for ``inputs``, as flat values; what it writes to itself is undone, no cache is made."""
    with torch.no_grad(), same_draws(), cacheless(model), unwritten(model):
        return pytree.tree_leaves(model(**inputs))


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put ``model`` into training or evaluation mode; afterwards each of its modules has the mode that it had."""
    modes = [(part, part.training) for part in model.modules()]
    if any(mode != training for _, mode in modes):
        model.train(training)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def same_draws(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """The same random numbers each time, since a model may be random in evaluation too; the caller's random state is
    kept, on the CPU and on ``devices``."""
    with torch.random.fork_rng(devices=devices):
        started = any(kind.is_initialized() for kind in (torch.cuda, torch.xpu, torch.mtia))
        if started or torch.backends.mps.is_available():
            torch.manual_seed(0)
        else:  # torch.manual_seed would also queue this seed, over the caller's, for devices that are not started
            torch.default_generator.manual_seed(0)
        yield


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists of outputs agree up to rounding."""
    return len(a) == len(b) and all(_close(x, y) for x, y in zip(a, b, strict=True))


def _close(a: Any, b: Any) -> bool:
    """Within the square root of the dtype's precision: far above rounding, far below any wrong operator."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return not isinstance(a, Tensor) and not isinstance(b, Tensor)
    if not a.is_floating_point() or not a.numel():
        return True
    scale = a[a.isfinite()].abs().max() if a.isfinite().any() else torch.zeros(())
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    return torch.allclose(a, b, rtol=0.0, atol=float(scale) * tolerance, equal_nan=True)


def proven(
    model: nn.Module, example: Mapping[str, Any], omitted: list[str], given: Mapping[str, str]
) -> dict[str, str] | None:
    """Which of :data:`FILLS` ``model`` uses in place of each of ``omitted``, when it is also ``given`` others.

    None when it cannot do without, or uses something else. Tried on the example, on the example mirrored, and on one
    with padding tokens: an input derived from another is not a constant.
    """
    pad = pad_token(getattr(model, "config", None))
    examples = [
        dict(example),
        {name: _mirrored(value) for name, value in example.items()},
        {name: _padded(value, pad or 0) if name.endswith("input_ids") else value for name, value in example.items()},
    ]
    like = next((value for value in example.values() if is_text(value)), torch.zeros(1, 1))
    extra = {name: filled(kind, tuple(like.shape), torch.long, like.device) for name, kind in given.items()}
    wanted = [outcome(model, {**_without(inputs, omitted), **extra}) for inputs in examples]
    for kinds in itertools.product(FILLS, repeat=len(omitted)):
        chosen = dict(zip(omitted, kinds, strict=True))
        found = (outcome(model, _with(inputs, chosen)) for inputs in examples)
        if all(a is not None and b is not None and same(a, b) for a, b in zip(wanted, found, strict=True)):
            return chosen
    return None


def is_text(value: Any) -> bool:
    """Whether ``value`` has a number for each token of each text."""
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def outcome(model: nn.Module, inputs: Mapping[str, Any]) -> list[Any] | None:
    """What the model gives; None when it does not take these inputs."""
    try:
        return answers(model, inputs)
    except Exception as error:  # whatever a model raises counts as its result for these inputs
        _log.debug("%s does not take such inputs: %s", type(model).__name__, error)
        return None


def _without(inputs: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}


def _with(inputs: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    made = {
        name: filled(kind, tuple(inputs[name].shape), inputs[name].dtype, inputs[name].device)
        for name, kind in kinds.items()
    }
    return {**inputs, **made}


def _mirrored(value: Any) -> Any:
    return value.flip(-1) if is_text(value) else value


def _padded(ids: Tensor, pad: int) -> Tensor:
    ids = ids.clone()
    ids[-1:, ids.shape[-1] // 2 + 1 :] = pad
    return ids


@contextmanager
def cacheless(model: nn.Module) -> Iterator[None]:
    """Keep decoders from returning their cache, which no loss reads. Every submodule's config is set: a decoder inside
    an encoder-decoder has a config of its own."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "use_cache")}
    before = [(config, config.use_cache) for config in configs.values()]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            config.use_cache = value
