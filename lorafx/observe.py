"""Observers: what may watch a pipeline run. Timing is recorded always; these add dumps and checks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .base import Pass, Promise
from .errors import ParityError

if TYPE_CHECKING:
    from .program import Program


class Observer:
    """Sees the program before and after each pass. ``compares`` asks the runner to keep the program before the pass."""

    compares: bool = False

    def before(self, program: Program, step: Pass) -> None:
        """Called before ``step`` runs."""

    def after(self, program: Program, step: Pass, previous: Program | None) -> None:
        """Called after ``step`` ran; ``previous`` is the program before it, if any observer compares."""


class Dump(Observer):
    """Write the graph's readable form to ``folder`` after each pass: ``01-lora.txt``, ``02-to-eval.txt``, …"""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def after(self, program: Program, step: Pass, previous: Program | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{len(program.history):02d}-{step.pass_name()}.txt"
        (self.folder / name).write_text(str(program.graph), encoding="utf-8")


class VerifyEach(Observer):
    """Hold every pass to its numeric promise on the example inputs (``--verify-each``).

    Args:
        double: run the pass once more on the program in fp64 and compare there, where neither the rounding of the
            weights a pass writes nor that of the comparison can hide a mistake
    """

    compares = True

    def __init__(self, *, double: bool = False):
        self.double = double

    def after(self, program: Program, step: Pass, previous: Program | None) -> None:
        from .parity import compare_programs

        if previous is None or step.promise is Promise.NOTHING:
            return
        if self.double:
            previous, program = _in_double(previous, step)
        result = compare_programs(previous, program)
        if step.promise is Promise.SHAPES:
            ok = result.same_shapes
        elif step.promise is Promise.EXACT:
            ok = result.max_abs == 0.0
        else:
            ok = result.ok
        if not ok:
            raise ParityError(
                f"pass {step.pass_name()!r} promised {step.promise.value} outputs, but {result.difference}"
            )


def _in_double(previous: Program, step: Pass) -> tuple[Program, Program]:
    """The program in fp64 before and after ``step``; the caller's random state stays as it is."""
    from .pipeline import run
    from .precision import recast

    before = recast(previous, torch.float64)
    with torch.random.fork_rng(devices=()):
        return before, run(before, (step,))
