"""Closing units without training: by an importance, the least important first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base import Promise, SitePass, option
from ..channels.units import RemovableUnits, Units, units_of
from ..graph.edit import Edit
from ..graph.program import Program
from ..graph.selection import Selection
from ..graph.site import Site
from .masks import dropped, lowest


@dataclass(frozen=True)
class CloseUnits(SitePass):
    """Base of the passes that close neurons and heads by an importance; subclasses define :meth:`importance`.

    A unit is closed by zeros in the columns that read it; the folding passes remove it.
    """

    promise: ClassVar[Promise] = Promise.SHAPES

    keep: float = option(0.7, "share of the units of each weight to keep", above=0, most=1)

    def importance(self, program: Program, units: tuple[Units, ...]) -> Mapping[str, Tensor]:
        """For each module, the importance of the units it reads: (units,)."""
        raise TypeError(f"{self.pass_name()} does not say what is important: define importance()")

    def sites(self, program: Program) -> Selection[Site | Units]:
        found = self.uses(program)
        if not found.taken:
            return found
        analysis = RemovableUnits(program, found.taken)
        return units_of(found, lambda site: self._reason(program, analysis.find(site)))

    def _reason(self, program: Program, units: Units | str) -> Units | str:
        if isinstance(units, str):
            return f"closed where its result is read: {units}"
        count = dropped(1 - self.keep, len(units.costs))
        return units if _closed(program, units) < count else f"{count} of its units are closed already"

    def rewrite(self, edit: Edit, site: Any) -> None:
        """Do nothing yet: the importances of all sites are measured together, in :meth:`finish`."""

    def finish(self, edit: Edit) -> None:
        units = tuple(unit for unit in self.sites(edit.program).taken if isinstance(unit, Units))
        importance = self.importance(edit.program, units)
        for unit in units:
            score = importance[unit.module]
            closed = lowest(score, dropped(1 - self.keep, len(score)))
            _close(edit, unit, closed[torch.from_numpy(unit.of)])


def _closed(program: Program, units: Units) -> int:
    """How many units are no longer read."""
    value = program.tensor(units.site.parameter).detach()
    if value.is_meta:
        return 0
    read = units.site.op.matrix(value).ne(0).any(0).cpu().double()
    return int((torch.bincount(torch.from_numpy(units.of), read) == 0).sum())


def _close(edit: Edit, unit: Units, columns: Tensor) -> None:
    value = edit.program.tensor(unit.site.parameter).detach()
    closed = unit.site.op.matrix(value).masked_fill(columns.to(value.device), 0.0)
    edit.set_tensor(unit.site.parameter, unit.site.op.stored(closed, value.shape).contiguous())
