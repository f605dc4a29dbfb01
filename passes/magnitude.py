"""Close the neurons and heads whose weights are smallest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..channels.units import Units
from ..graph.program import Program
from ..methods.close_units import CloseUnits


@dataclass(frozen=True)
class Magnitude(CloseUnits):
    """Close the neurons and heads whose weights are smallest.

    Before: a weight that reads n units
    After: the same with zeros where it reads the units of lowest norm, over all selected weights' numbers that go along

    Keeps: the shapes of the outputs. Does nothing where no unit can be removed.
    Source: group magnitude as in DepGraph, Fang et al. 2023, arXiv 2301.12900, section 3.3 (p = 2).
    """

    def importance(self, program: Program, units: tuple[Units, ...]) -> Mapping[str, Tensor]:
        return {unit.module: torch.from_numpy(unit.squares).sqrt() for unit in units}
