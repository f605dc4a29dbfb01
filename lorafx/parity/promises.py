"""Every pass is checked against its promise: what the program computes after it is compared with what it computed
before."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..apply import Observer, apply
from ..base import Pass, Promise
from ..deferred.programs import is_deferring
from ..errors import ParityError
from ..graph.evaluation import evaluation_form
from ..graph.precision import recast, relaid
from ..graph.rounding import SAMPLES, jittered
from ..graph.tree import named_tensors
from .answers import Answers, example_batches
from .comparison import Comparison
from .runner import PROVIDERS

if TYPE_CHECKING:
    from ..graph.program import Program


#: A pass that is right in fp64 may deviate, in the program's own dtype, by this many times as much as the program
#: before it does, or as a few draws of its rounding do.
_FURTHER = 4.0


class Unproven(Observer):
    """Writes into the history why no pass is checked against its promise."""

    def __init__(self, reason: str):
        self.reason = reason

    def after(self, program: Program, step: Pass, previous: Program | None) -> None:
        note_proof(program, f"not checked: {self.reason}")


def keeper(program: Program, check: bool) -> Observer:
    """The observer that checks the promises of passes on ``program``, unless one of the caller's already does."""
    device = program.device.type
    if not check:
        return Unproven("it was not asked for")
    if device not in PROVIDERS:
        return Unproven("the program has no weights" if device == "meta" else f"nothing runs on {device} here")
    if is_deferring(program):
        return Unproven("its weights are computed when they are written, and what is written is compared as a whole")
    return VerifyEach()


class VerifyEach(Observer):
    """Check every pass against its numeric promise on the example inputs and on the first of them alone.

    The runner does so by default. The program's outputs are computed once after each pass, and are the reference for
    the next.

    Before a pass is blamed for a difference, other explanations are ruled out: where tensors lie in memory and which
    kernels torch chooses (bits may depend on both), and the rounding of the program's own dtype. Where nothing else
    differs, the outputs agree in fp64, within the tolerance of fp64.

    Args:
        double: run the pass once more on the program in fp64 and compare there, where neither the rounding of the
            weights a pass writes nor that of the comparison can hide a mistake
    """

    compares = True

    def __init__(self, *, double: bool = False):
        self.double = double
        self._last: tuple[Program, Answers] | None = None
        self._form: list[Any] = []

    def before(self, program: Program, step: Pass) -> None:
        if self.double or step.promise is Promise.NOTHING:
            return
        if (self._last or (None,))[0] is not program:
            self._last = (program, _answers(program, "the program before"))
        self._form = _form(program)

    def after(self, program: Program, step: Pass, previous: Program | None) -> None:
        if step.promise is Promise.NOTHING:
            self._last = None
            note_proof(program, "it promises nothing")
            return
        assert previous is not None  # requested by ``compares``
        promise = step.promise
        if self.double:
            programs = _in_double(previous, step)
            first, second = (_answers(one, "the program") for one in programs)
            result = _compared(first, second, step.promise)
            if step.promise is Promise.CLOSE and not result.ok:
                result = _without_rounding(programs[0], first, second)
        else:
            assert self._last is not None  # set by before()
            if not program.history[-1].taken and _form(program) == self._form:
                note_proof(program, "it changed nothing", 0.0)
                return
            first, second = self._last[1], _answers(program, "the program")
            self._last = (program, second)
            result = _compared(first, second, step.promise)
            if not keeps(result, step.promise):
                result, promise = _explained(result, step, (previous, first), (program, second))
        if not keeps(result, promise):
            raise ParityError(
                f"pass {step.pass_name()!r} promised {step.promise.value} outputs, but {_broken(result, promise)};"
                f" {_whose(step)} (check=False, --no-check goes on all the same)"
            )
        if step.promise is Promise.SHAPES:
            note_proof(program, "the outputs have their shapes")
        else:
            note_proof(program, result.summary, result.max_rel)


def _whose(step: Pass) -> str:
    """Who can mend a broken promise: a pass in another package is its author's."""
    ours = type(step).__module__.startswith("lorafx.")
    return "please report this model" if ours else f"mend {type(step).__qualname__}, or what it promises"


def _compared(first: Answers, second: Answers, promise: Promise) -> Comparison:
    return first.against(second, lambda found: keeps(found, promise))


def _explained(
    found: Comparison, step: Pass, before: tuple[Program, Answers], after: tuple[Program, Answers]
) -> tuple[Comparison, Promise]:
    """What is left of a broken promise once every cause but ``step`` is excluded, and the promise it is then checked
    against. ``found`` and the promise itself, when nothing else explains the difference.
    """
    exact = step.promise is Promise.EXACT
    if exact and found.ok:
        # A product of one row rounds differently from one alignment of its weight to another.
        first, second = (_answers(relaid(program), "the program") for program in (before[0], after[0]))
        alike = _compared(first, second, step.promise)
        if keeps(alike, step.promise):
            return alike, step.promise
    if step.promise is Promise.SHAPES or any(case.problem for case in found.cases):
        return found, step.promise
    if found.dtype == torch.float64:
        # torch chooses its kernels by more than layout (who reads a value, what trains): bits may differ by rounding.
        result = found if found.ok else _without_rounding(before[0], before[1], after[1])
        return (result, Promise.CLOSE) if result.ok else (found, step.promise)
    if exact and not found.ok:
        return found, step.promise
    programs = _in_double(before[0], step)
    first, second = (_answers(program, "the program") for program in programs)
    result = _compared(first, second, Promise.CLOSE)
    if not result.ok:
        result = _without_rounding(programs[0], first, second)
    # Right in fp64, and in the program's dtype as near to that as the program before, which rounds as well.
    near, nearer = (_compared(first, own, Promise.CLOSE).max_rel for own in (after[1], before[1]))
    if near > _FURTHER * nearer + found.tolerance:
        # Its few numbers may have rounded luckily: moving all values shows what rounding can do.
        nearer = max(nearer, _moved_by_rounding(*before))
    return (result, Promise.CLOSE) if near <= _FURTHER * nearer + found.tolerance else (found, step.promise)


def _moved_by_rounding(program: Program, answers: Answers) -> float:
    """How far outputs move, as a share of their scale, when everything that the program rounds is moved within its last
    place."""
    graph = evaluation_form(program)
    moved = (_answers(jittered(graph, seed), "the program") for seed in range(SAMPLES))
    gaps = [_compared(answers, one, Promise.CLOSE).max_rel for one in moved]
    return max((gap for gap in gaps if math.isfinite(gap)), default=0.0)  # an overflow says nothing about rounding


def _without_rounding(program: Program, before: Answers, after: Answers) -> Comparison:
    """The comparison without the differences that rounding within ``program``, the one before, explains."""
    graph = evaluation_form(program)
    moved = [_answers(jittered(graph, seed), "the program") for seed in range(SAMPLES)]
    return before.against(after, lambda found: keeps(found, Promise.CLOSE), before.slack(moved))


def _answers(program: Program, label: str) -> Answers:
    return Answers.of(program, example_batches(program), label)


def _form(program: Program) -> list[Any]:
    """What a pass that rewrote nothing leaves unchanged: equal lists mean equal programs."""
    nodes = [(node, node.target, node.args, node.kwargs) for node in program.graph.nodes]
    return [program.stage, nodes, [(name, _Same(value), value._version) for name, value in named_tensors(program.root)]]


@dataclass(frozen=True, eq=False)
class _Same:
    """A tensor compared by identity, and kept alive so that its id is not reused."""

    value: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value


def keeps(result: Comparison, promise: Promise) -> bool:
    """Whether what a comparison found is what was promised."""
    if promise is Promise.NOTHING:
        return True
    if promise is Promise.SHAPES:
        return result.same_shapes
    return result.max_abs == 0.0 if promise is Promise.EXACT else result.ok


def _broken(result: Comparison, promise: Promise) -> str:
    """The first output that is not as promised."""
    if promise is Promise.SHAPES:
        case = next((case for case in result.cases if case.shapes_differ), None)
    else:
        case = result.first_beyond(0.0 if promise is Promise.EXACT else result.tolerance)
    return result.summary if case is None else result.describe(case)


def note_proof(program: Program, text: str, difference: float | None = None) -> None:
    """Write into the program's history how the last pass was checked, and what was found."""
    *earlier, last = program.history
    program.history = (*earlier, dataclasses.replace(last, proof=text, difference=difference))


def _in_double(previous: Program, step: Pass) -> tuple[Program, Program]:
    """The program in fp64 before and after ``step``; the caller's random state stays as it is."""
    before = recast(previous, torch.float64)
    with torch.random.fork_rng(devices=()):
        return before, apply(before, (step,))
