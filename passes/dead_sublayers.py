"""Take sublayers whose output is constant out of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..base import Pass, Promise
from ..channels.branches import Branch, proven, settle
from ..deferred.programs import is_deferring
from ..graph.edit import Edit
from ..graph.facts import TakenOut
from ..graph.program import Program
from ..graph.selection import Selection
from ..graph.tree import named_tensors


@dataclass(frozen=True)
class DeadSublayers(Pass):
    """Take sublayers whose output is constant out of the graph.

    Before: ``y = x + f(x)``, where f gives the same vector c for every x and at every position
    After: ``y = x + c``, or ``y = x`` where c is zero; nothing is left of f but what something else reads

    What made f constant does not matter: all heads closed, all neurons, a projection of zeros, a factor of zero. The
    addition is found, not the architecture. Tensors that only f read stay with a model whose checkpoints have a place
    for them, as small as ``dead-channels`` left them, and go with any other. What a decoder gives to its cache is read.

    Keeps: the outputs, up to rounding (a constant is computed once, in fp64). Does nothing without such a sum, nor to a
    program in training form, nor where weights are computed as they are written, into a checkpoint that has them all.
    Source: constant propagation and dead-code elimination, as in any compiler.
    """

    promise: ClassVar[Promise] = Promise.CLOSE

    def sites(self, program: Program) -> Selection[Branch]:
        if program.stage != "eval" or program.device.type == "meta" or is_deferring(program):
            return Selection(())
        return Selection(*proven(program, self))

    def rewrite(self, edit: Edit, site: Branch) -> None:
        before = _read(edit.program)
        site.carry_out(edit)
        if hasattr(edit.program.source.model, "save_pretrained"):
            for name in before - _read(edit.program):
                edit.program.roles[name] = "unread"
        TakenOut(site.module, site.operators, "nothing" if site.is_zero else "a vector").note(edit)

    def finish(self, edit: Edit) -> None:
        if edit.facts:
            settle(edit)


def _read(program: Program) -> set[str]:
    """Every name of the base's tensors that operators read."""
    held = dict(named_tensors(program.root))
    nodes = program.graph.find_nodes(op="get_attr")
    alive = {id(held[str(node.target)]) for node in nodes if node.users and str(node.target) in held}
    return {name for name, value in held.items() if id(value) in alive and program.roles.get(name) in ("base", "head")}
