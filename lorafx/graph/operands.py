"""A node's arguments and results, with types: torch.fx declares an argument to be nearly anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true


def value_of(node: object) -> Tensor:
    """The fake value of a node that gives one tensor; TypeError for any other argument."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        raise TypeError(f"{node} gives no tensor")
    return value


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are known to be the same: written alike, or by what the trace asserts."""
    return str(a) == str(b) or statically_known_true(a == b)


def rank_of(node: object) -> int:
    """How many dimensions a node's value has; TypeError for an argument without a tensor."""
    return value_of(node).dim()


def is_float(node: fx.Node) -> bool:
    """Whether a node gives one floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def node_at(node: fx.Node, place: int) -> fx.Node:
    """The node that is a node's argument in one place; TypeError for a number, a list or nothing."""
    given = node.args[place]
    if not isinstance(given, fx.Node):
        raise TypeError(f"{node}: argument {place} is {given!r}, not the value of a node")
    return given


def operator_of(node: fx.Node) -> Callable[..., Any]:
    """What a node calls; TypeError for a placeholder, a tensor or the output."""
    if not callable(node.target):
        raise TypeError(f"{node} calls no operator")
    return node.target


def declared_arguments(node: fx.Node) -> list[torch._C.Argument]:
    """The arguments that an ATen operator's schema declares, in order; TypeError for any other target."""
    if not isinstance(node.target, torch._ops.OpOverload):
        raise TypeError(f"{node.target} has no schema")
    return node.target._schema.arguments


def is_mutable(node: fx.Node) -> bool:
    """Whether the node's own operator declares that it changes a tensor in place; inner graphs are not looked into."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def argument(node: fx.Node, name: str) -> Any:
    """An ATen operator's argument by its name, or the default that its schema gives it."""
    for position, declared in enumerate(declared_arguments(node)):
        if declared.name == name:
            return node.args[position] if position < len(node.args) else node.kwargs.get(name, declared.default_value)
    raise KeyError(f"{node.target} has no argument {name!r}")


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Give an ATen operator another argument, where that stands: by position, or by name."""
    position = [declared.name for declared in declared_arguments(node)].index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def dimension(node: fx.Node, rank: int) -> int:
    """The dimension that an operator's argument ``dim`` names, of ``rank``, counted from the front."""
    return int(argument(node, "dim")) % rank
