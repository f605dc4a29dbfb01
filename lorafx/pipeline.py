"""The one runner: select, rewrite, record, check. Passes stay small because orchestration lives here."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Literal

from .base import Method, Pass
from .edit import Edit
from .errors import LorafxError, RecipeError, UsageError
from .program import Applied, Program
from .recipe import Recipe

if TYPE_CHECKING:
    from .observe import Observer
    from .passes.dead_channels import DeadChannels

#: A fixed point that takes more than this many rounds that leave as many operators is a bug in a pass.
_ROUNDS = 20
#: A GPU's matrix units take fp16 rows in multiples of 16 bytes; with others nothing is gained by removing channels, and
#: larger multiples gain nothing more (``benchmarks/gpu.py``).
_CUDA_WIDTHS = 8


def run(program: Program, passes: Sequence[Pass], observers: Sequence[Observer] = (), *, check: bool = True) -> Program:
    """Apply ``passes`` in order and return a new Program; ``program`` is not changed.

    Every pass is held to its numeric promise on the example inputs, unless ``check`` is off or there are no weights;
    the history says which. Observers see the program before and after each pass (dumps, verification in fp64).
    ParityError names a pass that broke its promise.
    """
    from .observe import VerifyEach, keeper

    if not any(isinstance(observer, VerifyEach) for observer in observers):
        observers = (keeper(program, check), *observers)
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
    first = selection = step.sites(program)
    if isinstance(step, Method):
        edit.freeze()
    taken: list[str] = []
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
    step.finish(edit)
    program.graph.lint()
    seconds = time.perf_counter() - started
    program.history += (Applied(step, edit.inserted, tuple(taken), first.missed, seconds, edit.facts),)


def _operators(program: Program) -> int:
    return sum(node.op == "call_function" for node in program.graph.nodes)


def rewrite(
    program: Program,
    recipe: str | PathLike[str] | Mapping[str, object] | Recipe | Sequence[Pass],
    observers: Sequence[Observer] = (),
    *,
    check: bool = True,
) -> Program:
    """Apply a recipe (a path, a dict, a Recipe, or passes) and return a new Program.

    The first method freezes the base: from then on only what methods insert, and what they are asked to train, trains.
    Every pass is held to its promise on the example inputs, see :func:`run`; ``check=False`` leaves that out.
    """
    passes = Recipe.of(recipe).passes
    return run(program, passes, observers, check=check)


def to_eval(program: Program) -> Program:
    """The program's evaluation form: no dropout, no noise. Not recorded when the program is in that form already."""
    from .passes.to_eval import ToEval

    return program if program.stage == "eval" else run(program, (ToEval(),), check=False)


def removal_for(provider: str) -> DeadChannels:
    """The widths that a provider likes."""
    from .passes.dead_channels import DeadChannels

    return DeadChannels(round_to=_CUDA_WIDTHS if provider == "cuda" else 1)


def fold(
    program: Program,
    observers: Sequence[Observer] = (),
    *,
    provider: Literal["cpu", "cuda"] = "cpu",
    removal: DeadChannels | None = None,
    gather: Literal["auto", "always", "never"] = "auto",
    check: bool = True,
) -> Program:
    """Fold everything learned into the base, by ordinary compiler simplification, to a fixed point.

    Returns a new Program in evaluation form whose ``origin`` is ``program``. Knows no method: adapters, gates and
    masks, lorafx's or anyone's, fold because they are constant or affine subgraphs, and what they closed is removed
    because it is zero.

    Args:
        provider: where the result is to be fast; on ``cuda`` widths are multiples of 8, and fewer gathers pay
        removal: which widths are wanted (alike in every block, …); by default what the program's recipe says of
            ``dead-channels``, or else what the provider likes
        gather: when zero columns over a residual stream are skipped (``gather-columns``); what was gathered fits no
            checkpoint any more
        check: hold every pass to its promise on the example inputs (see :func:`run`)

    Raises:
        ParityError: a pass broke its promise; the message names it and the first output that differs
    """
    from .passes.dead_channels import DeadChannels
    from .passes.fold_affine import FoldAffine
    from .passes.fold_constants import FoldConstants
    from .passes.gather_columns import CPU_COST, GPU_COST, GatherColumns
    from .passes.tidy import Tidy
    from .passes.to_eval import ToEval

    if provider not in ("cpu", "cuda"):
        raise UsageError(f"cannot fold for {provider!r}; providers: cpu, cuda")
    liked = removal_for(provider)
    asked = [applied.step for applied in program.history if isinstance(applied.step, DeadChannels)]
    cost = GPU_COST if provider == "cuda" else CPU_COST
    # Gathering comes after removal, which would have to see through a gather.
    last = (removal or (asked or [liked])[-1], GatherColumns(gather, cost, liked.round_to), Tidy())
    steps = (ToEval(), FoldConstants(), FoldAffine(), *last)
    folded = run(program, steps, observers, check=check)
    return dataclasses.replace(folded, origin=program.origin or program)
