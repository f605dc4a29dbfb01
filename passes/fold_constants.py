"""Replace every subgraph of tensors alone by the tensor it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ..base import Pass, Promise, Selection
from ..edit import Edit
from ..program import Program

_LEARNED = ("adapter", "gate", "statistic")


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
        constant: dict[fx.Node, set[str]] = {}
        for node in program.graph.nodes:
            if node.op == "get_attr" and str(node.target) in program.roles:
                constant[node] = {str(node.target)}
            elif _is_pure(node) and node.all_input_nodes and all(n in constant for n in node.all_input_nodes):
                constant[node] = set().union(*(constant[n] for n in node.all_input_nodes))
        learned = set(program.names(*_LEARNED))
        roots = [
            node
            for node, reads in constant.items()
            if node.op != "get_attr" and reads & learned and any(user not in constant for user in node.users)
        ]
        return Selection(tuple(roots))  # type: ignore[arg-type]

    def rewrite(self, edit: Edit, site: Any) -> None:
        region = _region(site)
        value = _value(edit, site)
        name = _name(edit, site, region, value.shape)
        if name in (str(node.target) for node in region):
            edit.set_tensor(name, value)
        else:
            edit.set_tensor(name, value, "adapter")
        site.replace_all_uses_with(edit.tensor(name))
        edit.program.graph.eliminate_dead_code()


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not random and not node.target._schema.is_mutable


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


def _value(edit: Edit, site: fx.Node) -> torch.Tensor:
    def read(node: fx.Node) -> torch.Tensor:
        return edit.program.tensor(str(node.target)) if node.op == "get_attr" else _value(edit, node)

    args, kwargs = fx.map_arg((site.args, site.kwargs), read)
    with torch.no_grad():
        return site.target(*args, **kwargs).contiguous()  # type: ignore[operator]


def _name(edit: Edit, site: fx.Node, region: list[fx.Node], shape: torch.Size) -> str:
    """The name of a base weight of that shape that nothing else reads, then of an inserted tensor, then a new one."""
    inside = set(region)
    free = [node for node in region if node.op == "get_attr" and all(user in inside for user in node.users)]
    roles = edit.program.roles
    base = [str(n.target) for n in free if roles[str(n.target)] not in _LEARNED and n.meta["val"].shape == shape]
    learned = [str(n.target) for n in free if roles[str(n.target)] in _LEARNED]
    names = base + learned
    return names[0] if names else f"{next(str(n.target) for n in region if n.op == 'get_attr')}_folded_{site.name}"
