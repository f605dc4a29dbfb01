"""Bring the share of open gates down to a target while training: by a multiplier, along a ramp, above a floor."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..graph.state import MethodState
from .gates import fine_gates, keep_open
from .schedules import ascend, linear, steps_of


class GateKind(Protocol):
    """What steering needs from a kind of gate: parameters that are barely open and barely closed."""

    AJAR: ClassVar[float]
    SHUT: ClassVar[float]

    @staticmethod
    def is_open(theta: Tensor, /) -> Tensor:
        """Whether each gate is open in evaluation."""
        ...


@dataclass(frozen=True)
class Steering:
    """One method's gates on their way to ``target``.

    Attributes:
        state: what the method sees now; its shared ``multiplier`` is moved
        kind: the kind of its gates
        gates: their parameters, one tensor for each vector
        share: gives the share that is kept now
        target: the share to be kept
        ramp: when the allowed share, which comes down from 1, reaches the target, as a moment of training; 0: at once
    """

    state: MethodState
    kind: type[GateKind]
    gates: list[Tensor]
    share: Callable[[], float]
    target: float
    ramp: float

    #: How far above its target a share may be and count as reached: what a real training is to achieve.
    TOLERANCE: ClassVar[float] = 0.02

    @property
    def allowed(self) -> float:
        """The share that may be kept at this step."""
        return linear(self.state.step, 0, self._end, 1.0, self.target)

    @property
    def _end(self) -> int:
        return max(1, steps_of(self.ramp, self.state.planned_steps)) if self.ramp else 0

    def step(self, rate: float, *, restart: bool, floor: bool = True) -> None:
        """Move the multiplier; with ``floor`` the gates that closed last stay open where too many did.

        A sublayer closes a lot at once, so finer gates reopen in place of its gate, where there are enough of them.

        On a GPU this waits for the device once, to read the share; more often only where gates are held open.
        """
        excess = self.share() - self.allowed
        ascend(self.state.shared["multiplier"], excess, rate, restart=restart)
        if floor and excess < 0:
            for gates in (fine_gates(self.state), self.gates):
                if gates and keep_open(gates, self.kind.is_open, self.share, self.allowed, self.kind.AJAR):
                    break

    @property
    def settled(self) -> bool:
        """Whether the ramp is over and the target reached, as nearly as whole gates allow."""
        if self.state.step < self._end:
            return False
        if self.share() <= self.target + self.TOLERANCE:
            return True
        before = [gate.clone() for gate in self.gates]
        self._shut(before, self._order(before)[:1])
        beyond = self.share() < self.target
        self._shut(before, None)
        return beyond

    def close(self) -> None:
        """Close at once what is still to close: the least open gates, as few as needed to keep at most ``target``.

        The most open gate of every vector always stays.
        """
        if self.share() <= self.target:
            return
        before = [gate.clone() for gate in self.gates]
        order = self._order(before)

        def enough(count: int) -> bool:
            self._shut(before, order[:count])
            return self.share() <= self.target

        enough(min(bisect.bisect_left(range(len(order) + 1), True, key=enough), len(order)))

    def _order(self, before: list[Tensor]) -> Tensor:
        """The open gates that may close, the least open first, by their positions in the concatenated vectors."""
        free = [self.kind.is_open(gate) for gate in before]
        for may, gate in zip(free, before, strict=True):
            may[gate.argmax()] = False
        # One by one, not by a threshold: gates that a floor held open are all equal.
        closed_last = torch.where(torch.cat(free), torch.cat(before), torch.inf)
        return closed_last.argsort(stable=True)[: int(torch.cat(free).sum())]

    def _shut(self, before: list[Tensor], places: Tensor | None) -> None:
        """Set the gates to their values ``before``, except those in ``places``, which are closed."""
        values = torch.cat(before)
        values = values if places is None else values.index_fill(0, places, self.kind.SHUT)
        for gate, value in zip(self.gates, values.split([len(gate) for gate in before]), strict=True):
            gate.copy_(value)
