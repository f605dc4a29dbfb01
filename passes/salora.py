"""Insert low-rank branches whose ranks are found by L0 gates (SaLoRA, structure-aware)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from ..base import Promise, option
from ..graph.edit import Edit
from ..graph.site import Site
from ..graph.state import MethodState, SiteState
from ..methods.gates import HardConcrete, histogram
from ..methods.low_rank import LowRank
from ..methods.steering import Steering


@dataclass(frozen=True)
class SaLoRA(LowRank):
    """Insert low-rank branches whose ranks are found by L0 gates (SaLoRA, structure-aware).

    Before: ``y = W x + b``
    After: ``y = W x + b + B (s · g ⊙ A drop(x))``, one hard-concrete gate ``g_i`` a rank, ``s = alpha / rank``; in a
    stack of matrices (a mixture's experts) each has its ranks and gates

    The gate stands where the singular value would: the loss gets ``orthogonality`` times the mean over sites of
    ``‖AAᵀ - I‖² + ‖BᵀB - I‖²`` over the open ranks. The share of open ranks is brought to ``density`` by ``λ (E0/N -
    density)``, E0 the expected number of open ranks, whose multiplier λ ascends after each step (``lagrangian``), or by
    ``weight · (E0 - density · N)²`` (``penalty``). λ watches the share that evaluation sees open (``achieved``) or
    E0/N (``expected``, as published), against a density that comes down from 1 over the first ``ramp`` of the steps;
    with ``achieved`` the ranks that closed last are held open where too many did.

    Keeps: the outputs, bit by bit, since B = 0. Does nothing where no target matches (and says so).
    Source: SaLoRA, Mathematics 2023, 11(20):4317 (form of gates, orthogonality and penalty; its constants could not be
    read); gates: Louizos et al. 2018, arXiv 1712.01312, with the constants of its code; lagrangian: Gallego-Posada et
    al. 2022, arXiv 2208.04425, which is ``steer = "expected"``, ``multiplier_rate = 0.05``, ``ramp = 0`` and
    ``restart = false``. The defaults of these four are this library's, as are the floor, ``density``, ``initial``,
    ``orthogonality`` and the gates' rate: with E0 alone, mostly closed gates count as half open, and too many close.
    """

    promise: ClassVar[Promise] = Promise.EXACT
    kinds: ClassVar[tuple[str, ...]] = ("linear", "addmm", "stack")

    rank: int = option(16, "rank before gates close", least=1)
    alpha: float = option(16.0, "scale: the branch is multiplied by alpha / rank, whatever gates close", above=0)
    density: float = option(0.5, "share of ranks to keep open", above=0, most=1)
    constraint: Literal["lagrangian", "penalty"] = option("lagrangian", "how the share is reached")
    weight: float = option(1e-3, "weight of the quadratic penalty on the number of open ranks", least=0)
    steer: Literal["achieved", "expected"] = option("achieved", "the share of open ranks that the multiplier watches")
    ramp: float = option(0.6, "share of the steps over which the density comes down from 1; 0 starts at it", least=0)
    multiplier_rate: float = option(0.5, "step of the multiplier", above=0)
    restart: bool = option(True, "set the multiplier to 0 when the constraint holds")
    orthogonality: float = option(0.1, "weight of the orthogonality of A and B", least=0)
    initial: float = option(
        1.0, "initial log alpha of the gates; 1.0 is open", above=HardConcrete.CLOSED, most=math.log(100)
    )
    gate_rate: float = option(0.2, "learning rate of the gates", least=0)

    def rank_of(self, site: Site) -> int:
        return self.checked_rank(self.rank, site)

    def scale_of(self, site: Site) -> float:
        return self.alpha / self.rank_of(site)

    def each_rank(self, edit: Edit, site: Site, ranks: int) -> fx.Node:
        edit.statistic("multiplier", torch.zeros(()))
        log_alpha = edit.parameter(site, "lora_gate", (ranks,), lambda value: value.fill_(self.initial), "gate")
        return HardConcrete.insert(edit, log_alpha)

    def penalty(self, state: MethodState) -> Tensor:
        terms = [_orthogonality(site) for site in state.sites]
        total = self.orthogonality * torch.stack(terms).mean()
        expected, count = _expected(state)
        if self.constraint == "penalty":
            return total + self.weight * (expected - self.density * count) ** 2
        return total + state.shared["multiplier"].detach() * (expected / count - self.density)

    def after_step(self, state: MethodState) -> None:
        for gate in _gates(state):
            gate.clamp_(-math.log(100), math.log(100))
        if self.constraint == "lagrangian":
            achieved = self.steer == "achieved"
            self._steering(state, achieved).step(self.multiplier_rate, restart=self.restart, floor=achieved)

    def _steering(self, state: MethodState, achieved: bool) -> Steering:
        share = partial(open_share if achieved else _expected_share, state)
        return Steering(state, HardConcrete, _gates(state), share, self.density, self.ramp)

    def settled(self, state: MethodState) -> bool:
        return self.constraint == "penalty" or self._steering(state, self.steer == "achieved").settled

    def conclude(self, state: MethodState) -> None:
        if not self.settled(state):
            self._steering(state, achieved=True).close()  # a gate just closed still counts half in E0

    def optimiser(self) -> Mapping[str, Mapping[str, float]]:
        return {"lora_gate": {"lr": self.gate_rate, "weight_decay": 0.0}}

    def describe(self, state: MethodState) -> Mapping[str, Any]:
        gates = [HardConcrete.median(gate) for gate in _gates(state)]
        found = torch.cat(gates)
        share = {"gates": found.numel(), "open": float((found > 0).float().mean())}
        rows = [
            {"module": site.module, "rank": int((gate > 0).sum()), "of": gate.numel()}
            for site, gate in zip(state.sites, gates, strict=True)
        ]
        return {"Open ranks": [{**share, **histogram(found)}], "Rank by module": rows}


def _gates(state: MethodState) -> list[Tensor]:
    return [site["lora_gate"] for site in state.sites]


def _expected(state: MethodState) -> tuple[Tensor, int]:
    """The expected number of open ranks, and how many there are."""
    gates = torch.cat(_gates(state))
    return HardConcrete.expected_open(gates).sum(), gates.numel()


def _expected_share(state: MethodState) -> float:
    expected, count = _expected(state)
    return float(expected) / count


def open_share(state: MethodState) -> float:
    """The share of ranks that are open in evaluation."""
    gates = torch.cat(_gates(state))
    return float(HardConcrete.is_open(gates).float().mean())


def _orthogonality(site: SiteState) -> Tensor:
    a, b = site.factors()
    is_open = (HardConcrete.median(site["lora_gate"].detach()) > 0).to(a.dtype).reshape(a.shape[:2])
    target = torch.diag_embed(is_open)
    a, b = a * is_open[:, :, None], b * is_open[:, None]
    return ((a @ a.mT - target) ** 2).sum() + ((b.mT @ b - target) ** 2).sum()


Salora = SaLoRA  # the name up to version 0.1
