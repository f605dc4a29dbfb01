"""Keep low-rank updates sparse, row by row of A and column by column of B, while training (RoseLoRA)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..base import Promise, option
from ..errors import RecipeError, UsageError
from ..graph.edit import Edit
from ..graph.site import Site
from ..graph.state import MethodState, SiteState
from ..methods.low_rank import LowRank
from ..methods.masks import density, highest, kept
from ..methods.schedules import cubic, start_of, steps_of


@dataclass(frozen=True)
class RoseLoRA(LowRank):
    """Keep low-rank updates sparse, row by row of A and column by column of B, while training (RoseLoRA).

    Before: ``y = W x + b``, or with ``adapters = "existing"`` ``y = W x + b + B (s · A x)`` of an earlier pass
    After: ``y = W x + b + B (s · A x)``, at most ``density`` of each row of A and of each column of B not zero

    Importance ``|w · ∂L/∂w|`` is taken before each step and averaged with decay ``beta`` (fp32, the first value is the
    first importance); after the step all but the share τ_t of highest importance is set to zero, ⌈τ_t n⌉ kept exactly.
    τ_t is 1 until ``start``, then falls to ``density`` as a cubic by ``end``. At most ``rank · density²`` of W changes.

    Keeps: the outputs, bit by bit, since B = 0. Does nothing where no target matches (and says so).
    Source: RoseLoRA, arXiv 2406.10777, and its code: ``beta`` 0.8; ``density``, ``start`` and ``end`` as reported for
    it. Its knowledge editing takes 0.05, 3 and 20 of 25 steps, rank 8, alpha 32 and a clamp at 3e-3.
    """

    promise: ClassVar[Promise] = Promise.EXACT
    kinds: ClassVar[tuple[str, ...]] = ("linear", "addmm", "stack")

    rank: int = option(8, "rank of the update", least=1)
    alpha: float = option(32.0, "scale: the branch is multiplied by alpha / rank", above=0)
    adapters: Literal["own", "existing"] = option("own", "insert adapters, or make those of an earlier pass sparse")
    density: float = option(0.1, "share kept of each row of A and each column of B, at the end", above=0, most=1)
    start: float = option(0.1, "when sparsity begins: a share of the steps, or from 1 on a number of them", least=0)
    end: float = option(0.8, "when it is reached: a share of the steps up to 1, above a number of them", above=0)
    beta: float = option(0.8, "decay of the importance", least=0, below=1)
    clamp: float | None = option(None, "hold the entries of A and B within plus and minus this", above=0)

    @property
    def prunes(self) -> bool:
        return True

    def rank_of(self, site: Site) -> int:
        return self.checked_rank(self.rank, site)

    def scale_of(self, site: Site) -> float:
        return self.alpha / self.rank_of(site)

    def rewrite(self, edit: Edit, site: Site) -> None:
        if self.adapters == "own":
            super().rewrite(edit, site)
        else:
            _take_existing(edit, site)
        a, b = (edit.program.tensor(edit.names(site)[short]).shape for short in ("lora_A", "lora_B"))
        edit.statistic("importance_A", torch.zeros(a), site)
        edit.statistic("importance_B", torch.zeros(b), site)

    def before_step(self, state: MethodState) -> None:
        for site in state.sites:
            for factor, importance in _pairs(site):
                now = (factor.detach() * factor.grad).abs().float() if factor.grad is not None else importance
                importance.copy_(now if state.step == 0 else torch.lerp(now, importance, self.beta))

    def after_step(self, state: MethodState) -> None:
        self._hold(state, self.kept_at(state.step, state.planned_steps))

    def settled(self, state: MethodState) -> bool:
        return self.kept_at(state.step, state.planned_steps) == self.density

    def conclude(self, state: MethodState) -> None:
        self._hold(state, self.density)

    def _hold(self, state: MethodState, share: float) -> None:
        for site in state.sites:
            for factor, importance in _pairs(site):
                if self.clamp is not None:
                    factor.clamp_(-self.clamp, self.clamp)
                if share < 1:
                    factor.masked_fill_(~_mask(factor is site["lora_B"], importance, share), 0.0)

    def kept_at(self, step: int, total_steps: int) -> float:
        """τ at a step: 1 until ``start`` (never before step 2, since B = 0 leaves A without gradient), then cubic."""
        start, end = max(2, start_of(self.start, total_steps)), steps_of(self.end, total_steps)
        if end <= start:
            raise UsageError(f"rose-lora: sparsity begins at step {start} and is reached at {end} of {total_steps}")
        return cubic(step, start, end, 1.0, self.density)

    def describe(self, state: MethodState) -> Mapping[str, Any]:
        return {"Sparse factors": [_row(site) for site in state.sites]}


def _take_existing(edit: Edit, site: Site) -> None:
    """Take the factors an earlier pass inserted; RecipeError when there are none, or it prunes them itself."""
    step = edit.earlier(site, "lora_A", "lora_B")
    if step is None:
        raise RecipeError(f"rose-lora: no earlier pass put A and B at {site.module}; set adapters = 'own'")
    if getattr(step, "prunes", False):
        name = step.pass_name()
        raise RecipeError(f"rose-lora and {name} both prune the adapters of {site.module}; set {name}'s fraction to 0")


def _pairs(site: SiteState) -> list[tuple[Tensor, Tensor]]:
    return [(site["lora_A"], site["importance_A"]), (site["lora_B"], site["importance_B"])]


def _mask(by_column: bool, importance: Tensor, share: float) -> Tensor:
    """What to keep: of each row of A, of each column of B."""
    score = importance.T if by_column else importance
    mask = highest(score, kept(share, score.shape[1]))
    return mask.T if by_column else mask


def _row(site: SiteState) -> dict[str, Any]:
    a, b = site.factors()
    changed = density((b != 0).double() @ (a != 0).double())
    return {"module": site.module, "rank": a.shape[1], "A": density(a), "B": density(b), "weights changed": changed}


RoseLora = RoseLoRA  # the name up to version 0.1
