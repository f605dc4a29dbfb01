"""Read only the columns that a weight uses: zero columns over a residual stream cost a gather instead of a matmul."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..base import Pass, Promise, option
from ..channels.gather import CPU_COST, Gather, column_dim, gathers, weight_of
from ..deferred.programs import is_deferring
from ..graph.edit import Edit
from ..graph.facts import Gathered
from ..graph.program import Program
from ..graph.selection import Selection
from ..graph.site import module_path

aten = torch.ops.aten


@dataclass(frozen=True)
class GatherColumns(Pass):
    """Read only the columns that a weight uses.

    Before: ``y = W x``, columns of W zero where x has channels that others need
    After: ``y = W[:, kept] x[..., kept]``; weights that use the same columns of x share one gather

    Linear and addmm nodes, each the only reader of its weight. Only channels that can never be removed are skipped,
    those of a residual stream. Zero columns over removable channels are left to dead-channels: if they are still there
    a width was asked for (``round_to``, ``uniform``), and a gather would undo that behind the user's back.
    A checkpoint cannot hold the result; ``never`` keeps it whole.

    Keeps: the outputs, up to rounding (sums run over fewer terms). Does nothing to a program in training form, or
    where no column is zero, or (``auto``) where the gather costs more than the multiply-adds it saves.
    Source: column sparsity as a smaller dense product; the costs are measured (``benchmarks/gather.py``).
    """

    promise: ClassVar[Promise] = Promise.CLOSE

    when: Literal["auto", "always", "never"] = option("auto", "gather where it pays, wherever it can be done, or never")
    cost: float = option(
        CPU_COST, "of a gathered element, in multiply-adds: about 275 on a CPU, 2000 on a GPU", least=0
    )
    round_to: int = option(1, "gather a multiple of this many columns, for the hardware", least=1)

    def sites(self, program: Program) -> Selection[Gather]:
        if self.when == "never" or program.stage != "eval" or program.device.type == "meta" or is_deferring(program):
            return Selection(())  # of weights that are computed later, into a checkpoint, which has no gathers
        found = gathers(program, self.round_to)
        taken = found if self.when == "always" else [gather for gather in found if gather.pays(self.cost)]
        return Selection(tuple(taken))

    def rewrite(self, edit: Edit, site: Gather) -> None:
        first, index = site.uses[0], torch.tensor(site.kept)
        name = edit.constant(f"{module_path(first, 'gathered')}.columns", index)
        columns = edit.tensor(name)
        with edit.before(first):
            chosen = edit.call(aten.index_select.default, site.value, -1, columns)
        for use in site.uses:
            edit.feed(use, site.value, chosen)
            weight, dim = weight_of(use), column_dim(use)
            old = edit.program.tensor(weight).detach()
            edit.set_tensor(weight, old.index_select(dim, index.to(old.device)).contiguous())
            Gathered(weight, dim, old.shape[dim], len(site.kept)).note(edit)
