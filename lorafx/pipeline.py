"""Pipelines of passes, each checked against its promise: rewriting by a recipe, and folding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Literal

from .apply import Observer, apply
from .base import Pass
from .deferred.programs import deferring
from .errors import UsageError
from .graph.precision import gathered
from .graph.program import P
from .recipes.recipe import Recipe

if TYPE_CHECKING:
    from .passes.dead_channels import DeadChannels

#: A GPU's matrix units take fp16 rows in multiples of 16 bytes; other widths gain nothing by removing channels, and
#: larger multiples gain no more (``benchmarks/gpu.py``).
_CUDA_WIDTHS = 8


def run(program: P, passes: Sequence[Pass], observers: Sequence[Observer] = (), *, check: bool = True) -> P:
    """Apply ``passes`` in order and return a new Program; ``program`` is not changed.

    Every pass is checked against its numeric promise on the example inputs, unless ``check`` is off or there are no
    weights; the history says which. Observers see the program before and after each pass (dumps, verification in fp64).
    ParityError names a pass that broke its promise.
    """
    from .parity.promises import VerifyEach, keeper

    program = gathered(program)
    if not any(isinstance(observer, VerifyEach) for observer in observers):
        observers = (keeper(program, check), *observers)
    return apply(program, passes, observers)


def rewrite(
    program: P,
    recipe: str | PathLike[str] | Mapping[str, object] | Recipe | Sequence[Pass | Mapping[str, object]],
    observers: Sequence[Observer] = (),
    *,
    check: bool = True,
) -> P:
    """Apply a recipe (a path, a dict, a Recipe, or passes and tables of passes) and return a new Program.

    The first method freezes the base: from then on only what methods insert, and what their options name, is trained.
    Every pass is checked against its promise on the example inputs, see :func:`run`; ``check=False`` turns that off.
    """
    passes = Recipe.of(recipe).passes
    return run(program, passes, observers, check=check)


def to_eval(program: P) -> P:
    """The program's evaluation form: no dropout, no noise. Not recorded when the program is in that form already.

    Recorded otherwise: an export repeats a program's history on another capture of its model.
    """
    from .passes.to_eval import ToEval

    return program if program.stage == "eval" else run(program, (ToEval(),), check=False)


def _merging() -> tuple[Pass, ...]:
    """The passes that bring everything learned into the base and keep every tensor's shape."""
    from .passes.fold_affine import FoldAffine
    from .passes.fold_constants import FoldConstants
    from .passes.to_eval import ToEval

    return ToEval(), FoldConstants(), FoldAffine()


def merge(program: P, *, check: bool = True) -> P:
    """Bring everything learned into the base, as :func:`fold` does, and leave every tensor in its shape: nothing is
    removed, gathered or dropped, and the result has no ``origin``."""
    return run(program, _merging(), check=check)


def removal_for(provider: str) -> DeadChannels:
    """The widths that suit a provider."""
    from .passes.dead_channels import DeadChannels

    return DeadChannels(round_to=_CUDA_WIDTHS if provider == "cuda" else 1)


def fold(
    program: P,
    observers: Sequence[Observer] = (),
    *,
    provider: Literal["cpu", "cuda"] = "cpu",
    removal: Pass | None = None,
    gather: Literal["auto", "always", "never"] = "auto",
    check: bool = True,
    stream: bool = False,
) -> P:
    """Fold everything learned into the base, by ordinary compiler simplification, to a fixed point.

    Returns a new Program in evaluation form whose ``origin`` is ``program``. Knows no method: adapters, gates and
    masks, lorafx's or another library's, fold because they are constant or affine subgraphs, and what they closed is
    removed because it is zero.

    Args:
        program: as captured, rewritten or loaded
        observers: see the program before and after each pass
        provider: where the result is to be fast; on ``cuda`` widths are multiples of 8, and fewer gathers pay
        removal: which widths are wanted (alike in every block, …); by default what the program's recipe says of
            ``dead-channels``, or else what suits the provider
        gather: when zero columns over a residual stream are skipped (``gather-columns``); what was gathered no longer
            fits a checkpoint
        check: check every pass against its promise on the example inputs (see :func:`run`)
        stream: only record how each weight is computed; it is then computed as it is written (:func:`lorafx.export` as
            ``hf``, or with ``generate``): for models larger than memory. Passes are then not checked by themselves; the
            export compares

    Raises:
        ParityError: a pass broke its promise; the message names it and the first output that differs
    """
    from .channels.gather import CPU_COST, GPU_COST
    from .passes.dead_channels import DeadChannels
    from .passes.dead_sublayers import DeadSublayers
    from .passes.gather_columns import GatherColumns
    from .passes.tidy import Tidy

    if provider not in ("cpu", "cuda"):
        raise UsageError(f"cannot fold for {provider!r}; providers: cpu, cuda")
    liked = removal_for(provider)
    asked = [applied.step for applied in program.history if isinstance(applied.step, DeadChannels)]
    cost = GPU_COST if provider == "cuda" else CPU_COST
    # A sublayer goes after its channels have gone: what a checkpoint keeps of it is then small. Gathering comes after
    # removal, which cannot see through a gather.
    last = (removal or (asked or [liked])[-1], DeadSublayers(), GatherColumns(gather, cost, liked.round_to), Tidy())
    start = deferring(program) if stream else program
    folded = run(start, (*_merging(), *last), observers, check=check)
    return dataclasses.replace(folded, origin=program.origin or program)
