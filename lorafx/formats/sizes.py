"""Which settings of a config give a model's shapes: for all layers alike, or layer by layer.

What a setting decides is not looked up but tried out: the model's class is built without values under another value of
it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..graph.tree import named_tensors
from ..models.layered import layers_of, own_configs

_log = logging.getLogger(__name__)

#: More ways than this to explain the sizes are not tried.
_TRIES = 256
#: Shapes by the names of tensors.
Shapes = Mapping[str, Any]


def of_config(cls: Any, config: Any) -> Any:
    """A model of a class without values; errors come from the class."""
    with own_configs(), torch.device("meta"):
        return cls(config)


def settings_for(cls: Any, config: Any, before: Shapes, after: Shapes) -> Iterator[dict[str, Any]]:
    """Settings of ``config`` under which the shapes ``before`` of a ``cls`` might be ``after``, the likeliest first.

    The caller tries them. Where no setting can be read off the sizes, it is the config as it is, which shows what does
    not fit.
    """
    yield from list(resized(config, before, after)) or [{}]
    yield from by_layer(cls, config, before, after)


def resized(config: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[dict[str, int]]:
    """Settings that might turn the shapes ``before`` into ``after`` in every layer alike, the likeliest first.

    A size is a setting of the config, twice one (gate and up in one tensor), or one times the width of a head. The
    value alone does not tell which (a model may be as wide as all its heads together), so every reading is offered.
    Without changed sizes, or when a size changed in two ways, only the config as it is can be offered.
    """
    changed: dict[int, set[int]] = {}
    for name, old in before.items():
        for a, b in zip(old, after.get(name, old), strict=False):
            if a != b:
                changed.setdefault(a, set()).add(b)
    if not changed or any(len(new) > 1 for new in changed.values()):
        yield {}
        return
    readings = [list(_readings(config, old, next(iter(new)))) for old, new in sorted(changed.items())]
    for chosen in itertools.islice(itertools.product(*readings), _TRIES):
        yield {key: value for reading in chosen for key, value in reading.items()}


def _readings(config: Any, old: int, new: int) -> Iterator[dict[str, int]]:
    settings = {key: value for key, value in vars(config).items() if type(value) is int}
    yield from ({key: new} for key, value in settings.items() if value == old)
    if new % 2 == 0:
        yield from ({key: new // 2} for key, value in settings.items() if value * 2 == old)
    width = settings.get("head_dim")
    if width and new % width == 0:
        yield from ({key: new // width} for key, value in settings.items() if value * width == old and "head" in key)


# ---- layer by layer


def by_layer(cls: Any, config: Any, before: Shapes, after: Shapes) -> Iterator[dict[str, Any]]:
    """Settings that give ``after`` layer by layer (``per_layer_config``), if the class's layers can be found.

    Only what is inside layers may differ. A config of two stacks (an encoder and a decoder) has no layer for each, and
    one of several models (texts and images) counts none.
    """
    changed = {name for name, old in before.items() if after.get(name, old) != old}
    counted = hasattr(config, "per_layer_config") and hasattr(config, "num_hidden_layers")
    if not changed or not counted or getattr(config, "is_encoder_decoder", False):
        return
    for more in _unsaid(config):
        stack = _Stack.of(cls, with_settings(config, more))
        if stack is None or not changed <= stack.places.keys() or not stack.shapes.keys() <= after.keys():
            continue
        sizes = stack.sizes(after)
        if sizes is not None and all(before.get(name) == shape for name, shape in stack.shapes.items()):
            yield {**more, **sizes}


def with_settings(config: Any, settings: Mapping[str, Any]) -> Any:
    """A copy of a config with more settings; errors come from the class."""
    result = copy.deepcopy(config)
    for key, value in settings.items():
        setattr(result, key, value)
    return result


def _unsaid(config: Any) -> Iterator[dict[str, int]]:
    """Nothing, and sizes that classes derive where their config leaves them out: only explicit settings can differ."""
    yield {}
    known = vars(config)
    width, heads = known.get("hidden_size"), known.get("num_attention_heads")
    if width and heads and known.get("head_dim") is None and width % heads == 0:
        yield {"head_dim": width // heads}
    if "n_inner" in known and known["n_inner"] is None:
        yield {"n_inner": 4 * known["n_embd"]}


@dataclass(frozen=True)
class _Stack:
    """A model's layers, and how the sizes inside them follow from settings.

    Attributes:
        config: of the model
        shapes: of all its tensors
        places: the index of its layer, of each tensor inside one
        slopes: by setting, what one more of it adds to each axis of a tensor inside a layer
    """

    config: Any
    shapes: dict[str, torch.Size]
    places: dict[str, int]
    slopes: dict[str, dict[tuple[str, int], float]]

    @classmethod
    def of(cls, kind: Any, config: Any) -> _Stack | None:
        """None where the class cannot build the config."""
        model = _tried(kind, config)
        if model is None:
            return None
        shapes = {name: tensor.shape for name, tensor in named_tensors(model)}
        layers = layers_of(model)
        owners = {name: [layer for layer in layers if name.startswith(f"{layer}.")] for name in shapes}
        stack = cls(config, shapes, {name: layers[owner[0]] for name, owner in owners.items() if owner}, {})
        settings = {key for key, value in vars(config).items() if type(value) is int and value > 0}
        found = {key: stack._slopes(kind, key) for key in sorted(settings)}
        return dataclasses.replace(stack, slopes={key: slopes for key, slopes in found.items() if slopes})

    def said(self) -> dict[int, dict[str, Any]]:
        """The settings that the config already has for single layers, for all indices."""
        known = self.config.to_dict().get("per_layer_config") or {}
        return {layer: {} for layer in self.places.values()} | {int(i): dict(sizes) for i, sizes in known.items()}

    def _value(self, key: str, layer: int) -> int:
        return getattr(self.config.per_layer_config[layer], key)

    def _slopes(self, kind: Any, key: str) -> dict[tuple[str, int], float]:
        """What one more of a setting adds in each layer. Nothing for a setting that is read outside of layers:
        transformers refuses classes that read a per-layer setting from the whole config."""
        twice = {i: {**sizes, key: 2 * self._value(key, i)} for i, sizes in self.said().items()}
        model = _tried(kind, self.config, {"per_layer_config": twice})
        shapes = {} if model is None else {name: tensor.shape for name, tensor in named_tensors(model)}
        if shapes.keys() != self.shapes.keys():
            return {}
        grown = [
            (name, axis, new - old)
            for name, known in self.shapes.items()
            for axis, (old, new) in enumerate(zip(known, shapes[name], strict=True))
            if new != old
        ]
        if any(name not in self.places for name, *_ in grown):
            return {}
        return {(name, axis): more / self._value(key, self.places[name]) for name, axis, more in grown}

    def sizes(self, after: Shapes) -> dict[str, Any] | None:
        """The settings that come closest to ``after`` in each layer; None when one would be negative.

        A shape is a sum of settings times what one more of each adds, so they are a least-squares solution.
        """
        said, keys = self.said(), list(self.slopes)
        for layer, sizes in said.items():
            axes = [*{axis: None for key in keys for axis in self.slopes[key] if self.places[axis[0]] == layer}]
            slopes = [[self.slopes[key].get(axis, 0.0) for key in keys] for axis in axes]
            more = [float(after[name][axis] - self.shapes[name][axis]) for name, axis in axes]
            steps = np.linalg.lstsq(np.array(slopes), np.array(more), rcond=None)[0] if axes else ()
            sizes.update({key: round(self._value(key, layer) + step) for key, step in zip(keys, steps, strict=False)})
        if any(size < 0 for sizes in said.values() for size in sizes.values() if type(size) is int):
            return None
        return self._settings(said)

    def _settings(self, said: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        """Settings that are alike in all layers are given once."""
        values = {key: {sizes.get(key) for sizes in said.values()} for key in self.slopes}
        alike = {key: found.pop() for key, found in values.items() if len(found) == 1}
        rest = {i: {key: size for key, size in sizes.items() if key not in alike} for i, sizes in said.items()}
        rest = {layer: sizes for layer, sizes in rest.items() if sizes}
        return {**alike, "per_layer_config": rest or None}


def _tried(kind: Any, config: Any, settings: Mapping[str, Any] | None = None) -> Any:
    """A model without values; None where the class raises any error for such a config."""
    try:
        return of_config(kind, with_settings(config, settings or {}))
    except Exception as error:  # a class may raise anything; what is found is tried on the tensors first
        _log.debug("%s is not built with %s: %s", kind.__name__, settings, error)
        return None
