"""Replace every subgraph of tensors alone by the tensor it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ..base import Pass, Promise, Selection
from ..constants import Constants
from ..edit import Edit
from ..foldable import LEARNED
from ..program import Program


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace every subgraph of tensors alone by the tensor it computes.

    Before: ``W_eff = sigmoid(θ) ⊙ W``, ``y = W_eff x``
    After: ``y = W' x``

    Only subgraphs that read something a pass inserted are folded: the base model's own constants (a norm that adds one
    to its weight, say) stay as they are, so that the folded weights still fit the original architecture. Computed in
    the dtype of the graph, on the device of the tensors.

    Keeps: the outputs, bit by bit. Does nothing without inserted tensors.
    Source: constant folding, as in any compiler.
    """

    promise: ClassVar[Promise] = Promise.EXACT

    def sites(self, program: Program) -> Selection:
        learned = frozenset(program.names(*LEARNED))
        constants = Constants(program.root, frozenset(program.roles) - learned)
        roots = [
            node
            for node in program.graph.nodes
            if node.op != "get_attr"
            and (constants.reads(node) or frozenset()) & learned
            and any(constants.reads(user) is None for user in node.users)
        ]
        return Selection(tuple(roots))

    def rewrite(self, edit: Edit, site: Any) -> None:
        region = _region(site)
        value = Constants(edit.program.root).value(site).contiguous()
        name = _name(edit, site, region, value.shape)
        if name in (str(node.target) for node in region):
            edit.set_tensor(name, value)
        else:
            edit.set_tensor(name, value, "adapter")
        site.replace_all_uses_with(edit.tensor(name))
        edit.sweep([site])


def _region(site: fx.Node) -> list[fx.Node]:
    """``site`` and everything it is computed from."""
    seen: dict[fx.Node, None] = {}
    stack = [site]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen[node] = None
            stack.extend(node.all_input_nodes)
    return list(seen)


def _name(edit: Edit, site: fx.Node, region: list[fx.Node], shape: torch.Size) -> str:
    """The name of a base weight of that shape that nothing else reads, then of an inserted tensor, then a new one."""
    inside = set(region)
    free = [node for node in region if node.op == "get_attr" and all(user in inside for user in node.users)]
    roles = edit.program.roles
    base = [str(n.target) for n in free if roles[str(n.target)] not in LEARNED and n.meta["val"].shape == shape]
    learned = [str(n.target) for n in free if roles[str(n.target)] in LEARNED]
    names = base + learned
    return names[0] if names else f"{next(str(n.target) for n in region if n.op == 'get_attr')}_folded_{site.name}"
