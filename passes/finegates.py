"""Gate frozen weights, so that training can close what it does not need (FineGates)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from ..base import Method, Promise, option
from ..channels.costs import Measure, prices
from ..channels.units import RemovableUnits, Units
from ..errors import RecipeError
from ..graph.edit import Edit
from ..graph.program import Program
from ..graph.selection import Selection
from ..graph.site import Site
from ..graph.state import MethodState
from ..graph.tree import ties
from ..methods import gates
from ..methods.gates import ClampedGaussian
from ..methods.low_rank import train_biases, train_in_full
from ..methods.steering import Steering


@dataclass(frozen=True)
class FineGates(Method):
    """Gate frozen weights, so that training can close what it does not need (FineGates).

    Before: ``y = W x + b`` (with whatever earlier passes put beside W)
    After: ``y = g_r ⊙ (W (g_c ⊙ x) + b)``, ``g_c`` (in) and ``g_r`` (out) clamped Gaussian gates of parameters θ

    With ``couple`` what can only be removed together has one gate — a neuron, a head, a key-value group — where its
    channels are read: ``y = W (g ⊙ x) + b``; without, rows and columns have theirs, as in the paper. With ``sublayers``
    one gate more a weight closes all it reads, as in CoFi. What drives gates to close is ``mode``: ``achieved`` steers
    by what is really kept, of the selected weights or the model's seconds, until it meets ``budget``, which comes down
    from 1 over the first ``ramp`` of the steps; gates that closed last are held open where too many did; ``target`` is
    the authors' surrogate, ``strength`` times the mean over vectors of ``|mean q - k|``, ``q = Φ((tanh θ + ½)/½)``,
    ``k = 1 - target``; ``penalty`` is ``strength`` times the mean of ``Φ((tanh θ + ½)/noise)``.

    Keeps: the outputs, bit by bit, since every gate starts at 1. Does nothing where no target matches (and says so).
    Source: FineGates, arXiv 2412.12951 (gates, θ ~ N(1, 0.1²), noise 0.1) and its 2026 code (``target``: 50, 0.4);
    penalty: Yamada et al. 2020, arXiv 1810.04247; CoFi: arXiv 2204.00408. ``couple``, ``achieved``, its options, rates
    and the lower end of the initial θ, by which all gates start at 1, are this library's.
    """

    promise: ClassVar[Promise] = Promise.EXACT
    unhandled: ClassVar[dict[str, str]] = {"stack": "finegates gates the rows and columns of one matrix, no stack's"}

    couple: bool = option(True, "one gate for what can only be removed together")
    sublayers: bool = option(False, "one gate more for all that a weight reads (achieved, with couple)")
    mode: Literal["achieved", "target", "penalty"] = option("achieved", "what drives gates to close")
    budget: float = option(0.6, "share to keep of the selected weights or the model's seconds", above=0, most=1)
    measure: Measure = option("parameters", "what the budget counts (achieved, with couple)")
    length: int = option(64, "tokens of a text, for the FLOPs of attention", least=1)
    latency: dict[str, float] = option({}, "the table that lorafx latency prints (measure = latency)", least=0)
    target: float = option(0.4, "share of gates to close (target)", least=0, below=1)
    strength: float = option(50.0, "weight of the loss term (target, penalty)", least=0)
    ramp: float = option(0.4, "share of the steps over which the budget comes down (achieved)", least=0)
    multiplier_rate: float = option(1.0, "step of the multiplier (achieved)", above=0)
    restart: bool = option(True, "set the multiplier to 0 when the budget is met (achieved)")
    noise: float = option(0.1, "standard deviation of the gates' noise", least=0)
    initial: float = option(1.0, "mean of the initial θ")
    deviation: float = option(0.1, "standard deviation of the initial θ", least=0)
    gate_rate: float = option(2e-2, "learning rate of the gates", least=0)
    sublayer_rate: float = option(1e-2, "learning rate of the gates of sublayers", least=0)
    train_biases: bool = option(True, "train the biases of gated weights")
    trainable: tuple[str, ...] = option(("auto",), "modules that train in full; auto: a classification head")

    def __post_init__(self) -> None:
        if self.mode == "penalty" and self.noise == 0:
            raise RecipeError("finegates: mode = 'penalty' is about noise, but noise = 0; give it, or another mode")
        if self.sublayers and not (self.couple and self.mode == "achieved"):
            raise RecipeError("finegates: sublayers = true is about couple = true and mode = 'achieved'; leave it out")

    def refusing(self, program: Program) -> Callable[[Site], str | None]:
        names = ties(program.root)
        return lambda site: (
            ("outside the blocks" if site.block is None else "")
            or ("tied weight" if len(names[site.parameter]) > 1 else self.refuse(program, site))
        )

    def sites(self, program: Program) -> Selection[Site | Units]:
        found = self.uses(program)
        if not self.couple or not found.taken:
            return found
        analysis = RemovableUnits(program, found.taken, prices(self.measure, self.length, self.latency))
        budget = self.budget if self.mode == "achieved" else 1.0
        return gates.units_within(found, analysis, budget, self.sublayers)

    def rewrite(self, edit: Edit, site: Any) -> None:
        edit.statistic("multiplier", torch.zeros(()))
        if isinstance(site, Units):
            of = gates.keep_units(edit, site, self.sublayers)
            at, size = site.site.input, len(site.costs)
            with edit.before(site.site.node):
                edit.replace_input(site.site, self._gated(edit, site.site, "gate", at, size, of))
            return
        with edit.before(site.node):
            edit.replace_input(site, self._gated(edit, site, "gate_in", site.input, site.in_features))
        result = edit.output(site)
        with edit.after(result):
            edit.replace(result, self._gated(edit, site, "gate_out", result, site.out_features))

    def _gated(self, edit: Edit, site: Site, short: str, at: fx.Node, size: int, of: str | None = None) -> fx.Node:
        vectors = [(short, size), (gates.SUBLAYER, 1)] if short == "gate" and self.sublayers else [(short, size)]
        theta = [edit.parameter(site, name, (count,), self._start, "gate") for name, count in vectors]
        return gates.multiplied(edit, at, [ClampedGaussian.insert(edit, one, self.noise) for one in theta], of)

    def _start(self, theta: Tensor) -> None:
        nn.init.normal_(theta, self.initial, self.deviation).clamp_(min=ClampedGaussian.OPEN)

    def finish(self, edit: Edit) -> None:
        train_in_full(edit, self.trainable)
        if self.train_biases:
            train_biases(edit, self.uses(edit.program).taken)

    def penalty(self, state: MethodState) -> Tensor:
        if self.mode == "achieved":
            return state.shared["multiplier"].detach() * gates.kept_share(state, ClampedGaussian.surrogate)
        if self.mode == "target":
            return self.strength * gates.away_from(state, 1 - self.target)
        return self.strength * ClampedGaussian.open_probability(torch.cat(gates.gates_of(state)), self.noise).mean()

    def after_step(self, state: MethodState) -> None:
        gates.leave_one_open(state)
        if self.mode == "achieved":
            self._steering(state).step(self.multiplier_rate, restart=self.restart)

    def _steering(self, state: MethodState) -> Steering:
        every = gates.gates_of(state)
        return Steering(state, ClampedGaussian, every, lambda: float(gates.kept_share(state)), self.budget, self.ramp)

    def settled(self, state: MethodState) -> bool:
        return self.mode != "achieved" or self._steering(state).settled

    def conclude(self, state: MethodState) -> None:
        if not self.settled(state):
            self._steering(state).close()

    def optimiser(self) -> Mapping[str, Mapping[str, float]]:
        return gates.settings(self.gate_rate, self.sublayer_rate)

    def describe(self, state: MethodState) -> Mapping[str, Any]:
        return gates.gate_facts(state)


Finegates = FineGates  # the name up to version 0.1
