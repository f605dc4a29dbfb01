"""Stochastic gates in [0, 1]: random while training, so that closing them can be learned; their median in evaluation.

Each kind is the graph it inserts and the same formulas on tensors, for loss terms and reports.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from .edit import Edit

aten = torch.ops.aten


class HardConcrete:
    """``g = clamp(σ((log u - log(1-u) + log α) / τ)(ζ-γ) + γ, 0, 1)``, u uniform: exactly 0 or 1 with some probability.

    Source: Louizos et al. 2018, arXiv 1712.01312, eqs. 10-12; constants of its code. Closes in evaluation where
    ``log α ≤ τ · log(-γ/ζ)`` = -1.599.
    """

    GAMMA, ZETA, TEMPERATURE, EPSILON = -0.1, 1.1, 2 / 3, 1e-6

    @classmethod
    def insert(cls, edit: Edit, log_alpha: fx.Node) -> fx.Node:
        """The node of the gates of ``log_alpha``: one draw a forward, shared by all tokens."""
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
    def expected_open(cls, log_alpha: Tensor) -> Tensor:
        """The probability that each gate is not 0."""
        return torch.sigmoid(log_alpha - cls.TEMPERATURE * math.log(-cls.GAMMA / cls.ZETA))


class ClampedGaussian:
    """``g = clamp(tanh θ + ½ + σ ε, 0, 1)``, ε standard normal: open for certain at tanh θ ≥ ½, closed at ≤ -½.

    Source: stochastic gates, Yamada et al. 2020, arXiv 1810.04247; tanh and constants as in FineGates, arXiv
    2412.12951.
    """

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

    @staticmethod
    def open_probability(theta: Tensor, deviation: float) -> Tensor:
        """``Φ((tanh θ + ½) / deviation)``: how likely noise of that deviation leaves each gate above 0."""
        return torch.special.ndtr((theta.tanh() + 0.5) / deviation)


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
