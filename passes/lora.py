"""Insert a trainable low-rank branch beside each selected weight (LoRA)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..base import Promise, Selection, option
from ..graph.program import Program
from ..graph.site import Site
from ..methods.low_rank import LowRank, pattern_value


@dataclass(frozen=True)
class Lora(LowRank):
    """Insert a trainable low-rank branch beside each selected weight.

    Before: ``y = W x + b``
    After: ``y = W x + b + B (s · A drop(x))`` with ``s = alpha / rank`` (``alpha / √rank`` with rslora)

    A: (rank, in) Kaiming-uniform, B: (out, rank) zero, both fp32. A 3-D stack of matrices (a mixture's experts) becomes
    ``W[e] + s B[e] A[e]`` where its parameter is named (PEFT's ``target_parameters``), never by ``all-linear``; its A
    is (experts · rank, in) with the expert slowest, its B (out, rank · experts) with the expert fastest.

    Keeps: the outputs, bit by bit, since B = 0. Does nothing where no target matches (and says so).
    Source: Hu et al. 2021, arXiv 2106.09685, eq. 3; rslora: Kalajdzievski 2023, arXiv 2312.03732.
    """

    promise: ClassVar[Promise] = Promise.EXACT
    kinds: ClassVar[tuple[str, ...]] = ("linear", "addmm", "embedding", "conv2d", "stack")

    rank: int = option(8, "rank of the update", least=1)
    alpha: float = option(8.0, "scale: the branch is multiplied by alpha / rank", above=0)
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead")
    rank_pattern: dict[str, int] = option({}, "rank of particular modules, by name or regular expression", least=1)
    alpha_pattern: dict[str, float] = option({}, "alpha of particular modules, by name or regular expression", above=0)

    def sites(self, program: Program) -> Selection[Site]:
        selection = super().sites(program)
        for name in () if self.allow_empty else ("rank_pattern", "alpha_pattern"):
            self.check_pattern(name, getattr(self, name), selection)
        return selection

    def rank_of(self, site: Site) -> int:
        return self.checked_rank(int(pattern_value(self.rank_pattern, site.module, self.rank)), site)

    def scale_of(self, site: Site) -> float:
        alpha = pattern_value(self.alpha_pattern, site.module, self.alpha)
        rank = self.rank_of(site)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank
