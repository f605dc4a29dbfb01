"""Another library's adapters inside a captured model: where the model is, which of its tensors are theirs, and which
parts of their code a tracer cannot follow."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph.constants import Constants
from ..graph.site import WEIGHT_OPS
from ..graph.tree import named_tensors

#: Where a layer with adapters keeps the layer that it adapts.
_BASE = "base_layer"
#: Layers that replace it, rather than add to it: they compute the base model's function with other weights.
_INSTEAD = ("ln_tuning_layers",)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper, under the names it has without PEFT; the wrapper itself where it does more than
    call the model (prompts, mixtures of adapters, adapters that start at a token)."""
    library: Any = sys.modules.get("peft")
    if library is None or not isinstance(model, (library.PeftModel, library.PeftMixedModel)):
        return model
    held: Any = model
    tuner, configs = held.base_model, held.peft_config.values()
    calls = (library.tuners.tuners_utils.BaseTuner.forward, library.AdaLoraModel.forward)
    from_a_token = any(getattr(config, "alora_invocation_tokens", None) for config in configs)
    return tuner.model if getattr(type(tuner), "forward", None) in calls and not from_a_token else model


def adapter_tensors(model: nn.Module) -> frozenset[str]:
    """Names of the tensors that PEFT's adapters keep in ``model``: those of its tuner layers, except what they adapt.

    Tied tensors count under all their names, since tensors that layers share may be kept outside of them. A model built
    without PEFT has none, and PEFT need not be installed.
    """
    layers = _layers(model)
    tensors = dict(named_tensors(model))
    theirs, adapted = (set(_ids(tensors, layers, base)) for base in (False, True))
    return frozenset(name for name, value in tensors.items() if id(value) in theirs - adapted)


def adapter_constants(model: nn.Module, root: nn.Module, graph: fx.Graph, names: Iterable[str]) -> frozenset[str]:
    """Those of the constants ``names``, which a tracer lifted out of a model's code, that PEFT's adapters brought.

    A constant is called after the module whose code reads it first: a tuner layer, or one of its own. What reaches a
    weight as its input has come from outside of that code.
    """
    layers, constants = _layers(model), Constants(root)
    if not layers:
        return frozenset()
    weights = [node for node in graph.nodes if node.target in WEIGHT_OPS]
    inputs = (node.args[WEIGHT_OPS[node.target].input] for node in weights)
    given = frozenset[str]().union(*(constants.reads(n) or () for n in inputs if isinstance(n, fx.Node)))
    return frozenset(name for name in names if name not in given and _holder(name, layers) is False)


@contextmanager
def choosing() -> Iterator[None]:
    """While it is entered, PSOFT's bound on its generator chooses between two values where its code branches on one:
    the same numbers and gradients, in a form that a graph holds."""
    layer: Any = getattr(sys.modules.get("peft.tuners.psoft.layer"), "OrthLayer", None)
    own = getattr(layer, "_project_Q", None)
    if own is None:
        yield
        return
    layer._project_Q = _bounded
    try:
        yield
    finally:
        layer._project_Q = own


def _bounded(_: nn.Module, generator: Tensor, eps: float = 0.9) -> Tensor:
    """``generator``, scaled to a Frobenius norm of ``eps`` where its own is larger (and finite)."""
    norm = torch.linalg.norm(generator, ord="fro")
    too_large = torch.isfinite(norm) & (norm > eps)
    return torch.where(too_large, generator * (eps / (norm + 1e-12)), generator)


def _layers(model: nn.Module) -> set[str]:
    """The paths of PEFT's tuner layers."""
    library: Any = sys.modules.get("peft.tuners.tuners_utils")
    if library is None:
        return set()
    return {
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, library.BaseTunerLayer) and hasattr(module, _BASE)
    }


def _ids(tensors: dict[str, Tensor], layers: set[str], base: bool) -> Iterator[int]:
    """The tensors of the layers that they adapt (``base``), or of their own."""
    return (id(value) for name, value in tensors.items() if _holder(name, layers) is base)


def _holder(name: str, layers: set[str]) -> bool | None:
    """Whether a tensor belongs to what a tuner layer adapts (True) or to the layer itself (False); the innermost layer
    decides. None when it belongs to neither."""
    parts = name.split(".")
    path = next((p for p in (".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)) if p in layers), None)
    held = parts[path.count(".") + 1 if path else 0] if path is not None else ""
    return held == _BASE if held and held not in _INSTEAD else None
