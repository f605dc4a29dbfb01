"""Insert low-rank branches whose ranks are found by L0 gates (SaLoRA, structure-aware)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from ..base import Promise, option
from ..edit import Edit
from ..gates import HardConcrete, histogram, keep_open
from ..lowrank import LowRank
from ..module import MethodState, SiteState
from ..schedules import ascend, linear, steps_of
from ..site import Site


@dataclass(frozen=True)
class Salora(LowRank):
    """Insert low-rank branches whose ranks are found by L0 gates (SaLoRA, structure-aware).

    Before: ``y = W x + b``
    After: ``y = W x + b + B (s · g ⊙ A drop(x))``, one hard-concrete gate ``g_i`` a rank, ``s = alpha / rank``

    The gate stands where the singular value would: the loss gets ``orthogonality`` times the mean over sites of
    ``‖AAᵀ - I‖² + ‖BᵀB - I‖²`` over the open ranks. The share of open ranks is brought to ``density`` by ``λ (E0/N -
    density)``, E0 the expected number of open ranks, whose multiplier λ ascends after each step (``lagrangian``), or by
    ``weight · (E0 - density · N)²`` (``penalty``). λ watches the share that evaluation sees open (``achieved``) or
    E0/N (``expected``, as published), against a density that comes down from 1 over the first ``ramp`` of the steps;
    with ``achieved`` the ranks that closed last are held open where too many did.

    Keeps: the outputs, bit by bit, since B = 0. Does nothing where no target matches (and says so).
    Source: SaLoRA, Mathematics 2023, 11(20):4317 (form of gates, orthogonality and penalty; its constants could not be
    read); gates: Louizos et al. 2018, arXiv 1712.01312, with the constants of its code; lagrangian: Gallego-Posada et
    al. 2022, arXiv 2208.04425. ``density``, ``orthogonality``, ``initial``, ``steer``, ``ramp`` and the two rates are
    this library's: with E0 alone, gates that are mostly closed count as partly open, and too many close.
    """

    promise: ClassVar[Promise] = Promise.EXACT
    kinds: ClassVar[tuple[str, ...]] = ("linear", "addmm")

    rank: int = option(16, "rank before gates close")
    alpha: float = option(16.0, "scale: the branch is multiplied by alpha / rank, whatever gates close")
    density: float = option(0.5, "share of ranks to keep open")
    constraint: Literal["lagrangian", "penalty"] = option("lagrangian", "how the share is reached")
    weight: float = option(1e-3, "weight of the quadratic penalty on the number of open ranks")
    steer: Literal["achieved", "expected"] = option("achieved", "the share of open ranks that the multiplier watches")
    ramp: float = option(0.6, "share of the steps over which the density comes down to its target; 0 starts there")
    multiplier_rate: float = option(0.5, "step of the multiplier")
    restart: bool = option(True, "set the multiplier to 0 when the constraint holds")
    orthogonality: float = option(0.1, "weight of the orthogonality of A and B")
    initial: float = option(1.0, "initial log alpha of the gates; 1.0 is open")
    gate_rate: float = option(0.2, "learning rate of the gates")

    def rank_of(self, site: Site) -> int:
        return self.checked_rank(self.rank, site)

    def scale_of(self, site: Site) -> float:
        return self.alpha / self.rank_of(site)

    def within(self, edit: Edit, site: Site, hidden: fx.Node) -> fx.Node:
        rank = self.rank_of(site)
        edit.statistic("multiplier", torch.zeros(()))
        log_alpha = edit.parameter(site, "lora_gate", (rank,), lambda value: value.fill_(self.initial), "gate")
        return edit.call(torch.ops.aten.mul.Tensor, hidden, HardConcrete.insert(edit, log_alpha))

    def penalty(self, state: MethodState) -> Tensor:
        terms = [_orthogonality(site) for site in state.sites]
        total = self.orthogonality * torch.stack(terms).mean()
        expected, count = _expected(state)
        if self.constraint == "penalty":
            return total + self.weight * (expected - self.density * count) ** 2
        return total + state.shared["multiplier"].detach() * (expected / count - self.density)

    def after_step(self, state: MethodState) -> None:
        for site in state.sites:
            site["lora_gate"].clamp_(-math.log(100), math.log(100))
        if self.constraint == "lagrangian":
            allowed, achieved = self._allowed(state), self.steer == "achieved"
            share = (lambda: open_share(state)) if achieved else (lambda: _expected_share(state))
            ascend(state.shared["multiplier"], share() - allowed, self.multiplier_rate, restart=self.restart)
            if achieved:
                gates = [site["lora_gate"] for site in state.sites]
                keep_open(gates, HardConcrete.is_open, share, allowed, HardConcrete.AJAR)

    def _allowed(self, state: MethodState) -> float:
        if self.ramp == 0:
            return self.density
        return linear(state.step, 0, max(1, steps_of(self.ramp, state.planned_steps)), 1.0, self.density)

    def optimiser(self) -> Mapping[str, Mapping[str, float]]:
        return {"lora_gate": {"lr": self.gate_rate, "weight_decay": 0.0}}

    def describe(self, state: MethodState) -> Mapping[str, Any]:
        gates = [HardConcrete.median(site["lora_gate"]) for site in state.sites]
        found = torch.cat(gates)
        share = {"gates": found.numel(), "open": float((found > 0).float().mean())}
        rows = [
            {"module": site.module, "rank": int((gate > 0).sum()), "of": gate.numel()}
            for site, gate in zip(state.sites, gates, strict=True)
        ]
        return {"Open ranks": [{**share, **histogram(found)}], "Rank by module": rows}


def _expected(state: MethodState) -> tuple[Tensor, int]:
    """The expected number of open ranks, and how many there are."""
    gates = torch.cat([site["lora_gate"] for site in state.sites])
    return HardConcrete.expected_open(gates).sum(), gates.numel()


def _expected_share(state: MethodState) -> float:
    expected, count = _expected(state)
    return float(expected) / count


def open_share(state: MethodState) -> float:
    """The share of ranks that are open in evaluation."""
    gates = torch.cat([site["lora_gate"] for site in state.sites])
    return float(HardConcrete.is_open(gates).float().mean())


def _orthogonality(site: SiteState) -> Tensor:
    is_open = (HardConcrete.median(site["lora_gate"].detach()) > 0).to(site["lora_A"].dtype)
    target = torch.diag(is_open)
    a, b = site["lora_A"] * is_open[:, None], site["lora_B"] * is_open
    return ((a @ a.T - target) ** 2).sum() + ((b.T @ b - target) ** 2).sum()
