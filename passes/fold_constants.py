"""Replace every subgraph of tensors alone by the tensor it computes."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from ..affine.spread_rules import SPLITS
from ..affine.worth import added
from ..base import Pass, Promise
from ..graph.constants import Constants
from ..graph.edit import Edit
from ..graph.operands import node_at
from ..graph.program import Program
from ..graph.selection import Selection
from ..graph.site import INSERTED_BY


@dataclass(frozen=True)
class Alike:
    """Nodes that compute the same value from tensors alone. They fold together, so that a tied weight stays tied."""

    nodes: tuple[fx.Node, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.nodes))


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace every subgraph of tensors alone by the tensor it computes.

    Before: ``W_eff = sigmoid(θ) ⊙ W``, ``y = W_eff x``
    After: ``y = W' x``

    Only subgraphs that read something that was put into the base model are folded, by a pass or by another library
    before the capture: the base model's own constants (a norm that adds one to its weight, say) stay as they are, so
    that the folded weights still fit the original architecture. What is computed several times becomes one tensor.
    Computed in the dtype of the graph, on the device of the tensors.

    Keeps: the outputs, bit by bit. Does nothing without inserted tensors.
    Source: constant folding, as in any compiler.
    """

    promise: ClassVar[Promise] = Promise.EXACT

    def sites(self, program: Program) -> Selection[Alike]:
        learned = added(program)
        constants = Constants(program.root, frozenset(program.roles) - learned)
        groups: dict[Hashable, list[fx.Node]] = defaultdict(list)
        for node in program.graph.nodes:
            if (
                node.op != "get_attr"
                and (constants.reads(node) or frozenset()) & learned
                and any(constants.reads(user) is None for user in node.users)
            ):
                node = _last_inserted(node)
                if node not in groups[constants.key(node)]:
                    groups[constants.key(node)].append(node)
        return Selection(tuple(Alike(tuple(nodes)) for nodes in groups.values()))

    def rewrite(self, edit: Edit, site: Alike) -> None:
        region = _region(site)
        value = nn.Parameter(Constants(edit.program.root).value(site.nodes[0]).contiguous(), requires_grad=False)
        name = _name(edit, site, region, value.shape)
        if name in (str(node.target) for node in region):
            for alias in _tied(edit, name, region):
                edit.set_tensor(alias, value)
        else:
            edit.set_tensor(name, value, "adapter")
        for node in site.nodes:
            node.replace_all_uses_with(edit.tensor(name))
        edit.sweep(site.nodes)


def _last_inserted(node: fx.Node) -> fx.Node:
    """``node`` without the base's own operators at its end, if a pass inserted what is before them.

    Where the base transposes a weight before it uses it, a changed weight is stored as the base stores it; where it
    cuts one into several (query, key and value), as one.
    """
    if node.target is operator.getitem and node_at(node, 0).target in SPLITS:
        node = node_at(node_at(node, 0), 0)
    last = node
    while INSERTED_BY not in last.meta and len(last.all_input_nodes) == 1:
        last = last.all_input_nodes[0]
    return last if INSERTED_BY in last.meta and last.op != "get_attr" else node


def _region(site: Alike) -> dict[fx.Node, None]:
    """The nodes of ``site`` and everything they are computed from."""
    seen: dict[fx.Node, None] = {}
    stack = list(site.nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen[node] = None
            stack.extend(node.all_input_nodes)
    return seen


def _free(edit: Edit, site: Alike, region: dict[fx.Node, None]) -> list[str]:
    """Names of the tensors that only ``site`` is made of: nothing else reads them, or anything computed from them
    inside."""
    kept = [node for node in region if node not in site.nodes and any(user not in region for user in node.users)]
    read_on = set(_region(Alike(tuple(kept))))
    tensors = [node for node in region if node.op == "get_attr" and str(node.target) in edit.program.roles]
    names = {str(node.target): None for node in tensors if node not in read_on}
    return [name for name in names if all(user in region for user in edit.readers(name))]


def _name(edit: Edit, site: Alike, region: dict[fx.Node, None], shape: torch.Size) -> str:
    """The name of the base weight that it takes the place of, then of an inserted tensor, then a new one.

    A base weight of that shape that is free, and the only one there: of several (a weight norm's direction and length)
    none holds the value.
    """
    learned, roles = added(edit.program), edit.program.roles
    read = {str(node.target): node for node in region if node.op == "get_attr" and str(node.target) in roles}
    free = _free(edit, site, region)
    base = [name for name in read if name not in learned and roles[name] != "constant"]
    fits = [name for name in base if name in free and read[name].meta["val"].shape == shape]
    names = (fits if len(base) == 1 else []) + [name for name in free if name in learned]
    return names[0] if names else f"{next(iter(read))}_folded_{site.nodes[0].name}"


def _tied(edit: Edit, name: str, region: dict[fx.Node, None]) -> list[str]:
    """The names that change together: all of the tensor's, unless something else reads it under another one."""
    names = edit.aliases(name)
    return names if all(user in region for alias in names for user in edit.readers(alias)) else [name]
