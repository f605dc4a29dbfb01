"""Checkpoints with fewer layers: a stack in which some layers compute nothing is a stack of the others."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..channels.trial import equal
from ..graph.program import Program
from ..graph.tree import named_tensors
from ..models.layered import is_layered, layers_of
from ..training.module import build_module


@dataclass(frozen=True)
class Shallower:
    """A stack of layers without the layers that compute nothing.

    Attributes:
        stack: the path that its layers are below
        index: the new index of each layer that stays, by its old one
        total: how many layers there were
    """

    stack: str
    index: Mapping[int, int]
    total: int

    @classmethod
    def of(cls, program: Program) -> Shallower | None:
        """None where every layer computes something, where none does, and where there are several stacks."""
        layers = layers_of(program.source.model)
        stacks = {name.rpartition(".")[0] for name in layers}
        if len(stacks) != 1 or getattr(program.config, "num_hidden_layers", None) != len(layers):
            return None
        stack, held = next(iter(stacks)), {name: program.roles.get(name) for name, _ in named_tensors(program.root)}
        kept = [
            number
            for name, number in sorted(layers.items(), key=lambda item: item[1])
            if any(role != "unread" for tensor, role in held.items() if tensor.startswith(f"{name}."))
        ]
        if not 0 < len(kept) < len(layers):
            return None
        return cls(stack, {old: new for new, old in enumerate(kept)}, len(layers))

    def config(self, config: Any) -> Any:
        """The config of the model without the other layers; errors come from its class."""
        result, own = copy.deepcopy(config), {}
        if is_layered(config):
            own = {int(layer): sizes for layer, sizes in config.to_dict()["per_layer_config"].items()}
            result.per_layer_config = None
        for key, value in list(vars(result).items()):
            if isinstance(value, (list, tuple)) and len(value) == self.total and not key.startswith("_"):
                setattr(result, key, [value[old] for old in self.index])
        result.num_hidden_layers = len(self.index)
        if own:
            result.per_layer_config = {self.index[old]: sizes for old, sizes in own.items() if old in self.index}
        return result

    def name(self, name: str) -> str | None:
        """The new name of a tensor; None for one of a layer that goes."""
        inside = name.removeprefix(f"{self.stack}.") if name.startswith(f"{self.stack}.") else ""
        number, dot, rest = inside.partition(".")
        if not (dot and number.isdigit()):
            return name
        new = self.index.get(int(number))
        return None if new is None else f"{self.stack}.{new}.{rest}"

    def renumbered(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values by the names of tensors, under the new names."""
        return {new: value for name, value in values.items() if (new := self.name(name)) is not None}


def computes(model: nn.Module, program: Program) -> bool:
    """Whether a model gives what a program gives on its example inputs, up to rounding.

    A layer's function may depend on its index in ways that no config shows.
    """
    names = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if "use_cache" in names else {}
    with torch.no_grad():
        before, after = (
            [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]
            for result in (build_module(program).eval()(**program.example), model(**program.example, **options))
        )
    return len(before) == len(after) and all(map(equal, before, after))
