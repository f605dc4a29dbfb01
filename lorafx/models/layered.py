"""Models whose layers are each built from a config of their own: the sizes in ``per_layer_config``.

transformers reads ``per_layer_config`` (by the index of a layer) from ``config.json`` and gives the config of each
layer, but most of its classes do not use it yet: where they read a size that differs from layer to layer, it
raises. Here a layer is given its own config when it is built, as the classes that use it do themselves.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import RLock
from typing import Any

from torch import nn

#: transformers' classes are patched while models are built: by one thread at a time.
_BUILDING = RLock()


def is_layered(config: Any) -> bool:
    """Whether sizes of a transformers config differ from layer to layer."""
    return bool(getattr(config, "is_heterogeneous", False))


def layers_of(model: nn.Module) -> dict[str, int]:
    """The layers that a model is a stack of, by name, and the index of each in its stack."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    names = [name for name, part in model.named_modules() if isinstance(part, GradientCheckpointingLayer)]
    indices = {name: name.rpartition(".")[2] for name in names}
    return {name: int(index) for name, index in indices.items() if index.isdigit()}


@contextmanager
def own_configs(config: Any = None) -> Iterator[None]:
    """While it is open, configs that say sizes layer by layer can be read and written (``config`` is one that is to be
    written), and each layer of a transformers model that is built by one reads the config of its layer.

    Layers that are not given their index are built from the config of the whole model, where transformers refuses to
    read a size that differs.
    """
    from transformers import PreTrainedConfig, PreTrainedModel

    changes = _Changes()
    begin: Callable[..., None] = PreTrainedModel.__init__
    read: Callable[..., None] = PreTrainedConfig.__post_init__

    @wraps(begin)
    def begun(model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if is_layered(config):
            for kind in _layer_classes(type(model).__module__):
                changes.put(kind, "__init__", _by_layer(kind.__init__))
        begin(model, config, *args, **kwargs)

    @wraps(read)
    def was_read(config: Any, **kwargs: Any) -> None:
        read(config, **kwargs)
        _leave_sizes(config, changes)

    with _BUILDING:
        try:
            changes.put(PreTrainedModel, "__init__", begun)
            changes.put(PreTrainedConfig, "__post_init__", was_read)
            _leave_sizes(config, changes)
            yield
        finally:
            changes.undo()


class _Changes:
    """Attributes of classes that are replaced temporarily."""

    def __init__(self) -> None:
        self._old: dict[tuple[type, str], Any] = {}

    def put(self, kind: type, name: str, value: Any) -> None:
        """Replace one, once."""
        if (kind, name) not in self._old:
            self._old[kind, name] = vars(kind)[name]
            setattr(kind, name, value)

    def undo(self) -> None:
        for (kind, name), value in self._old.items():
            setattr(kind, name, value)


def _leave_sizes(config: Any, changes: _Changes) -> None:
    """Skip checks of layer sizes: classes check the config of the whole model, which has no single value for a size
    that differs."""
    kind = type(config)
    if is_layered(config) and "__class_validators__" in vars(kind):
        changes.put(kind, "__class_validators__", [_of_alike(check) for check in vars(kind)["__class_validators__"]])


def _of_alike(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """A check of a config, of one whose layers are alike if it is about sizes."""
    if check.__name__ != "validate_architecture":
        return check

    @wraps(check)
    def checked(config: Any) -> None:
        if not is_layered(config):
            check(config)

    return checked


def _layer_classes(module: str) -> set[type]:
    """The classes of layers that a module of model code defines, if they are told their index."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    kinds = {kind for kind in vars(sys.modules[module]).values() if inspect.isclass(kind) and kind.__module__ == module}
    layers = {kind for kind in kinds if issubclass(kind, GradientCheckpointingLayer) and "__init__" in vars(kind)}
    return {kind for kind in layers if {"config", "layer_idx"} <= inspect.signature(kind.__init__).parameters.keys()}


def _by_layer(init: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(init)

    @wraps(init)
    def built(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        config, index = given.arguments["config"], given.arguments.get("layer_idx")
        if index is not None and is_layered(config):
            given.arguments["config"] = config.per_layer_config[index]
        init(*given.args, **given.kwargs)

    return built
