"""What a method sees of its tensors while a program trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import UsageError

if TYPE_CHECKING:
    from .program import Applied


@dataclass(frozen=True)
class SiteState:
    """The tensors one pass keeps for one module, by short name; ``matrices`` says how many its weight is a stack of."""

    module: str
    block: int | None
    tensors: dict[str, Tensor]
    matrices: int = 1

    def __getitem__(self, short: str) -> Tensor:
        return self.tensors[short]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (matrices, rank, in) and B (matrices, out, rank): of each matrix of a stack, or of a single one."""
        a, b = self["lora_A"], self["lora_B"]
        each = b.reshape(b.shape[0], -1, self.matrices).permute(2, 0, 1)
        return a.reshape(self.matrices, -1, a.shape[1]), each


@dataclass(frozen=True)
class MethodState:
    """What a method sees while training: its tensors site by site, and the clock.

    Attributes:
        sites: one entry for each module the pass rewrote
        step: optimiser steps taken so far
        total_steps: how many there will be, or None when the loop did not say
        shared: the tensors that belong to the pass as a whole, by short name
    """

    sites: tuple[SiteState, ...]
    step: int
    total_steps: int | None
    shared: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def planned_steps(self) -> int:
        """``total_steps``; UsageError when a schedule needs it and the loop did not say."""
        if self.total_steps is None:
            raise UsageError("a schedule needs the number of steps: set model.total_steps before the first one")
        return self.total_steps


def method_state(
    applied: Applied, tensor: Callable[[str], Tensor], step: int = 0, total_steps: int | None = None
) -> MethodState:
    """The state of one entry of a program's history; ``tensor`` gives the tensors by name."""
    states = [
        SiteState(entry.module, entry.block, {k: tensor(name) for k, name in entry.tensors.items()}, entry.matrices)
        for entry in applied.inserted
    ]
    shared = next((state.tensors for state in states if not state.module), {})
    return MethodState(tuple(state for state in states if state.module), step, total_steps, shared)
