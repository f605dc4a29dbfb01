"""Another library's adapters inside a captured model: where the model is, and which of its tensors are theirs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..graph.tree import named_tensors

#: Where a layer with adapters keeps the layer that it adapts.
_BASE = "base_layer"
#: Layers that stand in for it, rather than beside it: what they compute is the base model's, with other weights.
_INSTEAD = ("ln_tuning_layers",)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper, under the names it has without PEFT; the wrapper where it does more than call
    it (prompts, mixtures of adapters, adapters that start at a token)."""
    library: Any = sys.modules.get("peft")
    if library is None or not isinstance(model, (library.PeftModel, library.PeftMixedModel)):
        return model
    held: Any = model
    tuner, configs = held.base_model, held.peft_config.values()
    calls = (library.tuners.tuners_utils.BaseTuner.forward, library.AdaLoraModel.forward)
    from_a_token = any(getattr(config, "alora_invocation_tokens", None) for config in configs)
    return tuner.model if getattr(type(tuner), "forward", None) in calls and not from_a_token else model


def adapter_tensors(model: nn.Module) -> frozenset[str]:
    """Names of the tensors that PEFT's adapters keep in ``model``: all of its tuner layers', but what they adapt.

    Ties count by all their names: tensors that layers share may be kept outside of them. A model that was built without
    PEFT has none, and PEFT need not be there.
    """
    library: Any = sys.modules.get("peft.tuners.tuners_utils")
    if library is None:
        return frozenset()
    layers = {
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, library.BaseTunerLayer) and hasattr(module, _BASE)
    }
    tensors = dict(named_tensors(model))
    theirs, adapted = (set(_ids(tensors, layers, base)) for base in (False, True))
    return frozenset(name for name, value in tensors.items() if id(value) in theirs - adapted)


def _ids(tensors: dict[str, Tensor], layers: set[str], base: bool) -> Iterator[int]:
    """The tensors of the layers that they adapt (``base``), or of their own; the innermost layer decides."""
    for name, value in tensors.items():
        parts = name.split(".")
        path = next((p for p in (".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)) if p in layers), None)
        held = parts[path.count(".") + 1 if path else 0] if path is not None else ""
        if held and held not in _INSTEAD and (held == _BASE) == base:
            yield id(value)
