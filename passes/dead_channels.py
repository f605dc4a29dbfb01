"""Remove channels that compute nothing: the same function from smaller tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..base import Pass, Promise, option
from ..channels.axes import Axes
from ..channels.grouped import is_grouped
from ..channels.groups import zeros_left
from ..channels.plan import Plan, proven
from ..channels.removal import Widths
from ..channels.table import RULES
from ..deferred.programs import has_zeros, is_deferring
from ..graph.edit import Edit
from ..graph.facts import Removed
from ..graph.program import Program
from ..graph.selection import Selection


@dataclass(frozen=True)
class DeadChannels(Pass):
    """Remove channels that compute nothing: the same function from smaller tensors.

    Before: ``y = V f(U x)``, a row of U or a column of V zero
    After: the same with smaller U and V; what a constant channel contributed is in the next bias

    An axis analysis over the operators says which channels of which tensors stay or go together, and operators it
    does not know pin what they touch. A channel goes when it is constant or nothing needs it: hidden units, heads,
    channels in heads, convolution channels, ranks of adapters. Experts of a mixture may each have other hidden units:
    the width is the largest that any of them needs. What zeros came from does not matter.

    Keeps: the outputs, up to rounding (sums run over fewer terms). Does nothing to a program without dead channels, nor
    to one in training form, where a recipe names it to say which widths folding is to leave.
    Source: structural pruning as in DepGraph, Fang et al. 2023, arXiv 2301.12900, here with a proof of equality.
    """

    promise: ClassVar[Promise] = Promise.CLOSE
    fixed_point: ClassVar[bool] = True

    round_to: int = option(1, "keep widths multiples of this, for the hardware", least=1)
    keep_at_least: int = option(1, "never fewer channels than this", least=1)
    uniform: bool = option(False, "the same widths in every block, so that an ordinary config can say them")

    def sites(self, program: Program) -> Selection[Plan | str]:
        if program.stage != "eval" or program.device.type == "meta":
            return Selection(())
        # Told before anything is analysed; experts may each have zeros of their own, which no row of all of them shows.
        if is_deferring(program) and not has_zeros(program) and not any(map(is_grouped, program.graph.nodes)):
            return Selection(())
        plan = proven(program, self, Widths(self.round_to, self.keep_at_least, self.uniform))
        return Selection((plan,) if plan.cut else (), plan.missed)

    def rewrite(self, edit: Edit, site: Plan) -> None:
        site.on(edit.program).carry_out(edit)
        for name, kept in site.cut.items():
            sizes = [len(labels) for labels in site.axes.members[name]]
            Removed(name, str(sizes), str([len(part) for part in kept])).note(edit)

    def finish(self, edit: Edit) -> None:
        if not edit.facts:
            return
        for left in zeros_left(Axes(edit.program, RULES)):
            left.note(edit)
