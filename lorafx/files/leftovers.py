"""What killed writers of a folder leave beside it, told from what living ones are at by a lock, and cleared away."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on this platform: leftovers of killed writers stay until removed by hand
    fcntl = None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on ``folder`` that the system releases when the process ends, however it ends."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def sweep(target: Path, own: Path) -> None:
    """Clear away what killed writers of ``target`` left, but for ``own``: temporary folders no process holds, and a
    replaced folder."""
    for old in _siblings(target, "old"):
        # Killed between the two renames of an overwrite: the old folder is the only one, so it comes back.
        shutil.rmtree(old, ignore_errors=True) if target.exists() else old.rename(target)
    if fcntl is None:
        return
    for left in (entry for entry in _siblings(target, "tmp") if entry != own):
        handle = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            pass  # its writer is alive
        finally:
            os.close(handle)


def _siblings(target: Path, mark: str) -> list[Path]:
    return [entry for entry in target.parent.iterdir() if entry.name.startswith(f".{target.name}.{mark}-")]
