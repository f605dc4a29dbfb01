"""Runs that are processes of their own, some at a time, each when those it needs are finished."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        name: what messages call it
        command: what to start; its last act is to write ``done``
        done: the file that says it is finished
        needs: the files of runs it begins with
    """

    name: str
    command: Sequence[str]
    done: Path
    needs: tuple[Path, ...] = ()


def threads_each(jobs: int) -> int:
    """The cores shared out evenly; fewer where the environment says so."""
    shared = max(1, (os.cpu_count() or 1) // jobs)
    return min(shared, int(os.environ.get("OMP_NUM_THREADS") or shared))


def run_missing(
    jobs: Sequence[Job], at_once: int, environment: Mapping[str, str] | None = None, until: float | None = None
) -> list[str]:
    """Run what is not finished, ``at_once`` at a time, in the order given; the names of runs that failed.

    A run that fails is reported, and the others go on; one that needs it fails with it. ``until`` is a moment of
    ``time.monotonic`` after which none begins.
    """
    waiting = [job for job in jobs if not job.done.is_file()]
    running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
    failed: list[str] = []
    shared = {**os.environ, "OMP_NUM_THREADS": str(threads_each(at_once)), **(environment or {})}
    while waiting or running:
        if until is not None and time.monotonic() > until:
            waiting.clear()
        coming = {job.done for job in waiting} | {job.done for job, _ in running.values()}
        for job in list(waiting):
            lacking = [file for file in job.needs if not file.is_file()]
            if any(file not in coming for file in lacking):
                failed.append(job.name)
                waiting.remove(job)
                print(f"{job.name} cannot begin: what it needs failed", file=sys.stderr, flush=True)
            elif not lacking and len(running) < at_once:
                waiting.remove(job)
                running[job.name] = job, subprocess.Popen(job.command, env=shared)
        for name, (job, process) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            if process.returncode or not job.done.is_file():
                failed.append(name)
                print(f"{name} failed (exit status {process.returncode})", file=sys.stderr, flush=True)
        time.sleep(0.2)
    return failed
