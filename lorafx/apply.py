"""The one runner of passes: select, rewrite, record. Passes stay small because orchestration lives here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from .base import Method, Pass, Promise
from .errors import LorafxError, RecipeError
from .files.whole import write_whole
from .graph.edit import Edit
from .graph.program import Applied, P, Program

#: More rounds than this without fewer operators mean that a pass has a bug: it reaches no fixed point.
_ROUNDS = 20


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
        name = f"{len(program.history):02d}-{step.pass_name()}.txt"
        write_whole(self.folder / name, str(program.graph))


def apply(program: P, passes: Sequence[Pass], observers: Sequence[Observer] = ()) -> P:
    """Apply ``passes`` in order and return a new Program; ``program`` is not changed, and nothing is checked but by
    ``observers``, who see the program before and after each pass."""
    result = program.copy()
    for step in passes:
        for observer in observers:
            observer.before(result, step)
        previous = result.copy() if any(observer.compares for observer in observers) else None
        _apply(result, step)
        for observer in observers:
            observer.after(result, step, previous)
    return result


def _apply(program: Program, step: Pass) -> None:
    started = time.perf_counter()
    edit = Edit(program, step)
    if isinstance(step, Method) and program.stage == "eval":
        why = program.untrainable or "the program was made ready for evaluation; insert methods before that"
        raise RecipeError(f"{step.pass_name()}: {why}")
    selection = step.sites(program)
    if isinstance(step, Method):
        step.check_taken(selection)
    if isinstance(step, Method) and not any(isinstance(applied.step, Method) for applied in program.history):
        edit.freeze()  # only once: what an earlier method trains keeps training
    taken: list[str] = []
    missed = list(selection.missed)
    idle = 0
    while selection.taken:
        before = _operators(program)
        for site in selection.taken:
            step.rewrite(edit, site)
        taken += [str(site) for site in selection.taken]
        if not step.fixed_point:
            break
        idle += _operators(program) >= before
        if idle == _ROUNDS:
            raise LorafxError(f"{step.pass_name()} did not come to rest after {idle} rounds; please report this model")
        selection = step.sites(program)
        missed += [miss for miss in selection.missed if miss not in missed]
    step.finish(edit)
    program.graph.lint()
    seconds = time.perf_counter() - started
    if isinstance(step, Method) or step.promise not in (Promise.EXACT, Promise.CLOSE):
        program.outlive_training()  # earlier measurements do not hold for this function, or for all that trains now
    program.history += (Applied(step, edit.inserted, tuple(taken), tuple(missed), seconds, edit.facts),)


def _operators(program: Program) -> int:
    return sum(node.op == "call_function" for node in program.graph.nodes)
