"""Close the neurons and heads that contribute least on real texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import option
from ..channels.units import Units
from ..graph.program import Program
from ..methods.activations import input_power
from ..methods.close_units import CloseUnits


@dataclass(frozen=True)
class Activation(CloseUnits):
    """Close the neurons and heads that contribute least on real texts.

    Before: a weight that reads n units
    After: the same with zeros where it reads the units of lowest ``Σ_j mean(x_j²) ‖W_:j‖²``, over a unit's channels j

    Keeps: the shapes of the outputs. Does nothing where no unit can be removed.
    Source: activation times weight norm, Wanda, Sun et al. 2023, arXiv 2306.11695, eq. 1, summed over a unit.
    """

    data: str | None = option(None, "texts to measure on: a csv, jsonl or txt file", unset="the example inputs")
    text: str = option("text", "column of the text")
    samples: int = option(64, "how many texts", least=1)
    max_length: int = option(128, "tokens kept of a text", least=1)

    def importance(self, program: Program, units: tuple[Units, ...]) -> Mapping[str, Tensor]:
        sites = [unit.site for unit in units]
        power = input_power(program, sites, self.data, self.text, self.samples, self.max_length)
        result = {}
        for unit in units:
            weight = program.tensor(unit.site.parameter).detach().double()
            columns = unit.site.op.matrix(weight).square().sum(0)
            share = power[unit.site.parameter].to(columns.device) * columns
            sums = torch.zeros(len(unit.costs), dtype=torch.float64, device=columns.device)
            result[unit.module] = sums.index_add_(0, torch.from_numpy(unit.of).to(columns.device), share).cpu()
        return result
