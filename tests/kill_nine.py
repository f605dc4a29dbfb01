"""Kill a command at random moments; whatever it leaves must be refused, or be whole."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafx.errors import ArtifactError
from lorafx.files.folder import find_manifest, read_manifest


@dataclass(frozen=True)
class Kills:
    """How often the command was killed before it ended, and how often a whole folder stood there afterwards."""

    killed: int
    whole: int


def kill_nine(command: Sequence[str], out: Path, tries: int, seed: int = 0) -> Kills:
    """Run ``command``, which writes ``out`` and may replace it, until ``tries`` of it were killed at a random moment.

    On a busy machine some end before the signal comes; ten times as many are begun at most. Every other time the clock
    starts when the command begins to write, seen by its temporary folder. At the end it runs undisturbed once more and
    must clear away what was left.

    Raises AssertionError when ``out``, or any folder left beside it, passes for whole and is not.
    """
    chance = random.Random(seed)
    _run(command, out)  # the first one compiles what it imports, which takes longer than the command itself
    total, writing = _run(command, out)
    assert _check(out), f"the command did not write {out}"
    killed = whole = 0
    for number in range(10 * tries):
        if killed == tries:
            break
        wait = number % 2 == 1
        hit = _kill(command, out, wait, chance.uniform(0, writing if wait else total))
        killed += hit
        if not hit:  # the machine was busier when the command was timed: it ends sooner now
            total, writing = 0.9 * total, 0.9 * writing
        whole += _check(out)
    _run(command, out)
    assert _check(out)
    left = [entry.name for entry in _beside(out)]
    assert not left, f"the command left {left}"
    return Kills(killed, whole)


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    # A session of its own, so that what it starts is killed with it.
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def _run(command: Sequence[str], out: Path) -> tuple[float, float]:
    """How long the undisturbed command took, and how long it was writing, in seconds."""
    known, started = _seen(out), time.perf_counter()
    process = _start(command)
    began = _began(process, out, known)
    assert process.wait() == 0, f"{list(command)} failed with {process.returncode}"
    ended = time.perf_counter()
    return ended - started, ended - began


def _began(process: subprocess.Popen[bytes], out: Path, known: set[tuple[Path, int]]) -> float:
    """When the command began to write, into a folder of its own or one left by a command before it, or ended."""
    while process.poll() is None and not _seen(out) - known:
        time.sleep(0.001)
    return time.perf_counter()


def _kill(command: Sequence[str], out: Path, wait: bool, after: float) -> bool:
    """Whether the command was still running after so many seconds, and so was killed."""
    known = _seen(out)
    process = _start(command)
    if wait:
        _began(process, out, known)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def _seen(out: Path) -> set[tuple[Path, int]]:
    """The folders beside ``out``, as they are now."""
    found = set()
    for entry in _beside(out):
        with contextlib.suppress(FileNotFoundError):
            found.add((entry, entry.stat().st_mtime_ns))
    return found


def _beside(out: Path) -> list[Path]:
    return [entry for entry in out.parent.iterdir() if entry.name.startswith(f".{out.name}.")]


def _check(out: Path) -> bool:
    """Whether ``out`` is whole. Whatever :func:`find_manifest` accepts must be, the folders beside it included."""
    accepted = []
    for folder in [out, *_beside(out)]:
        with contextlib.suppress(ArtifactError):
            manifest = find_manifest(folder)
            assert manifest is not None, f"{folder} passes for an ordinary checkpoint"
            read_manifest(folder, hashes=True)
            accepted.append(folder)
    return out in accepted
