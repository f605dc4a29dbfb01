"""Timing models side by side: interleaved, so that a busy machine disturbs all of them alike, with medians, ratios and
spread.

Peak memory is measured in a process of its own for each candidate that is a folder: what it takes to load and run it.
"""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from ..errors import ArtifactError, UsageError
from ..graph.precision import dtype_name
from ..models.hub import local_folder
from ..models.tokenizers import length_limit, pad_token
from ..notebook import shown
from ..parity.inputs import Generator, merged
from ..parity.runner import Runner
from ..reporting.render import Section, draw_text
from .memory import peak_memory
from .open import open_runner

#: batch × length: a single short text, a small batch, a large one.
SHAPES = ((1, 64), (8, 64), (32, 128))
#: Fewer rounds than this say nothing about the spread.
_ROUNDS = 5
_PACKAGES = ("lorafx", "torch", "transformers", "onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class Timing:
    """One candidate at one shape.

    Attributes:
        candidate: its label
        batch, length: of the inputs; the length is 0 for inputs without one
        rounds: how often it ran, after warm-up
        median, p10, p90: seconds
        ratio: speed relative to the first candidate: the median over rounds of its time divided by this one's
        ratio_p10, ratio_p90: the spread of that ratio
    """

    candidate: str
    batch: int
    length: int
    rounds: int
    median: float
    p10: float
    p90: float
    ratio: float
    ratio_p10: float
    ratio_p90: float

    @property
    def spread(self) -> float:
        """How much the times scatter: the range from p10 to p90 as a share of the median."""
        return (self.p90 - self.p10) / self.median


@dataclass(frozen=True)
class Candidate:
    """What was timed.

    Attributes:
        label: its name
        kind: ``program``, ``module``, ``checkpoint``, ``run``, ``onnx``, …
        provider: what actually ran it
        threads: CPU threads
        dtype: its lowest precision
        bytes_on_disk: of its folder; None for a model in memory
        peak_bytes: the largest resident memory of a process that loads it and runs the largest shape once; None for a
            model in memory, or where the system does not report it
        library_bytes: the part of that which libraries took before the model was loaded
        note: what to know, e.g. that the provider asked for could not be loaded
    """

    label: str
    kind: str
    provider: str
    threads: int
    dtype: str
    bytes_on_disk: int | None
    peak_bytes: int | None
    library_bytes: int | None
    note: str = ""


@dataclass(frozen=True)
class BenchResult:
    """Timings side by side; the first candidate is the one the others are compared with."""

    candidates: tuple[Candidate, ...]
    timings: tuple[Timing, ...]
    machine: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        timings = [{**asdict(timing), "spread": timing.spread} for timing in self.timings]
        return {"machine": dict(self.machine), "candidates": [asdict(c) for c in self.candidates], "timings": timings}

    def text(self, width: int = 110) -> str:
        """The result as tables no wider than ``width`` columns."""
        return draw_text(self._lines(), self._tables(), width)

    def _lines(self) -> list[str]:
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        notes = [f"{c.label}: {c.note}" for c in self.candidates if c.note]
        noisy = max((timing.spread for timing in self.timings), default=0.0)
        return [machine, *notes, f"Times scatter by up to {noisy:.0%} of their median from p10 to p90."]

    def _tables(self) -> list[Section]:
        first = self.candidates[0].label
        columns = ("shape", "candidate", "median ms", "p10 … p90", f"times as fast as {first}", "p10 … p90 ")
        what = ("candidate", "kind", "dtype", "provider", "threads", "MB on disk", "peak MB", "libraries MB")
        times = Section("Latency", columns, tuple(map(_time_row, self.timings)))
        return [times, Section("Size", what, tuple(map(_size_row, self.candidates)))]

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        fastest = max(self.timings, key=lambda timing: timing.ratio, default=None)
        found = f": {_said(fastest, self.candidates[0].label)}" if fastest is not None else ""
        return f"<BenchResult of {', '.join(c.label for c in self.candidates)}{found}>"

    def _repr_html_(self) -> str:
        return shown(self._lines(), self._tables(), opened=True)


def _said(timing: Timing, first: str) -> str:
    shape = _time_row(timing)[0]
    if timing.candidate == first:
        return f"{timing.median * 1e3:.1f} ms at {shape}"
    return f"at best {timing.candidate} is {timing.ratio:.2f} times as fast as {first}, at {shape}"


def _time_row(timing: Timing) -> tuple[str, ...]:
    shape = f"{timing.batch}x{timing.length}" if timing.length else f"batch {timing.batch}"
    spread = f"{timing.p10 * 1e3:.1f} … {timing.p90 * 1e3:.1f}"
    ratios = f"{timing.ratio_p10:.2f} … {timing.ratio_p90:.2f}"
    return shape, timing.candidate, f"{timing.median * 1e3:.1f}", spread, f"{timing.ratio:.2f}x", ratios


def _size_row(candidate: Candidate) -> tuple[str, ...]:
    sizes = (candidate.bytes_on_disk, candidate.peak_bytes, candidate.library_bytes)
    numbers = [f"{size / 1e6:.1f}" if size is not None else "" for size in sizes]
    return candidate.label, candidate.kind, candidate.dtype, candidate.provider, str(candidate.threads), *numbers


# ---- measuring


def bench(
    *candidates: Any,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    repeats: int = 20,
    threads: int | None = None,
    provider: str = "cpu",
    seconds: float = 120.0,
    memory: bool = True,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    base: str | PathLike[str] | None = None,
) -> BenchResult:
    """Time models side by side.

    Args:
        candidates: programs, modules, runners or folders, or ``(label, one of them)``; the first is the reference
        shapes: batch × length of the inputs, clipped to what all of them take
        repeats: rounds for each shape; a round runs every candidate once
        threads: CPU threads of each candidate
        provider: ``cpu`` or ``cuda``
        seconds: time to spend in all; a shape that takes too long gets fewer rounds, but at least five
        memory: measure peak memory too, in a process for each folder
        trust_remote_code: whether code that comes with a folder may run: a checkpoint's own, that in a pickled .pt2
        allow_pickle: whether weights in ``.bin`` files may be read
        base: where the base checkpoint of runs is now, if it was moved

    Raises:
        UsageError: no candidates, or inputs that cannot be made
        ArtifactError: a folder cannot be opened
    """
    if not candidates or repeats < 1:
        raise UsageError("nothing to time: give at least one candidate and one repeat")
    named = _labelled(candidates)
    moved = str(Path(base).resolve()) if base is not None else None
    opening = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle, "base": moved}
    runners = [
        thing if isinstance(thing, Runner) else open_runner(thing, provider, threads, label=label, **opening)
        for label, thing in named
    ]
    generator = _generator(runners)
    wanted = list(dict.fromkeys(generator.clipped(*shape) for shape in shapes))
    timings = []
    for batch, length in wanted:
        inputs = generator.batch(batch, length, [length] * batch).values
        times = _times([_call(runner, inputs) for runner in runners], repeats, seconds / len(wanted))
        timings += [_timing(label, batch, length, own, times[0]) for (label, _), own in zip(named, times, strict=True)]
    largest = max(wanted, key=lambda shape: shape[0] * max(1, shape[1]))
    rows = [
        _candidate(label, thing, runner, largest if memory else None, (provider, opening))
        for (label, thing), runner in zip(named, runners, strict=True)
    ]
    return BenchResult(tuple(rows), tuple(timings), _machine())


def _labelled(candidates: Sequence[Any]) -> list[tuple[str, Any]]:
    named: list[tuple[str, Any]] = []
    for candidate in candidates:
        label, thing = candidate if isinstance(candidate, tuple) else (None, candidate)
        if label is None:
            in_memory = thing.label if isinstance(thing, Runner) else getattr(thing, "name", type(thing).__name__)
            label = Path(thing).resolve().name if isinstance(thing, (str, PathLike)) else str(in_memory)
        taken = {other for other, _ in named}
        count = next(n for n in range(1, len(candidates) + 1) if (label if n == 1 else f"{label} #{n}") not in taken)
        named.append((label if count == 1 else f"{label} #{count}", thing))
    return named


def _generator(runners: Sequence[Runner]) -> Generator:
    """Inputs that every candidate takes; without padding, since a timing compares work."""
    specs = runners[0].inputs
    for runner in runners[1:]:
        specs = merged(specs, runner.inputs)
    configs = [runner.config for runner in runners]
    return Generator(merged(specs, ()), pad=pad_token(*configs), limit=length_limit(*configs))


def _call(runner: Runner, inputs: Mapping[str, Tensor]) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        runner(inputs)
        return time.perf_counter() - start

    return timed


def _times(calls: Sequence[Callable[[], float]], repeats: int, budget: float) -> list[list[float]]:
    """Seconds of every call in every round. Candidates take turns, so that drift and disturbance hit all alike, in a
    different order each round, since a candidate leaves caches and waking threads behind."""
    order = list(range(len(calls)))
    shuffled = random.Random(0)
    started = time.perf_counter()
    for call in calls:
        call()  # the first runs allocate, compile and choose kernels
        call()
    times: list[list[float]] = [[] for _ in calls]
    for done in range(repeats):
        if done >= _ROUNDS and time.perf_counter() - started > budget:
            break
        shuffled.shuffle(order)
        for place in order:
            times[place].append(calls[place]())
    return times


def _timing(label: str, batch: int, length: int, own: Sequence[float], first: Sequence[float]) -> Timing:
    # Round by round: what slowed down a round slowed down both sides of its ratio.
    ratios = [reference / seconds for reference, seconds in zip(first, own, strict=True)]
    times = (median(own), _quantile(own, 0.1), _quantile(own, 0.9))
    speed = (median(ratios), _quantile(ratios, 0.1), _quantile(ratios, 0.9))
    return Timing(label, batch, length, len(own), *times, *speed)


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _candidate(
    label: str, thing: Any, runner: Runner, shape: tuple[int, int] | None, opening: tuple[str, dict[str, Any]]
) -> Candidate:
    folder = local_folder(thing) if isinstance(thing, (str, PathLike)) else None
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder is not None else None
    peak, libraries = None, None
    if folder is not None and shape is not None:
        peak, libraries = _peak_of(folder, shape, runner.threads, opening)
    dtype = dtype_name(runner.dtype)
    return Candidate(label, runner.kind, runner.provider, runner.threads, dtype, size, peak, libraries, runner.note)


def _machine() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # one of the two builds of ONNX Runtime always is; lorafx may run from its source
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {**found, "cores": cores, "machine": platform.machine()}


# ---- peak memory


def _peak_of(
    folder: Path, shape: tuple[int, int], threads: int, opening: tuple[str, dict[str, Any]]
) -> tuple[int | None, int | None]:
    """Peak memory of a process that loads a folder and runs it once, and the part of it that its libraries took."""
    request = json.dumps([str(folder.resolve()), *shape, threads, *opening])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "lorafx.proof.bench", request]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ArtifactError(f"{folder}: a process of its own cannot run it: {reason}")
    peak, libraries = json.loads(done.stdout.strip().splitlines()[-1])
    return peak, libraries


def _run_once(request: str) -> None:
    import onnxruntime  # noqa: F401 - imported here so that it counts as a library for every candidate
    import transformers  # noqa: F401

    folder, batch, length, threads, provider, opening = json.loads(request)
    libraries = peak_memory()
    runner = open_runner(folder, provider, threads, **opening)
    generator = _generator([runner])
    runner(generator.batch(batch, length, [length] * batch).values)
    print(json.dumps([peak_memory(), libraries]))


if __name__ == "__main__":
    _run_once(sys.argv[1])
