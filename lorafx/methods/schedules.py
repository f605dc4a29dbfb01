"""Values that move with the optimiser steps: ramps, the cubic sparsity schedule, and multipliers of constraints."""

from __future__ import annotations

from torch import Tensor


def steps_of(moment: float, total_steps: int) -> int:
    """A moment of training in steps: up to 1 it is a share of ``total_steps``, else a number of steps."""
    return round(moment * total_steps) if moment <= 1 else round(moment)


def start_of(moment: float, total_steps: int) -> int:
    """A beginning in steps: below 1 it is a share of ``total_steps``, from 1 on a number of steps.

    Unlike an end, which may be 1.0 for all steps: a beginning at 100 % would never come.
    """
    return round(moment * total_steps) if moment < 1 else round(moment)


def linear(step: float, start: float, end: float, first: float, last: float) -> float:
    """``first`` until ``start``, ``last`` from ``end`` on, linear in between."""
    if step >= end:
        return last
    return first + (last - first) * max(0.0, step - start) / (end - start)


def cubic(step: float, start: float, end: float, first: float, last: float) -> float:
    """``first`` until ``start``, ``last`` from ``end`` on; in between ``last + (first - last)(1 - t)³``, fast at first,
    with t from 0 to 1.

    Source: Zhu & Gupta 2017, arXiv 1710.01878, eq. 1.
    """
    left = 1 - linear(step, start, end, 0.0, 1.0)
    return last + (first - last) * left**3


def ascend(multiplier: Tensor, violation: Tensor | float, rate: float, *, restart: bool = False) -> None:
    """One step up for the multiplier of a constraint ``violation <= 0``, in place; it never gets negative.

    ``restart`` sets it back to 0 as soon as the constraint holds.

    Source: projected gradient ascent on the Lagrangian; restarts as in Gallego-Posada et al. 2022, arXiv 2208.04425.
    """
    if restart and float(violation) <= 0:
        multiplier.zero_()
    else:
        multiplier.add_(rate * violation).clamp_(min=0.0)
