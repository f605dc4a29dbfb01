"""Insert low-rank branches whose ranks grow with depth, and prune A while training (PRILoRA)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..base import Promise, option
from ..graph.edit import Edit
from ..graph.program import Program
from ..graph.site import STACK, Site
from ..graph.state import MethodState, SiteState
from ..methods.input_statistics import measure_input
from ..methods.low_rank import LowRank
from ..methods.masks import check_group, density, lowest_by_group


@dataclass(frozen=True)
class PriLoRA(LowRank):
    """Insert low-rank branches whose ranks grow with depth, and prune A while training.

    Before: ``y = W x + b``
    After: ``y = W x + b + B (s · A drop(x))`` with a rank that goes linearly from ``rank_first`` in the first block to
    ``rank_last`` in the last, rounded half up; a weight outside the blocks counts as one in the last.

    Every ``interval`` steps the entries of A with the lowest ``|A_ij| · n̄_j`` are set to zero, an exact share of each
    group; ``n̄_j`` is the running average (decay ``beta``, fp32, one update an optimiser step) of the norm of input
    feature j over the square root of the unmasked tokens. Zeroed entries may grow again.

    Keeps: the outputs, bit by bit, since B = 0. Does nothing where no target matches (and says so).
    Source: PRILoRA, arXiv 2401.11316: linear ranks, importance from magnitude and input statistic. The paper gives no
    code: ``rank_first``, ``rank_last``, ``scale``, ``beta``, ``interval``, ``fraction``, ``group``, ``regrow`` and
    ``final_prune`` are this library's defaults.
    """

    promise: ClassVar[Promise] = Promise.EXACT
    kinds: ClassVar[tuple[str, ...]] = ("linear", "addmm", "stack")

    rank_first: int = option(4, "rank in the first block", least=1)
    rank_last: int = option(12, "rank in the last block", least=1)
    alpha: float = option(8.0, "scale: the branch is multiplied by alpha over the mean rank", above=0)
    scale: Literal["constant", "per_rank"] = option("constant", "divide alpha by the mean rank, or by each site's own")
    fraction: float = option(0.5, "share of A that pruning sets to zero; 0 prunes nothing", least=0, below=1)
    interval: int = option(40, "optimiser steps between prunings", least=1)
    beta: float = option(0.9, "decay of the input statistic", least=0, below=1)
    group: str = option("row", "prune per row of A, per matrix, or n:m, e.g. 2:4")
    regrow: bool = option(True, "let pruned entries grow again")
    final_prune: bool = option(True, "prune after the last step, so that the stated share is zero at the end")

    @property
    def prunes(self) -> bool:
        return self.fraction > 0

    def rank_of(self, site: Site) -> int:
        first, last = self.rank_first, self.rank_last
        share = 1.0 if site.block is None or site.blocks < 2 else site.block / (site.blocks - 1)
        return self.checked_rank(math.floor(first + share * (last - first) + 0.5), site)

    def scale_of(self, site: Site) -> float:
        mean = (self.rank_first + self.rank_last) / 2
        return self.alpha / (mean if self.scale == "constant" else self.rank_of(site))

    def refuse(self, program: Program, site: Site) -> str | None:
        if self.prunes and site.kind == STACK:
            return "prilora prunes A by the norms of inputs, which differ for each matrix of a stack; set fraction = 0"
        return super().refuse(program, site)

    def rewrite(self, edit: Edit, site: Site) -> None:
        if self.prunes:
            check_group(self.group, site.in_features, f"{self.pass_name()} at {site.module}")
        super().rewrite(edit, site)
        if self.prunes:
            edit.statistic("input_norm", torch.zeros(site.in_features), site)
            edit.statistic("pruned", torch.zeros(self.rank_of(site), site.in_features, dtype=torch.bool), site)
            with edit.after(site.node):
                measure_input(edit, site)

    def before_step(self, state: MethodState) -> None:
        if not self.prunes:
            return
        for site in state.sites:
            norm = (site["square_sum"] / site["token_count"].clamp(min=1)).sqrt()
            # Chosen where the tensors are: to ask for it here, site by site, would wait for the device each time.
            seen, mixed = site["input_norm"].any(), torch.lerp(norm, site["input_norm"], self.beta)
            site["input_norm"].copy_(torch.where(seen, mixed, norm))
            site["square_sum"].zero_()
            site["token_count"].zero_()

    def after_step(self, state: MethodState) -> None:
        if not self.prunes:
            return
        last = self.final_prune and state.step == state.planned_steps
        if last or state.step % self.interval == 0:
            self._prune(state)
        elif not self.regrow:
            for site in state.sites:
                site["lora_A"].masked_fill_(site["pruned"], 0.0)

    def conclude(self, state: MethodState) -> None:
        if self.prunes and self.final_prune:
            self._prune(state)

    def _prune(self, state: MethodState) -> None:
        for site in state.sites:
            site["pruned"].copy_(self.to_prune(site["lora_A"], site["input_norm"]))
            site["lora_A"].masked_fill_(site["pruned"], 0.0)

    def to_prune(self, a: Tensor, input_norm: Tensor) -> Tensor:
        """The mask (rank, in) of the entries of A that count least: ``|A_ij| · n̄_j``."""
        return lowest_by_group(a.detach().float().abs() * input_norm, self.fraction, self.group)

    def describe(self, state: MethodState) -> Mapping[str, Any]:
        return {"Ranks by block": ranks_by_block(state), "Density of A": [_density(site) for site in state.sites]}


def ranks_by_block(state: MethodState) -> list[dict[str, Any]]:
    """One row a block: the ranks of its sites, and their sum."""
    blocks: dict[int | None, list[int]] = {}
    for site in state.sites:
        blocks.setdefault(site.block, []).append(site.factors()[0].shape[1])
    return [
        {"block": "outside" if block is None else block, "ranks": " ".join(map(str, ranks)), "sum": sum(ranks)}
        for block, ranks in blocks.items()
    ]


def _density(site: SiteState) -> dict[str, Any]:
    return {"module": site.module, "rank": site.factors()[0].shape[1], "density": density(site["lora_A"])}


Prilora = PriLoRA  # the name up to version 0.1
