"""What an export is compared with: the trained program; refuses one that holds random values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from ..base import Promise
from ..deferred.programs import resident
from ..errors import UsageError
from ..graph.evaluation import evaluation_form
from ..graph.rounding import SAMPLES, jittered
from ..parity.answers import Answers, example_batches
from ..parity.comparison import Comparison
from ..public import Program
from .open import open_runner
from .verify import verify

#: The most of a difference that a program's own rounding may explain, as a share of the scale: decoders with large
#: adapters are this far from exact in fp32. Known mistakes (another epsilon, another GELU) are further off.
_MOST = 1e-4
_KEPT = (Promise.EXACT, Promise.CLOSE)


def reference_of(program: Program) -> Program:
    """The program whose function ``program`` is to compute: the one it was folded from.

    Itself, if it was not folded, or if a pass after folding promised less than the same function.
    """
    origin = program.origin
    if origin is None or any(a.step.promise not in _KEPT for a in program.history[len(origin.history) :]):
        return program
    return origin


def refuse_untrained(program: Program) -> None:
    """UsageError for a program that computes its base alone, with values that come from no file and no training."""
    random = program.untrained()
    base = program.captured
    if not random or base is None:
        return
    first, second = (Answers.of(one, example_batches(one), program.name) for one in (base, program))
    if first.against(second, lambda found: found.max_abs == 0.0).max_abs == 0.0:
        raise UsageError(
            f"{program.name}: no file holds {random[0]} and nothing was trained, so its values are random; train the "
            "program first (check=False, --no-check writes it all the same)"
        )


def held_against(reference: Program, written: Any, by_block: bool = False, **options: Any) -> Comparison:
    """:func:`lorafx.verify`, taking into account how precise ``reference`` itself is where the two differ by more than
    the tolerance.

    Two computations that are each as far from the exact one (fp64) as ``reference`` is, or as far as moving all that it
    rounds within a last place takes it, differ by up to twice that. That much is then added to the tolerance, but no
    more than the tolerance again or a ten-thousandth of the scale, whichever is more; the notes say so.

    ``by_block`` has the tensors of one of its blocks at a time in memory; ``options`` are those of
    :func:`lorafx.verify`.
    """
    held = open_runner(reference, by_block=by_block)
    result = verify(held, written, **options)
    most = max(result.tolerance, _MOST)
    if result.ok or result.problems or result.max_rel > result.tolerance + most:
        return result
    if by_block:  # on the example alone: fp64 takes minutes for each text of a large model
        options = {"inputs": [example_batches(reference)[0].values], **options}
    own = verify(open_runner(reference, dtype=torch.float64, by_block=by_block), held, **options).max_rel
    if result.max_rel > result.tolerance + 2 * own and not by_block:
        # Its numbers may have rounded luckily: moving all values shows what rounding can do.
        form = evaluation_form(resident(reference))
        moved = (verify(held, open_runner(jittered(form, seed)), **options).max_rel for seed in range(SAMPLES))
        own = max(own, *(gap for gap in moved if math.isfinite(gap)), 0.0)  # an overflow says nothing about rounding
    allowed = result.tolerance + min(2 * own, most)
    note = f"the program itself is up to {own:.2g} of the scale from what it is in fp64, by rounding"
    return dataclasses.replace(result, tolerance=allowed, notes=(*result.notes, note))


def unproven(check: bool) -> str:
    """The reason why an export is not compared with its program; empty when it is."""
    return "" if check else "not compared with the program: it was not asked for"


def parity_record(result: Comparison | None, reason: str) -> dict[str, Any]:
    """The section ``parity`` of an export's report: what was found, or why nothing was."""
    return result.to_json() if result is not None else {"ok": None, "summary": reason}
