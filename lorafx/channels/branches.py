"""Branches of residual sums that give one constant vector, whatever the input is: what can leave the graph as a whole.

A sum ``x + f(x)`` where every channel of ``f(x)`` is a constant (all heads closed, all neurons, a projection of
zeros) is ``x + c``, and ``x`` where c is 0. Then nothing of f is left except what something else reads: attention
weights that are an output, keys and values that a cache holds.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..base import Pass
from ..errors import first_line
from ..graph.edit import Edit
from ..graph.effects import CACHED, has_effect, sharing
from ..graph.operands import argument, rank_of, same_size, value_of
from ..graph.program import Program
from ..graph.selection import Miss
from ..graph.site import module_path
from ..graph.tree import has_tensor
from .axes import Axes
from .axis import Array
from .constant import ConstantChannels
from .resize import loosen
from .table import RULES
from .trial import alike

aten = torch.ops.aten
_log = logging.getLogger(__name__)

#: Sums, and the argument positions that may hold the constant.
_SUMS: dict[Any, tuple[int, ...]] = {aten.add.Tensor: (1, 0), aten.sub.Tensor: (1,)}


@dataclass(frozen=True, eq=False)
class Branch:
    """An addend of a sum that is one vector at every position, found in one program.

    Attributes:
        total: the name of the sum
        kept: the name of its other addend
        module: the path of the module that gives the vector
        vector: what is added to ``kept``, in fp64 and with a dimension for each of the sum's
        operators: how many operators this branch alone needs
        cast: whether the sum has another dtype than ``kept``
        returned: whether the caller of the model gets the sum itself, or a view of it
    """

    total: str
    kept: str
    module: str
    vector: Array
    operators: int
    cast: bool
    returned: bool

    def __str__(self) -> str:
        return f"{self.module} ({self.operators} operators)"

    @property
    def is_zero(self) -> bool:
        """Whether nothing is added."""
        return not self.vector.any()

    def carry_out(self, edit: Edit) -> None:
        """Let readers of the sum read the other addend, plus the vector where that is not zero."""
        nodes = {node.name: node for node in edit.program.graph.nodes}
        total, kept = nodes[self.total], nodes[self.kept]
        old = [operand for operand in total.all_input_nodes if operand is not kept]
        with edit.before(total):
            edit.replace(total, self._without(edit, total, kept))
        edit.sweep([total, *old])

    def _without(self, edit: Edit, total: fx.Node, kept: fx.Node) -> fx.Node:
        dtype = value_of(total).dtype
        if not self.is_zero:
            like = value_of(next(value for value in total.all_input_nodes if value is not kept)).dtype
            name = edit.constant(f"{self.module}.constant", torch.tensor(self.vector).to(like))
            return edit.call(aten.add.Tensor, kept, edit.tensor(name))
        if self.cast:
            return edit.call(aten.to.dtype, kept, dtype)
        # A caller that writes into the result must change neither an input nor another output.
        return edit.call(aten.clone.default, kept) if self.returned else kept


def proven(program: Program, step: Pass) -> tuple[tuple[Branch, ...], tuple[Miss[Branch], ...]]:
    """The branches that ``step`` can take out of ``program``, last first, each tried on the example inputs first; and
    those that the analysis named but the trial refuted: then a rule of the analysis has a bug."""
    found = constant_branches(program)
    if not found or _holds(program, step, found):
        return tuple(found), ()
    held: list[Branch] = []
    missed: list[Miss[Branch]] = []
    for branch in found:
        if _holds(program, step, [*held, branch]):
            held.append(branch)
        else:
            why = "it is not constant on the example inputs, so it stays; please report this model"
            _log.warning("%s: %s", branch.module, why)
            missed.append(Miss(branch, why))
    return tuple(held), tuple(missed)


def _holds(program: Program, step: Pass, branches: list[Branch]) -> bool:
    """Whether the program gives what it gave on its example inputs without these branches."""
    trial = program.copy()
    edit = Edit(trial, step)
    try:
        for branch in branches:
            branch.carry_out(edit)
        settle(edit)
        return alike(program, trial)
    except Exception as error:
        _log.warning("%s cannot be taken out: %s: %s", branches[-1], type(error).__name__, first_line(error))
        return False


def settle(edit: Edit) -> None:
    """What is left to do once branches were taken out: readers of what stays take its layout in memory as it is."""
    loosen(edit.program.graph)
    edit.recompute()


def constant_branches(program: Program) -> list[Branch]:
    """What the analysis alone finds in a program in evaluation form, last first; no branches inside a branch that
    goes."""
    if not _may_have(program):
        return []
    axes = Axes(program, RULES)
    facts, gone = ConstantChannels(axes), set[fx.Node]()
    found = []
    for node in reversed(program.graph.nodes):
        if node in gone or node in axes.changing or node.target not in _SUMS:
            continue
        for place in _SUMS[node.target]:
            branch, only = _branch(node, place, facts, gone)
            if branch is not None:
                found.append(branch)
                gone |= only
                break
    return found


def _branch(
    node: fx.Node, place: int, facts: ConstantChannels, gone: set[fx.Node]
) -> tuple[Branch | None, set[fx.Node]]:
    """The branch at one operand of a sum, and the operators that go with it; None where there is none, or it must
    stay."""
    added, kept = node.args[place], node.args[1 - place]
    if not isinstance(added, fx.Node) or not isinstance(kept, fx.Node) or added is kept:
        return None, set()
    if facts.constants.reads(added) is not None or {added, kept} & facts.axes.changing:
        return None, set()
    if not _alike(kept, node):
        return None, set()
    vector = facts.vector(added)
    only = _only(node, added, kept, gone)
    if vector is None or any(CACHED in other.meta for other in only):
        return None, set()
    factor = _factor(node, place)
    wide = factor * vector.reshape((1,) * (rank_of(node) - vector.ndim) + vector.shape)
    value, module = value_of(node), module_path(added, str(added.target))
    if not np.isfinite(torch.tensor(wide).to(value_of(added).dtype).double().numpy()).all():
        return None, set()
    returned = _is_returned(node)
    cast = value_of(kept).dtype != value.dtype
    return Branch(node.name, kept.name, module, wide, len(only), cast, returned), only


def _factor(node: fx.Node, place: int) -> float:
    """The factor of the addend at operand ``place``: ``alpha``, with the sign of a subtraction."""
    sign = -1.0 if node.target is aten.sub.Tensor else 1.0
    alpha = argument(node, "alpha")
    return sign * float(alpha) if place == 1 else 1.0


def _alike(kept: fx.Node, total: fx.Node) -> bool:
    """Whether an addend has the sum's shape, and is added as it is."""
    a, b = kept.meta.get("val"), total.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dim() != b.dim():
        return False
    plain = total.args[0] is kept or argument(total, "alpha") == 1
    return plain and a.is_floating_point() and all(map(same_size, a.shape, b.shape))


def _only(total: fx.Node, added: fx.Node, kept: fx.Node, gone: set[fx.Node]) -> set[fx.Node]:
    """The operators that compute ``added`` and nothing else that is read; they go with it."""
    only = {total}
    stack = [added]
    while stack:
        node = stack.pop()
        idle = node is not kept and all(user in only or user in gone for user in node.users)
        if node not in only and idle and node.op == "call_function" and not has_effect(node):
            only.add(node)
            stack += node.all_input_nodes
    return only


def _is_returned(node: fx.Node) -> bool:
    """Whether the model's caller gets the node's value, or one that shares its memory."""
    stack = [node]
    while stack:
        node = stack.pop()
        if any(user.op == "output" for user in node.users):
            return True
        stack += [user for user in node.users if node in sharing(user)]
    return False


def _may_have(program: Program) -> bool:
    """Whether anything could make all channels of a value constant: a tensor of zeros that is not merely added, or a
    factor 0. Cheaper than the analysis."""
    for node in program.graph.nodes:
        numbers = [given for given in node.args if not isinstance(given, fx.Node)]
        if node.target in (aten.mul.Tensor, aten.mul.Scalar) and 0 in numbers:
            return True
        if node.op == "get_attr" and node.users and has_tensor(program.root, str(node.target)):
            value = program.tensor(str(node.target))
            if value.is_floating_point() and value.dim() and value.numel() and _is_zero(value):
                return True
    return False


def _is_zero(value: Tensor) -> bool:
    # For nearly every tensor, the first number already shows that it is not zero.
    return not bool(value.detach()[(0,) * value.dim()]) and not bool(value.detach().any())
