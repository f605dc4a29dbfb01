"""What is removed from a program: found by the analysis, tried on the example inputs, then carried out."""

from __future__ import annotations

import copy
import dataclasses
import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..base import Pass
from ..deferred.programs import is_deferring
from ..deferred.running import difference_by_block
from ..deferred.tensor import value as values_of
from ..errors import OperatorError, first_line
from ..graph.constants import Constants
from ..graph.edit import Edit
from ..graph.program import Program
from ..graph.selection import Miss
from ..graph.site import WEIGHT_OPS, module_path
from .axes import Axes
from .axis import axis_of
from .constant import ConstantChannels, operands
from .experts import Order, ordered, reordered
from .needed import grown, needed_channels
from .removal import Removal, Widths
from .resize import resize
from .rules import CONVOLUTIONS, LINEARS
from .table import RULES
from .trial import alike, equal, first_difference

aten = torch.ops.aten
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is removed from one program.

    Attributes:
        axes, facts: the analysis
        removal: which channels stay
        orders: how experts' units are reordered before that
        cut: for each tensor that shrinks, the indices that stay along each of its dimensions
        missed: what the trial refuted: operators whose channels stay, or all tensors
    """

    axes: Axes
    facts: ConstantChannels
    removal: Removal
    orders: list[Order]
    cut: dict[str, list[Tensor]]
    missed: tuple[Miss[str], ...] = ()

    def __str__(self) -> str:
        return f"{len(self.cut)} tensors"

    def on(self, twin: Program) -> Plan:
        """The same plan for a copy of its program."""
        if twin is self.axes.program:
            return self
        nodes = dict(zip(self.axes.program.graph.nodes, twin.graph.nodes, strict=True))
        axes, facts = copy.copy(self.axes), copy.copy(self.facts)
        axes.program, facts.axes, facts.constants = twin, axes, Constants(twin.root)
        axes.known = {nodes[node]: known for node, known in self.axes.known.items()}
        facts.known = {nodes[node]: known for node, known in self.facts.known.items()}
        return dataclasses.replace(self, axes=axes, facts=facts)

    def carry_out(self, edit: Edit) -> None:
        """Remove what the plan says from the program it was made for."""
        edit.values.learn(edit.program.graph)  # what does not change need not be recomputed
        for node in list(edit.program.graph.nodes):
            idle = self._is_idle(edit, node)
            if node.target in LINEARS:
                _absorb(edit, self, node, idle)
            if idle:
                _silence(edit, node)
        done: dict[int, nn.Parameter] = {}
        for name, kept in self.cut.items():
            value = edit.program.tensor(name)
            if id(value) not in done:
                done[id(value)] = _cut(reordered(self.orders, name, value), kept)
            new = done[id(value)]
            for alias in edit.aliases(name):
                edit.set_tensor(alias, new)
        resize(edit, self.axes, self.removal)

    def _is_idle(self, edit: Edit, node: fx.Node) -> bool:
        """Whether a weight operator can do without all it reads, and nothing else reads its weight, which is cut.

        One channel stays so that there is a width, and of one channel the analysis knows no axis any more: with a
        weight of zeros the operator is still seen to give one vector.
        """
        free = self.facts.free(node) if node.target in (*LINEARS, *CONVOLUTIONS) else None
        if free is None or not free.all():
            return False
        weight = _weight(node)
        alone = weight.op == "get_attr" and [*weight.users] == [node]
        return alone and edit.aliases(str(weight.target)) == [str(weight.target)] and str(weight.target) in self.cut


def proven(program: Program, step: Pass, widths: Widths) -> Plan:
    """What ``step`` can remove from ``program``, tried on its example inputs first.

    An operator that turns out not to do what its rule says keeps all it touches: its rule has a bug. Where weights are
    computed later, each block is tried on the values that reach it; if one differs, nothing is removed. Either becomes
    a miss of the plan, and a warning.
    """
    distrusted: dict[str, str] = {}
    while True:
        plan = argued(program, widths, distrusted)
        flaw = _flaw(program, step, plan) if plan.cut else None
        missed = tuple(
            Miss(name, f"{why}: its channels stay; please report this model") for name, why in distrusted.items()
        )
        if flaw is None:
            return dataclasses.replace(plan, missed=missed)
        if not flaw.operator or flaw.operator in distrusted:
            why = f"the removal of channels does not hold: {flaw.why}; nothing is removed"
            _log.warning("%s", why)
            return dataclasses.replace(plan, cut={}, missed=(*missed, *(Miss(name, why) for name in plan.cut)))
        _log.warning("%s does not do what its rule says: its channels stay; please report this model", flaw.operator)
        distrusted[flaw.operator] = "its rule did not hold on the example inputs"


def argued(program: Program, widths: Widths, distrusted: dict[str, str] | None = None) -> Plan:
    """What the analysis alone says can be removed."""
    axes = Axes(program, RULES, distrusted)
    facts = ConstantChannels(axes)
    need, orders = ordered(axes, facts, needed_channels(axes, facts))
    removal = Removal(axes, need, widths)
    while not orders:  # what experts put in another order is needed at other places than their weights say
        kept = removal.stays(np.arange(axes.count))
        wanted = need.copy()
        wanted[axes.channel[kept]] = True
        # What stays only to keep a width is computed as before too.
        wanted = grown(axes, facts, wanted, list(program.graph.nodes))
        if np.array_equal(wanted, need):
            break
        need = wanted
        removal = Removal(axes, need, widths)
    orders = [order for order in orders if not removal.stays(order.units).all()]
    cut = {}
    for name, dims in axes.members.items():
        # A dimension of size 1 is broadcast, not a channel.
        kept = [torch.from_numpy(np.flatnonzero(removal.stays(d) if d.size > 1 else d == d)) for d in dims]
        if any(len(part) < len(labels) for part, labels in zip(kept, dims, strict=True)):
            cut[name] = kept
    return Plan(axes, facts, removal, orders, cut)


class _Flaw(NamedTuple):
    """What a trial refuted, and the operator responsible, if there is one."""

    operator: str
    why: str


def _flaw(program: Program, step: Pass, plan: Plan) -> _Flaw | None:
    """What is wrong with the program once the plan is carried out; None when it gives what it gave."""
    trial = program.copy()
    why = "the outputs differ on the example inputs"
    try:
        plan.on(trial).carry_out(Edit(trial, step))
        if is_deferring(program):
            place = difference_by_block(program, trial, equal)
            return _Flaw("", f"{place} is another on the example inputs") if place else None
        if alike(program, trial):
            return None
    except OperatorError as error:
        return _Flaw(error.node, str(error))
    except Exception as error:
        why = f"it cannot be carried out ({type(error).__name__}: {first_line(error)})"
        if is_deferring(program):  # its operators cannot be run one by one: all weights would be in memory
            return _Flaw("", why)
    return _Flaw(first_difference(program, trial, plan.axes, plan.removal) or "", why)


def _cut(value: Tensor, kept: list[Tensor]) -> nn.Parameter:
    result = value.detach()
    for dim, part in enumerate(kept):
        if len(part) < result.shape[dim]:
            result = result.index_select(dim, part.to(result.device))
    return nn.Parameter(result.contiguous(), requires_grad=False)


def _weight(node: fx.Node) -> Any:
    """The weight of a linear layer or a convolution."""
    return operands(node)[1] if node.target in LINEARS else node.args[1]


def _silence(edit: Edit, node: fx.Node) -> None:
    """Replace a weight operator's weight by zeros."""
    name = str(_weight(node).target)
    zeros = torch.zeros_like(edit.program.tensor(name))
    edit.set_tensor(name, nn.Parameter(zeros, requires_grad=False))


def _absorb(edit: Edit, plan: Plan, node: fx.Node, every: bool) -> None:
    """Add the contribution of removed constant channels to the bias of the operator that reads them; with ``every``, of
    all constant channels."""
    value, weight, bias = operands(node)
    last = value.meta["val"].dim() - 1
    labels, known = axis_of(plan.axes.axes(value), last), axis_of(plan.facts.of(value), last)
    if labels is None or known is None or not plan.facts.absorbs(node):
        return
    lost = (every | ~plan.removal.stays(labels.data)) & ~np.isnan(known.data) & (known.data != 0)
    matrix = plan.facts.weight(weight) if lost.any() else None
    if matrix is None:
        return
    use = WEIGHT_OPS[node.target]
    read = torch.from_numpy(np.flatnonzero(lost)).to(matrix.device)
    share = values_of(use.matrix(matrix).index_select(1, read)) @ torch.tensor(known.data[lost]).to(matrix.device)
    if not share.any():
        return
    old = plan.facts.weight(bias) if bias is not None else torch.zeros_like(share)
    assert old is not None, "a bias that is computed from inputs has no rule"
    like = edit.program.tensor(str(weight.target)) if weight.op == "get_attr" else weight.meta["val"]
    name = edit.add_tensor(
        f"{module_path(node, 'folded')}.bias_with_constants", (values_of(old) + share).to(like.dtype), "base"
    )
    place = use.bias
    assert place is not None, "an embedding absorbs nothing"
    node.args = (*node.args, *[None] * (place + 1 - len(node.args)))
    node.update_arg(place, edit.tensor(name))
    out = axis_of(plan.axes.axes(node), node.meta["val"].dim() - 1)
    if out is not None:
        kept = torch.from_numpy(np.flatnonzero(plan.removal.stays(out.data)))
        edit.set_tensor(name, _cut(edit.program.tensor(name), [kept]))
