"""Gradients that a model defines itself: a graph holds what a forward computes, and its gradients follow from that.

A ``torch.autograd.Function`` may define others (a straight-through estimator, a sampled forward with an expected
backward), and so may a hook on the gradient of a value or of a module. Where one was traced, the gradients of graph and
eager model are compared. A hook on a weight's gradient matters where that weight trains: see
:func:`lorafx.methods.low_rank.train_in_full`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from ..models.eager import cacheless, in_mode, same_draws
from ..public import Program

_log = logging.getLogger(__name__)

#: Products in a backward pass may sum in another order; a wrong rule is off by far more.
_TOLERANCE = 1e-3


class _Context:
    """The context through which a forward talks to its backward, which a trace does not need."""

    needs_input_grad = (True,) * 64

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("save_for_", "mark_", "set_")):
            return lambda *values: None
        raise AttributeError(name)


@contextmanager
def functions_laid_open() -> Iterator[set[str]]:
    """Autograd functions compute as if they were plain code, so that a trace sees what they do and what flows through
    them; a function's own forward runs without gradients, which would cut it off. Gives the names of those that ran,
    and says whether a hook was put on the gradient of a value."""
    used: set[str] = set()
    function: Any = torch.autograd.Function
    original = vars(function)["apply"]
    tensor: Any = Tensor
    hook = tensor.register_hook

    def register_hook(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        used.add("a hook on a value")
        return hook(self, *args, **kwargs)

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:  # computes its function once more in the backward pass, and nothing else
            run, _, *inputs = args
            return run(*inputs)
        if cls.__module__.startswith("torch."):  # an operator's, which the graph holds whole
            return original.__get__(None, cls)(*args, **kwargs)
        used.add(cls.__name__)
        separate = cls.setup_context is not function.setup_context
        return cls.forward(*(() if separate else (_Context(),)), *args, **kwargs)

    function.apply, tensor.register_hook = classmethod(apply), register_hook
    try:
        with _inference_without_gradients():
            yield used
    finally:
        function.apply, tensor.register_hook = original, hook


@contextmanager
def _inference_without_gradients() -> Iterator[None]:
    """``torch.inference_mode`` is ``torch.no_grad`` to whoever traces: a tracer sees nothing of it, and gradients would
    flow where the model has none."""
    mode: Any = torch.inference_mode
    original = mode.__enter__, mode.__exit__

    def enter(self: Any) -> None:
        self.without_gradients = torch.set_grad_enabled(not self.mode)

    def leave(self: Any, *error: Any) -> None:
        self.without_gradients.__exit__(*error)

    mode.__enter__, mode.__exit__ = enter, leave
    try:
        yield
    finally:
        mode.__enter__, mode.__exit__ = original


def module_hooks(model: nn.Module) -> set[str]:
    """The modules whose gradients pass a hook, as an error names them."""
    hooked = (path for path, part in model.named_modules() if part._backward_hooks or part._backward_pre_hooks)
    return {f"a hook on {path}" if path else "a hook on the model" for path in hooked}


def same_gradients(program: Program) -> bool:
    """Whether the graph of ``program`` has the gradients of the eager model, in evaluation mode, on the example.

    Not when the model gives none in that mode: there is nothing to compare with.
    """
    model = program.source.model
    named = model.named_parameters()
    names = [name for name, value in named if value.requires_grad and value.is_floating_point()]
    try:
        with in_mode(model, training=False), cacheless(model):
            expected = _gradients(model, program.example, names)
    except Exception as error:  # whatever a model's own backward raises
        _log.debug("%s has no gradients in evaluation mode: %s", program.name, error)
        return False
    found = _gradients(program.module().eval(), program.example, names)
    return all(_close(a, b) for a, b in zip(expected, found, strict=True))


def _gradients(model: nn.Module, inputs: Mapping[str, Any], names: list[str]) -> tuple[Any, ...]:
    # A program's tensors are its own, over the model's storage.
    values = dict(model.named_parameters(remove_duplicate=False))
    with torch.enable_grad(), same_draws():
        outputs = pytree.tree_leaves(model(**inputs))
        kept = [value for value in outputs if isinstance(value, Tensor) and value.requires_grad]
        # Any fixed weighting of all outputs will do for a loss.
        weights = [torch.linspace(-1, 1, v.numel(), dtype=v.dtype, device=v.device).view(v.shape) for v in kept]
        return torch.autograd.grad(kept, [values[name] for name in names], weights, allow_unused=True)


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    scale = float(a.abs().max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=_TOLERANCE * scale, equal_nan=True)
