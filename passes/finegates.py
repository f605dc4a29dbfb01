"""Gate the rows and columns of frozen weights, so that training can close them (FineGates)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from ..base import Method, Promise, option
from ..edit import Edit, aliases
from ..gates import ClampedGaussian, histogram
from ..lowrank import train_in_full
from ..module import MethodState, SiteState
from ..program import Program
from ..schedules import ascend, linear, steps_of
from ..site import Site, is_tensor_node

aten = torch.ops.aten
#: The least initial θ of a gate that is fully open in evaluation (tanh θ = ½), and one for a gate held barely open.
_OPEN, _AJAR = 0.5494, -0.5


@dataclass(frozen=True)
class Finegates(Method):
    """Gate the rows and columns of frozen weights, so that training can close them (FineGates).

    Before: ``y = W x + b`` (with whatever earlier passes put beside W)
    After: ``y = g_r ⊙ (W (g_c ⊙ x) + b)``, ``g_c`` (in) and ``g_r`` (out) clamped Gaussian gates of parameters θ

    What drives gates to close is ``mode``: ``achieved`` steers with the share of weights that are really kept (open
    rows times open columns), a multiplier ascending until it meets ``budget``, which comes down from 1 over the first
    ``ramp`` of the steps; ``target`` is the authors' surrogate, ``strength`` times the mean over sites of
    ``½(|mean q_r - k| + |mean q_c - k|)`` with ``q = Φ((tanh θ + ½)/½)`` and ``k = 1 - target``; ``penalty`` is
    ``strength`` times the mean of ``Φ((tanh θ + ½)/noise)``. The last open gate of a site's side never closes.

    Keeps: the outputs, bit by bit, since every gate starts at 1. Does nothing where no target matches (and says so).
    Source: FineGates, arXiv 2412.12951 (gates, θ ~ N(1, 0.1²), noise 0.1) and its 2026 code (``target``: 50, 0.4);
    penalty: Yamada et al. 2020, arXiv 1810.04247. ``achieved``, its ``budget``, ``ramp`` and rates are this library's,
    as is the lower end of the initial θ, without which some gates would start below 1.
    """

    promise: ClassVar[Promise] = Promise.EXACT

    mode: Literal["achieved", "target", "penalty"] = option("achieved", "what drives gates to close")
    budget: float = option(0.6, "share of the gated weights to keep (achieved)")
    target: float = option(0.4, "share of gates to close (target)")
    strength: float = option(50.0, "weight of the loss term (target, penalty)")
    ramp: float = option(0.6, "share of the steps over which the budget comes down (achieved)")
    multiplier_rate: float = option(1.0, "step of the multiplier (achieved)")
    noise: float = option(0.1, "standard deviation of the gates' noise")
    initial: float = option(1.0, "mean of the initial θ")
    deviation: float = option(0.1, "standard deviation of the initial θ")
    gate_rate: float = option(2e-2, "learning rate of the gates")
    train_biases: bool = option(True, "train the biases of gated weights")
    trainable: tuple[str, ...] = option(("auto",), "modules that train in full; auto: a classification head")

    def refuse(self, program: Program, site: Site) -> str | None:
        if site.block is None:
            return "outside the blocks"
        if len(aliases(program.root, site.parameter)) > 1:
            return "tied weight"
        return super().refuse(program, site)

    def rewrite(self, edit: Edit, site: Site) -> None:
        edit.statistic("multiplier", torch.zeros(()))
        with edit.before(site.node):
            gated = self._gated(edit, site, "gate_in", site.input, site.in_features)
            edit.replace_input(site, gated)
        result = edit.output(site)
        with edit.after(result):
            edit.replace(result, self._gated(edit, site, "gate_out", result, site.out_features))
        bias = site.node.args[site.op.bias] if site.op.bias is not None and len(site.node.args) > site.op.bias else None
        if self.train_biases and is_tensor_node(bias):
            edit.train_tensor(str(bias.target))  # type: ignore[union-attr]

    def _gated(self, edit: Edit, site: Site, short: str, value: fx.Node, size: int) -> fx.Node:
        theta = edit.parameter(site, short, (size,), self._start, "gate")
        gate = ClampedGaussian.insert(edit, theta, self.noise)
        return edit.call(aten.mul.Tensor, value, edit.cast(gate, value.meta["val"].dtype))

    def _start(self, theta: Tensor) -> None:
        nn.init.normal_(theta, self.initial, self.deviation).clamp_(min=_OPEN)

    def finish(self, edit: Edit) -> None:
        train_in_full(edit, self.trainable)

    def penalty(self, state: MethodState) -> Tensor:
        if self.mode == "achieved":
            return state.shared["multiplier"].detach() * _share(state, _surrogate)
        if self.mode == "target":
            keep = 1 - self.target
            terms = [_surrogate(theta).mean() - keep for site in state.sites for theta in _gates(site)]
            return self.strength * torch.stack(terms).abs().mean()
        every = torch.cat([theta for site in state.sites for theta in _gates(site)])
        return self.strength * ClampedGaussian.open_probability(every, self.noise).mean()

    def after_step(self, state: MethodState) -> None:
        for theta in (theta for site in state.sites for theta in _gates(site)):
            if bool((ClampedGaussian.median(theta) == 0).all()):
                theta[theta.argmax()] = _AJAR
        if self.mode == "achieved":
            end = max(1, steps_of(self.ramp, state.planned_steps))
            allowed = linear(state.step, 0, end, 1.0, self.budget)
            ascend(state.shared["multiplier"], kept_share(state) - allowed, self.multiplier_rate)

    def optimiser(self) -> Mapping[str, Mapping[str, float]]:
        settings = {"lr": self.gate_rate, "weight_decay": 0.0}
        return {"gate_in": settings, "gate_out": settings}

    def describe(self, state: MethodState) -> Mapping[str, Any]:
        gates = {key: torch.cat([ClampedGaussian.median(site[key]) for site in state.sites]) for key in _SIDES}
        every = torch.cat(list(gates.values()))
        total = {"gates": every.numel(), "weights kept": float(kept_share(state)), **histogram(every)}
        return {"Gates": [total], "Open gates by module": [_open(site) for site in state.sites]}


_SIDES = ("gate_in", "gate_out")


def _gates(site: SiteState) -> tuple[Tensor, Tensor]:
    return site["gate_in"], site["gate_out"]


def _surrogate(theta: Tensor) -> Tensor:
    """``q = Φ((tanh θ + ½)/½)``: wide enough that fully open gates have a gradient."""
    return ClampedGaussian.open_probability(theta, 0.5)


def _share(state: MethodState, openness: Any) -> Tensor:
    """The kept share of all gated weights: open rows times open columns, by a measure of openness."""
    kept = [openness(columns).sum() * openness(rows).sum() for columns, rows in map(_gates, state.sites)]
    return torch.stack(kept).sum() / sum(columns.numel() * rows.numel() for columns, rows in map(_gates, state.sites))


def kept_share(state: MethodState) -> Tensor:
    """The share of the gated weights in open rows and open columns, as evaluation sees them."""
    return _share(state, lambda theta: (ClampedGaussian.median(theta) > 0).float())


def _open(site: SiteState) -> dict[str, Any]:
    counts = {side: int((ClampedGaussian.median(site[side]) > 0).sum()) for side in _SIDES}
    rows, columns = counts["gate_out"], counts["gate_in"]
    total = site["gate_out"].numel() * site["gate_in"].numel()
    return {"module": site.module, "rows": rows, "columns": columns, "weights kept": rows * columns / total}
