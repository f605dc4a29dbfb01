"""The progress of a folder that is being written: which of its files are complete, recorded in the folder itself.

A writer that resumes a killed one's work keeps those and nothing else: half a file, or a temporary folder, must not
pass for a part of the result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

#: Hidden, and removed before the folder gets its name.
PROGRESS = ".written.json"
_NEW = f"{PROGRESS}.new"
#: What is in a folder while it is written, and no part of it.
PASSING = frozenset((PROGRESS, _NEW))


def note_whole(folder: Path, files: Mapping[str, tuple[int, str]]) -> None:
    """Record the files that are complete: size in bytes and sha256, by name. A killed process leaves the old record or
    the new one."""
    (folder / _NEW).write_text(json.dumps(files), encoding="utf-8")
    (folder / _NEW).replace(folder / PROGRESS)


def noted_whole(folder: Path) -> dict[str, tuple[int, str]]:
    """What :func:`note_whole` recorded last; empty where there is no readable record."""
    try:
        noted = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        return {str(name): (int(size), str(digest)) for name, (size, digest) in noted.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def keep_whole(folder: Path) -> None:
    """Remove everything from a folder except the files recorded as complete, and the record."""
    known = {PROGRESS, *noted_whole(folder)}
    for entry in folder.iterdir():
        if entry.name not in known:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def end_progress(folder: Path) -> None:
    """Remove the record: the folder is complete."""
    for name in PASSING:
        (folder / name).unlink(missing_ok=True)
