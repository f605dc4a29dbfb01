"""How a written folder refers to others: with what it takes to find them, and nothing else about the machine.

Two folders with a common parent below the root of the file system refer to each other by relative paths: they can
be moved together, and no path of the machine that wrote them goes along.
"""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path


def relative_place(folder: str | PathLike[str], target: str | PathLike[str]) -> str | None:
    """The path of ``target`` relative to ``folder``, with ``/`` between the parts; None where only the root of the file
    system is above both."""
    start, end = Path(folder).resolve(), _physical(target)
    try:
        common = Path(os.path.commonpath([start, end]))
    except ValueError:  # two drives
        return None
    return None if common == Path(common.anchor) else Path(os.path.relpath(end, start)).as_posix()


def place_from(folder: str | PathLike[str], target: str | PathLike[str]) -> str:
    """:func:`relative_place`, or the absolute path where there is none: ``target`` has to be found again."""
    return relative_place(folder, target) or str(_physical(target))


def found_from(folder: str | PathLike[str], place: str) -> Path:
    """The path that ``folder`` calls ``place``."""
    return Path(os.path.normpath(Path(folder).resolve() / place))


def checkpoint_name(path: str | PathLike[str]) -> str:
    """The name for people of a checkpoint: ``org/name`` in Hugging Face's cache, else the name of its folder."""
    *_, owner, snapshots, name = ("", "", *_physical(path).parts)
    if snapshots == "snapshots" and owner.startswith("models--"):
        return owner.removeprefix("models--").replace("--", "/")
    return name


def _physical(path: str | PathLike[str]) -> Path:
    """An absolute path without symbolic links in its parents, so that ``..`` means the same to every reader; its last
    part is kept."""
    absolute = Path(os.path.abspath(path))
    return absolute.parent.resolve() / absolute.name
