"""Kill a piece of work at random moments; whatever it leaves must be refused, or be whole."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from lorafx.errors import ArtifactError
from lorafx.files.folder import FileEntry, find_manifest, new_folder, read_manifest
from lorafx.files.progress import noted_whole

#: A module-level function with its arguments.
Work = Callable[[], object]

#: Each piece of work is a process forked from one that has imported everything: imports take longer than most of what
#: is killed here, and nothing is written during them.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        *("tests.kill_nine", "lorafx.cli", "lorafx.frontend.load", "lorafx.backends.export"),
        *("lorafx.formats.shards", "transformers.models.bert.modeling_bert"),
    ]
)


# ---- what is killed


def command(*words: str | Path) -> Work:
    """A command of lorafx."""
    return partial(_command, [str(word) for word in words])


def _command(words: list[str]) -> None:
    from lorafx.cli import main

    main(words)


def save_runs(checkpoint: Path, out: Path) -> None:
    """Save one run ten times over itself."""
    import lorafx
    from lorafx.passes.lora import Lora

    program = lorafx.rewrite(lorafx.capture(checkpoint), [Lora(rank=2)])
    for _ in range(10):
        program.save(out, overwrite=True)


def write_files(out: Path) -> None:
    """Write a folder of many small files."""
    with new_folder(out, "run", {}, overwrite=True) as folder:
        for number in range(50):
            (folder / str(number)).write_bytes(bytes(1000))


def write_shards(out: Path) -> None:
    """Write a random encoder whose matrices are composed as they are written, as many small files that a writer after
    this one goes on with."""
    import torch
    from torch import nn
    from transformers import BertConfig, BertModel

    from lorafx.deferred.tensor import deferred
    from lorafx.formats.shards import write_checkpoint

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8}
    model = BertModel(BertConfig(**sizes, num_attention_heads=4, vocab_size=61, max_position_embeddings=32)).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            b, a = torch.randn(module.out_features, 4), torch.randn(4, module.in_features)
            folded = deferred(module.weight.detach().double()) + deferred(b.double()) @ deferred(a.double())
            module.weight = nn.Parameter(folded.float(), requires_grad=False)
    known: dict[str, FileEntry] = {}
    with new_folder(out, "hf", {}, overwrite=True, known=known, resume="made-from-this") as folder:
        known.update(write_checkpoint(model, folder, "20KB"))


# ---- the killing


@dataclass(frozen=True)
class Kills:
    """How often the command was killed before it ended, and how often a whole folder stood there afterwards."""

    killed: int
    whole: int


def kill_nine(work: Work, out: Path, tries: int, seed: int = 0) -> Kills:
    """Do ``work``, which writes ``out`` and may replace it, until ``tries`` of it were killed at a random moment.

    On a busy machine some end before the signal comes; ten times as many are begun at most. Every other time the clock
    starts when the command begins to write, seen by its temporary folder. At the end it runs undisturbed once more and
    must clear away what was left.

    Raises AssertionError when ``out``, or any folder left beside it, passes for whole and is not.
    """
    chance = random.Random(seed)
    _run(work, out)  # the first one starts the server and compiles what it imports
    total, writing = _run(work, out)
    assert _check(out), f"the work did not write {out}"
    killed = whole = 0
    for number in range(10 * tries):
        if killed == tries:
            break
        wait = number % 2 == 1
        hit = _kill(work, out, wait, chance.uniform(0, writing if wait else total))
        killed += hit
        if not hit:  # the machine was busier when the work was timed: it ends sooner now
            total, writing = 0.9 * total, 0.9 * writing
        whole += _check(out)
    _run(work, out)
    assert _check(out)
    left = [entry.name for entry in _beside(out)]
    assert not left, f"the work left {left}"
    return Kills(killed, whole)


@dataclass(frozen=True)
class Resumed:
    """How often work that is gone on with was killed, how often it came to its end, and in between how many files were
    found whole after a kill, and never written again."""

    killed: int
    ended: int
    kept: int


def kill_and_resume(work: Work, out: Path, tries: int, seed: int = 0) -> Resumed:
    """Do ``work``, which writes ``out``, again and again until ``tries`` of it were killed at a random moment; each
    goes on where the one before was killed. Where it ended, what it wrote is removed and it begins anew.

    Raises AssertionError when ``out``, or any folder left beside it, passes for whole and is not; when a file noted as
    whole is written again; or when an end is not, byte by byte, what undisturbed work leaves.
    """
    chance = random.Random(seed)
    _run(work, out)  # the first one starts the server and compiles what it imports
    expected = _bytes(out)
    shutil.rmtree(out)
    total, writing = _run(work, out)
    assert _bytes(out) == expected, f"two times {work} are not one folder"
    shutil.rmtree(out)
    killed = ended = kept = 0
    whole: dict[str, tuple[int, int]] = {}
    while killed < tries:
        wait = chance.random() < 0.5
        killed += _kill(work, out, wait, chance.uniform(0, writing if wait else total))
        done = _check(out)
        part = [entry for entry in _beside(out) if not done]
        now = _written(out, expected) if done else _written(part[0], _noted(part[0])) if part else {}
        assert {name: now.get(name) for name in whole} == whole, "what was whole was written again"
        kept, whole = kept + len(whole), now
        if done:
            assert _bytes(out) == expected, "what was gone on with is another folder"
            ended, whole = ended + 1, {}
            shutil.rmtree(out)
    _run(work, out)
    assert _bytes(out) == expected
    assert not _beside(out)
    return Resumed(killed, ended, kept)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _noted(folder: Path) -> set[str]:
    """The weight files of an unfinished folder that are complete, by its notes, or by its manifest if it was about to
    get its name."""
    with contextlib.suppress(ArtifactError):
        return {name for name in read_manifest(folder).files if name.endswith(".safetensors")}
    return set(noted_whole(folder))


def _written(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Which file it is that has a name, and when it was last written to."""
    found = {name: (folder / name).stat() for name in names}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def _start(work: Work) -> ForkServerProcess:
    process = _SERVER.Process(target=_quiet, args=(work,))
    process.start()
    return process


def _quiet(work: Work) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    work()


def _run(work: Work, out: Path) -> tuple[float, float]:
    """How long the undisturbed work took, and how long it was writing, in seconds."""
    known, started = _seen(out), time.perf_counter()
    process = _start(work)
    began = _began(process, out, known)
    process.join()
    assert process.exitcode == 0, f"{work} failed with {process.exitcode}"
    ended = time.perf_counter()
    return ended - started, ended - began


def _began(process: ForkServerProcess, out: Path, known: set[tuple[Path, int]]) -> float:
    """When the work began to write, into a folder of its own or one left by work before it, or ended."""
    while process.is_alive() and not _seen(out) - known:
        time.sleep(0.001)
    return time.perf_counter()


def _kill(work: Work, out: Path, wait: bool, after: float) -> bool:
    """Whether the work was still going on after so many seconds, and so was killed."""
    known = _seen(out)
    process = _start(work)
    if wait:
        _began(process, out, known)
    process.join(after)
    if not process.is_alive():
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


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
