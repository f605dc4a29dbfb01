"""Inputs by the names that a model's ``forward`` takes: a program has names for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from ..errors import UsageError, did_you_mean
from ..graph.call import parameters_of
from ..graph.domain import FLAGS, input_nodes, leaves_of


def apart(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with a tensor of its own in each place: a tracer takes one tensor in two places for one input."""
    seen: set[int] = set()

    def own(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and id(leaf) in seen:
            return leaf.clone()
        seen.add(id(leaf))
        return leaf

    return pytree.tree_map(own, dict(inputs))


def check_taken(model: nn.Module, example: Mapping[str, Any], *, dynamic: bool) -> None:
    """UsageError for an example input that ``model`` takes under no name, or under one that leaves its size fixed."""
    taken, name = parameters_of(model), type(model).__name__
    collects = _has(model, inspect.Parameter.VAR_KEYWORD)
    placed = next((key for key, one in taken.items() if one.kind is one.POSITIONAL_ONLY), None)
    if placed is not None or (not taken and not collects and _has(model, inspect.Parameter.VAR_POSITIONAL)):
        raise UsageError(
            f"{name} takes {placed or 'its inputs'} by position alone, and a program takes inputs by name: capture a "
            "module around it whose forward names them"
        )
    other = next(iter(_others(model, example)), None)
    if other is not None and not collects:
        raise UsageError(f"{name} takes no input {other!r}{did_you_mean(other, taken)}; it takes {', '.join(taken)}")
    # transformers' own exporter names what its models collect.
    if other is not None and dynamic and not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"{name} takes {other!r} in **kwargs alone{did_you_mean(other, taken)}, of which no size can stay free: "
            "name it in forward, leave it out, or fix all sizes (dynamic=False)"
        )


def check_read(model: nn.Module, exported: ExportedProgram, example: Mapping[str, Any]) -> None:
    """UsageError for an input that ``**kwargs`` takes and nothing reads: a misspelt one would count for nothing."""
    others = _others(model, example)
    given = {name: value for name, value in example.items() if name not in FLAGS}
    nodes = dict(zip(leaves_of(given), input_nodes(exported), strict=True)) if others else {}
    for name in others:
        if not any(nodes[leaf].users for leaf in leaves_of({name: example[name]})):
            hint = did_you_mean(name, parameters_of(model))
            raise UsageError(f"{type(model).__name__} reads no input {name!r}{hint}; leave it out")


def _others(model: nn.Module, named: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``named`` that ``forward`` does not take by a name of its own; settings of transformers aside."""
    taken = {*parameters_of(model), *(FLAGS if hasattr(model, "config") else ())}
    return {name: value for name, value in named.items() if name not in taken}


def _has(model: nn.Module, kind: Any) -> bool:
    """Whether ``forward`` has ``*args`` or ``**kwargs``, as ``kind`` says."""
    return any(one.kind is kind for one in inspect.signature(model.forward).parameters.values())
