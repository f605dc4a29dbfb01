"""The time that a model takes on this machine in ONNX Runtime, by its width: the table that a budget of latency reads.

The model itself is timed, exported with some of its units removed, so that a unit's price includes all that goes with
it: its part of the products, the operators between them, and ONNX Runtime's optimisation of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from ..channels.costs import CALL, WHOLE
from ..channels.units import Units
from ..deferred.programs import resident
from ..errors import UsageError
from ..formats.companions import copy_companions
from ..graph.state import method_state
from ..methods.gates import SUBLAYER, ClampedGaussian
from ..parity.runner import Runner
from ..passes.finegates import FineGates
from ..pipeline import fold, rewrite
from ..proof.bench import bench
from ..proof.open import open_runner
from ..public import Program
from .writing import write_other

#: The shares of its units that the weights of a kind keep while these are timed, from the first weight to the last:
#: different widths, since a width may be faster or slower than its neighbours.
_KEPT = (0.2, 0.5)


def latency_table(
    program: Program, *, batch: int = 8, length: int = 64, threads: int | None = None, repeats: int = 15
) -> dict[str, float]:
    """Seconds of the model (``whole``), and of each kind of unit in its blocks.

    ``1536 of 1536x384`` is a unit of a weight of that shape, in x out, that reads 1,536 of them, ``… of one token`` one
    that is computed of one token only; under the same name with ``-call``, what goes with the last of them only. Two
    models for each kind are exported and timed beside the whole one, round by round: one whose weights of that kind
    read fewer units, one that has none of them. Prices are scaled to the time saved when all kinds have fewer at once.

    Args:
        program: the model; what passes inserted is ignored
        batch, length: of the texts
        threads: CPU threads; torch's number without
        repeats: timed calls of each model

    Raises:
        UsageError: a program without units in its blocks, or without weights
    """
    base = program.captured or program
    if base.device.type == "meta":
        raise UsageError(f"{program.name}: on the meta device, so it computes nothing; load its weights")
    kinds = _kinds(base)
    if not kinds:
        raise UsageError(f"{program.name}: nothing in its blocks can be removed, so there is nothing to time")
    seconds: list[float] = []
    shares: dict[str, float] = {}
    with _exported(base, {}, threads) as whole:

        def saved(left: Mapping[str, int]) -> float:
            """The share of the time that is saved with this many units left, by module."""
            with _exported(base, left, threads) as other:
                found = bench(whole, other, shapes=((batch, length),), repeats=repeats, memory=False)
            first, second = found.timings
            seconds.append(first.median)
            return 1 - 1 / second.ratio  # round by round, so that what slowed down both cancels

        for kind, every in kinds.items():
            shares[kind], shares[kind + CALL] = _prices(every, saved)
        left = {kind: _fewer(every) for kind, every in kinds.items()}
        together = saved({module: count for own in left.values() for module, count in own.items()})
    apart = sum(shares[kind] * (_count(every) - sum(left[kind].values())) for kind, every in kinds.items())
    # Added up, kinds timed one at a time save more than together: narrow models use caches and threads less.
    factor = together / apart if apart > 0 and together > 0 else 1.0
    return {WHOLE: median(seconds), **{name: factor * share * median(seconds) for name, share in shares.items()}}


def _kinds(program: Program) -> dict[str, list[Units]]:
    """The units of a program's blocks, by their names in tables."""
    found: dict[str, list[Units]] = {}
    for units in _gates().sites(program).taken:
        if isinstance(units, Units):
            found.setdefault(units.kind, []).append(units)
    return found


def _gates() -> FineGates:
    return FineGates(allow_empty=True, sublayers=True, deviation=0.0)


def _prices(every: list[Units], saved: Callable[[Mapping[str, int]], float]) -> tuple[float, float]:
    """What a unit of a kind costs, and what goes with a weight's last one, as shares of the model's time.

    They are fitted to the time saved by closing some of the units and by closing all; never below 0.
    """
    left, count = _fewer(every), _count(every)
    fewer = count - sum(left.values())
    some = saved(left) if fewer else 0.0  # else each weight reads one unit, which is its last
    whole = saved(dict.fromkeys(left, 0))
    each = some / max(1, fewer)
    last = whole - count * each
    if last < 0:  # the line of least squares among those through 0
        each, last = (fewer * some + count * whole) / (fewer**2 + count**2), 0.0
    return max(0.0, each), max(0.0, last / len(every))


def _count(every: list[Units]) -> int:
    return sum(len(units.costs) for units in every)


def _fewer(every: list[Units]) -> dict[str, int]:
    """How many units each weight of a kind keeps while some are timed, by module."""
    low, high = _KEPT
    shares = (low + (high - low) * (number + 0.5) / len(every) for number in range(len(every)))
    kept = zip(every, shares, strict=True)
    return {units.module: max(1, round(share * len(units.costs))) for units, share in kept}


@contextmanager
def _exported(base: Program, left: Mapping[str, int], threads: int | None) -> Iterator[Runner]:
    """The model in ONNX Runtime, with this many units left, by the module that reads them."""
    gated = rewrite(base, [_gates()], check=False) if left else base
    if left:
        with torch.no_grad():
            for site in method_state(gated.history[-1], gated.tensor).sites:
                site["gate"][left.get(site.module, len(site["gate"])) :] = ClampedGaussian.SHUT
                if left.get(site.module) == 0:
                    site[SUBLAYER].fill_(ClampedGaussian.SHUT)
    with TemporaryDirectory() as folder:
        final = resident(fold(gated, check=False))
        write_other(final, Path(folder), "onnx", "cpu", None, False, None)
        copy_companions(final, Path(folder))
        # It is trusted as the program is.
        yield open_runner(folder, threads=threads, sealed=False, trust_remote_code=True)
