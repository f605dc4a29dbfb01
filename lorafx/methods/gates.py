"""Stochastic gates in [0, 1]: random while training, so that closing them can be learned; their median in evaluation.

Each kind has the graph that it inserts, and the same formulas on tensors for loss terms and reports.
"""

from __future__ import annotations

import bisect
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..channels.units import RemovableUnits, Units, units_of
from ..errors import RecipeError
from ..graph.edit import Edit
from ..graph.selection import Selection
from ..graph.site import Site
from ..graph.state import MethodState, SiteState

aten = torch.ops.aten
_log = logging.getLogger(__name__)

#: Costs are summed in a different order from their total, so the two may differ by rounding.
_ROUNDING = 1e-6


class HardConcrete:
    """``g = clamp(σ((log u - log(1-u) + log α) / τ)(ζ-γ) + γ, 0, 1)``, u uniform: exactly 0 or 1 with some probability.

    Source: Louizos et al. 2018, arXiv 1712.01312, eqs. 10-12; constants of its code. Closes in evaluation where
    ``log α ≤ τ · log(-γ/ζ)`` = -1.599.
    """

    GAMMA, ZETA, TEMPERATURE, EPSILON = -0.1, 1.1, 2 / 3, 1e-6
    #: The highest log α of a gate that is closed in evaluation.
    CLOSED = TEMPERATURE * math.log(-GAMMA / ZETA)
    #: The log α of a gate that is barely open, and of one that is barely closed.
    AJAR: ClassVar[float] = -1.55
    SHUT: ClassVar[float] = -1.65

    @classmethod
    def insert(cls, edit: Edit, log_alpha: fx.Node) -> fx.Node:
        """The node of the gates of ``log_alpha``: one draw in each forward, shared by all tokens."""
        uniform = edit.noise("uniform", log_alpha)
        uniform = edit.call(aten.add.Scalar, edit.call(aten.mul.Scalar, uniform, 1 - 2 * cls.EPSILON), cls.EPSILON)
        logit = edit.call(aten.add.Tensor, edit.call(aten.logit.default, uniform), log_alpha)
        soft = edit.call(aten.sigmoid.default, edit.call(aten.div.Scalar, logit, cls.TEMPERATURE))
        stretched = edit.call(aten.add.Scalar, edit.call(aten.mul.Scalar, soft, cls.ZETA - cls.GAMMA), cls.GAMMA)
        return edit.call(aten.clamp.default, stretched, 0.0, 1.0)

    @classmethod
    def median(cls, log_alpha: Tensor) -> Tensor:
        """The gates in evaluation (u = ½)."""
        soft = torch.sigmoid(log_alpha / cls.TEMPERATURE)
        return (soft * (cls.ZETA - cls.GAMMA) + cls.GAMMA).clamp(0.0, 1.0)

    @classmethod
    def is_open(cls, log_alpha: Tensor) -> Tensor:
        """Whether each gate is open in evaluation."""
        return cls.median(log_alpha) > 0

    @classmethod
    def expected_open(cls, log_alpha: Tensor) -> Tensor:
        """The probability that each gate is not 0."""
        return torch.sigmoid(log_alpha - cls.CLOSED)


class ClampedGaussian:
    """``g = clamp(tanh θ + ½ + σ ε, 0, 1)``, ε standard normal: open for certain at tanh θ ≥ ½, closed at ≤ -½.

    Source: stochastic gates, Yamada et al. 2020, arXiv 1810.04247; tanh and constants as in FineGates, arXiv
    2412.12951.
    """

    #: The θ of a gate that is barely open, and of one that is barely closed: tanh θ = -½ lies between.
    AJAR: ClassVar[float] = -0.5
    SHUT: ClassVar[float] = -0.55
    #: The least θ of a gate that is fully open in evaluation: tanh θ = ½.
    OPEN: ClassVar[float] = 0.5494

    @staticmethod
    def insert(edit: Edit, theta: fx.Node, noise: float) -> fx.Node:
        """The node of the gates of ``theta``; ``noise`` is σ."""
        mean = edit.call(aten.tanh.default, theta)
        moved = edit.call(aten.add.Scalar, mean, 0.5)
        if noise > 0:
            drawn = edit.call(aten.mul.Scalar, edit.noise("normal", theta), noise)
            moved = edit.call(aten.add.Tensor, moved, drawn)
        return edit.call(aten.clamp.default, moved, 0.0, 1.0)

    @staticmethod
    def median(theta: Tensor) -> Tensor:
        """The gates in evaluation (ε = 0)."""
        return (theta.tanh() + 0.5).clamp(0.0, 1.0)

    @classmethod
    def is_open(cls, theta: Tensor) -> Tensor:
        """Whether each gate is open in evaluation."""
        return cls.median(theta) > 0

    @classmethod
    def surrogate(cls, theta: Tensor) -> Tensor:
        """``q = Φ((tanh θ + ½)/½)``: wide enough that fully open gates have a gradient."""
        return cls.open_probability(theta, 0.5)

    @staticmethod
    def open_probability(theta: Tensor, deviation: float) -> Tensor:
        """``Φ((tanh θ + ½) / deviation)``: the probability that noise of that deviation leaves each gate above 0."""
        return torch.special.ndtr((theta.tanh() + 0.5) / deviation)


def multiplied(edit: Edit, value: fx.Node, vectors: Sequence[fx.Node], of: str | None = None) -> fx.Node:
    """The node of ``value`` with each channel (its last dimension) times its gates, in the value's dtype.

    Args:
        edit: the rewriting
        value: (…, channels)
        vectors: gates, one for each channel or one for all
        of: the name of a tensor with the number of each channel's gate, where channels share gates
    """
    gates = functools.reduce(functools.partial(edit.call, aten.mul.Tensor), vectors)
    if of is not None:
        gates = edit.call(aten.index_select.default, gates, 0, edit.tensor(of))
    return edit.call(aten.mul.Tensor, value, edit.cast(gates, value.meta["val"].dtype))


# ---- the gates of a program


#: The short name of the one gate of all the units that a weight reads.
SUBLAYER = "gate_sublayer"
#: The short names of gate vectors: of units (removed together), of columns, of rows, of a whole sublayer.
GATES = ("gate", "gate_in", "gate_out", SUBLAYER)


def own_gates(site: SiteState) -> dict[str, Tensor]:
    """The θ of one module's gates, by short name."""
    return {name: site[name] for name in GATES if name in site.tensors}


def gates_of(state: MethodState) -> list[Tensor]:
    """The θ of all gates, one tensor for each vector."""
    return [theta for site in state.sites for theta in own_gates(site).values()]


def settings(rate: float, sublayer: float) -> dict[str, dict[str, float]]:
    """Optimiser options for gates, by short name: their learning rates, and no weight decay."""
    rates = {**dict.fromkeys(GATES, rate), SUBLAYER: sublayer}
    return {name: {"lr": own, "weight_decay": 0.0} for name, own in rates.items()}


def keep_units(edit: Edit, units: Units, sublayer: bool) -> str | None:
    """Store what :func:`kept_share` needs to count coupled gates; ``sublayer`` if one more gate closes all of them.

    Returns:
        The name of the tensor that holds the number of each channel's unit; None where every channel is a unit.
    """
    edit.statistic("cost", torch.tensor(units.costs, dtype=torch.float32), units.site)
    edit.statistic("attention", torch.tensor(units.mixing), units.site)
    edit.statistic("total", torch.tensor(units.total))
    if sublayer:
        edit.statistic("fixed", torch.tensor(units.fixed), units.site)
    if (units.of == range(len(units.of))).all():
        return None
    return edit.statistic("unit_of", torch.tensor(units.of), units.site)


def units_within(
    found: Selection[Site], analysis: RemovableUnits, budget: float, sublayers: bool
) -> Selection[Site | Units]:
    """The units that weights read; warns when more than ``budget`` is left with everything closed that may close.

    One of every weight's units stays, unless ``sublayers`` have gates of their own. RecipeError instead of the warning
    when the budget counts seconds, many of which belong to no unit.
    """
    units = units_of(found, analysis.find, "gated where its result is read: ")
    closed = 0.0
    for own in (own for own in units.taken if isinstance(own, Units)):
        closed += own.costs.sum() + (own.fixed if sublayers else -own.costs.min())
    least = 1 - closed / analysis.total
    if budget < least - _ROUNDING:
        said = (
            f"finegates: budget = {budget:g} cannot be met: {least:.3g} is left with every gate closed that may "
            f"close; give more than that, gate more weights{'' if sublayers else ', or sublayers = true'}"
        )
        if analysis.prices.latency:
            raise RecipeError(said)
        _log.warning("%s", said)
    return units


is_open = ClampedGaussian.is_open


def kept_share(state: MethodState, openness: Callable[[Tensor], Tensor] = is_open) -> Tensor:
    """The share of the selected weights, or of the model's time, that is kept, by a measure of how open a gate is (by
    default as in evaluation). Each coupled gate has a cost; a sublayer's gate costs what all of its units cost plus
    what goes with the last of them; independent gates count open rows times open columns.
    """
    if "total" in state.shared:
        total = state.shared["total"] + torch.stack([site["attention"] for site in state.sites]).sum()
        return 1 - torch.stack([_lost(site, openness) for site in state.sites]).sum() / total
    sides = [(site["gate_in"], site["gate_out"]) for site in state.sites]
    kept = [openness(columns).float().sum() * openness(rows).float().sum() for columns, rows in sides]
    return torch.stack(kept).sum() / sum(columns.numel() * rows.numel() for columns, rows in sides)


def away_from(state: MethodState, share: float) -> Tensor:
    """The mean over vectors of the distance between the surrogate's mean and ``share``."""
    means = [ClampedGaussian.surrogate(theta).mean() for theta in gates_of(state)]
    return (torch.stack(means) - share).abs().mean()


def _lost(site: SiteState, openness: Callable[[Tensor], Tensor]) -> Tensor:
    """The cost that the closed gates of one site's units save."""
    opened = openness(site["gate"]).float()
    if SUBLAYER not in site.tensors:
        return ((1 - opened) * site["cost"]).sum()
    whole = openness(site[SUBLAYER]).float().squeeze(0)
    return ((1 - opened * whole) * site["cost"]).sum() + (1 - whole) * site["fixed"]


def keep_open(
    gates: list[Tensor], opened: Callable[[Tensor], Tensor], share: Callable[[], float], least: float, ajar: float
) -> bool:
    """Hold the gates that closed last barely open, as many as needed for ``share()`` to reach ``least``; in place.

    Gates that move together close all at once, and a closed gate gets no gradient from the task and would not reopen.

    Args:
        gates: the parameters of gates; of two closed gates, the higher one closed later
        opened: whether each is open
        share: what is kept now
        least: what has to be kept
        ajar: the parameter of a gate that is barely open

    Returns:
        Whether ``least`` is kept; where opening all of them would not be enough, none is changed.
    """
    if share() >= least:
        return True
    before = [gate.clone() for gate in gates]
    closed = torch.cat([gate[~opened(gate)] for gate in before]).sort(descending=True).values

    def enough(count: int) -> bool:
        for gate, old in zip(gates, before, strict=True):
            again = ~opened(old) & (old >= closed[count - 1])
            gate.copy_(torch.where(again, torch.full_like(old, ajar), old))
        return share() >= least

    fewest = bisect.bisect_left(range(1, len(closed) + 1), True, key=enough) + 1
    if fewest <= len(closed):
        return enough(fewest)
    for gate, old in zip(gates, before, strict=True):
        gate.copy_(old)
    return False


def fine_gates(state: MethodState) -> list[Tensor]:
    """The θ of all gates except those of sublayers, one tensor for each vector."""
    return [theta for site in state.sites for name, theta in own_gates(site).items() if name != SUBLAYER]


def leave_one_open(state: MethodState) -> None:
    """Open the most open gate of each vector whose gates are all closed, except those of sublayers; in place."""
    for theta in fine_gates(state):
        # Chosen on the device: reading it here would synchronise for each gate at every step.
        place = theta.argmax(0, keepdim=True)
        most = theta.gather(0, place)
        theta.scatter_(0, place, torch.where(is_open(theta).any(), most, torch.full_like(most, ClampedGaussian.AJAR)))


def gate_facts(state: MethodState) -> dict[str, list[dict[str, Any]]]:
    """For the report: how open the gates are, how much of the weights they keep, and how many are open by module."""
    every = torch.cat([ClampedGaussian.median(theta) for theta in gates_of(state)])
    total = {"gates": every.numel(), "weights kept": float(kept_share(state)), **histogram(every)}
    return {"Gates": [total], "Open gates by module": [_open_gates(site) for site in state.sites]}


def _open_gates(site: SiteState) -> dict[str, Any]:
    """One row of a report: a module and how many of its gates are open."""
    counts = {name: f"{int(is_open(theta).sum())} of {theta.numel()}" for name, theta in own_gates(site).items()}
    return {"module": site.module, **counts}


def histogram(gates: Tensor) -> dict[str, Any]:
    """How many gates are closed, fractional and open: shares, and counts of tenths between 0 and 1."""
    fractional = gates[(gates > 0) & (gates < 1)]
    tenths = torch.histc(fractional.float().cpu(), bins=10, min=0.0, max=1.0) if fractional.numel() else torch.zeros(10)
    return {
        "closed": float((gates == 0).float().mean()),
        "fractional": fractional.numel() / gates.numel(),
        "fully open": float((gates == 1).float().mean()),
        "tenths": " ".join(str(int(count)) for count in tenths),
    }
