"""Folders that are whole or not there: written beside their place, synced, sealed by a manifest, then renamed.

``lorafx.json`` is written last and names every other file with its size and hash. A folder without it, or whose files
are not the ones it names, is incomplete and is refused by name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from ..errors import ArtifactError, UsageError
from .leftovers import locked, sweep
from .progress import PROGRESS, end_progress, keep_whole, note_whole
from .whole import writing

MANIFEST = "lorafx.json"
#: The version of the format this code writes, and the newest it reads.
FORMAT = 1
LFS_START = b"version https://git-lfs"
#: What to do with a folder that was changed on purpose: what lorafx knows of it no longer holds.
REMEDY = f"or remove {MANIFEST} if another tool was to change it"
#: Kinds of folders that nothing but lorafx writes.
_LORAFX_ALONE = ("run", "edit")
_WEIGHTS = ".safetensors"
_TEMPORARY = re.compile(r"\..+\.(tmp|old)-.+")


@dataclass(frozen=True)
class FileEntry:
    """What a manifest says of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of ``lorafx.json``.

    Attributes:
        path: the folder
        kind: what the folder is: ``run``, or the format it was exported to (``hf``, ``onnx``, ``pt2``, ``peft``, …)
        version: the version of lorafx that wrote it
        meta: what its writer recorded: the base checkpoint, the recipe, …
        files: every other file by its path below the folder, with ``/`` between the parts
    """

    path: Path
    kind: str
    version: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The manifest as ``lorafx.json`` holds it."""
        files = {name: {"bytes": entry.size, "sha256": entry.sha256} for name, entry in self.files.items()}
        return {"format": FORMAT, "kind": self.kind, "lorafx": self.version, "meta": dict(self.meta), "files": files}


def file_hash(file: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---- reading


def find_manifest(path: str | PathLike[str]) -> Manifest | None:
    """The manifest of a folder lorafx wrote, or None when another tool did (an ordinary checkpoint).

    ArtifactError as :func:`read_manifest`, and for a folder that lorafx began and did not finish.
    """
    folder = Path(path)
    unfinished = (folder / "recipe.toml").is_file() or _TEMPORARY.fullmatch(folder.name)
    if folder.is_dir() and not (folder / MANIFEST).exists() and not unfinished:
        return None
    return read_manifest(folder)


def read_manifest(path: str | PathLike[str], *, hashes: bool = False) -> Manifest:
    """The manifest of a folder lorafx wrote, after checking that the folder is whole.

    Args:
        path: the folder
        hashes: compare the files' contents with their sha256, not their sizes alone

    Raises:
        ArtifactError: no such folder, no or a broken manifest, one of a newer format, or a file that is missing,
            truncated, changed or a git-lfs pointer
    """
    manifest = manifest_of(path)
    # What others read too, another tool may have been meant to change: to train a checkpoint in place, say.
    remedy = "write the folder again" + ("" if manifest.kind in _LORAFX_ALONE else f", {REMEDY}")
    for name, entry in manifest.files.items():
        _check(manifest.path, name, entry, hashes, remedy)
    return manifest


def manifest_of(path: str | PathLike[str]) -> Manifest:
    """The manifest of a folder lorafx wrote, whole or not. ArtifactError: no such folder, no or a broken manifest."""
    folder = Path(path)
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder")
    file = folder / MANIFEST
    if not file.is_file():
        raise ArtifactError(f"{folder}: no {MANIFEST}: not written by lorafx, or not to the end; write it again")
    try:
        return _parse(folder, json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{file}: broken manifest; write the folder again") from None


def _parse(folder: Path, data: Mapping[str, Any]) -> Manifest:
    if data["format"] > FORMAT:
        found = f"format {data['format']}, written by lorafx {data['lorafx']}"
        raise ArtifactError(f"{folder}: {found}; this lorafx reads up to format {FORMAT}: upgrade lorafx")
    files = {name: FileEntry(int(entry["bytes"]), str(entry["sha256"])) for name, entry in data["files"].items()}
    inside = all(not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts for name in files)
    if not inside or not isinstance(data["meta"], Mapping):
        raise ValueError(files)
    return Manifest(folder, str(data["kind"]), str(data["lorafx"]), data["meta"], files)


def _check(folder: Path, name: str, entry: FileEntry, hashes: bool, remedy: str) -> None:
    file = folder / name
    if not file.is_file():
        raise ArtifactError(f"{folder}: {name} is missing; {remedy}")
    size = file.stat().st_size
    if size != entry.size:
        if is_lfs_pointer(file):
            raise ArtifactError(f"{file}: a git-lfs pointer, not the file; run `git lfs pull` in that folder")
        raise ArtifactError(f"{file}: {size} bytes where {MANIFEST} says {entry.size}; {remedy}")
    if hashes and file_hash(file) != entry.sha256:
        raise ArtifactError(f"{file}: not the file that was written (its sha256 differs); {remedy}")


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is the short text that git-lfs leaves in place of a large file."""
    with file.open("rb") as stream:
        return stream.read(len(LFS_START)) == LFS_START


# ---- writing


@contextmanager
def new_folder(
    path: str | PathLike[str],
    kind: str,
    meta: Mapping[str, Any],
    overwrite: bool = False,
    known: Mapping[str, FileEntry] = MappingProxyType({}),
    resume: str = "",
) -> Iterator[Path]:
    """Write a folder that appears under ``path`` whole or not at all.

    Yields a temporary folder beside it to write into. When the block ends well, the manifest is written, everything is
    synced and the folder renamed; when it raises, nothing is left. A killed process leaves a hidden folder at most,
    which the next one that writes to ``path`` removes.

    Args:
        path: the folder to make; its parents are made too
        kind: what it is (see :class:`Manifest`)
        meta: what to record, JSON values
        overwrite: replace a folder that lorafx wrote; any other existing path is refused
        known: files that were hashed as they were written, by then: they are not read again
        resume: what the folder is made from, as a short digest. If the process is killed or interrupted, the files that
            it noted as whole (:mod:`.progress`) stay, and the next one that makes ``path`` from the same goes on with
            them

    Raises:
        UsageError: ``path`` exists
        ArtifactError: it cannot be written (no permission, no space)
    """
    target = Path(path).resolve()
    name = f"part-{resume}" if resume else f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary = target.with_name(f".{target.name}.tmp-{name}")
    kept = False
    try:
        with writing(target):
            check_free(target, overwrite)
            target.parent.mkdir(parents=True, exist_ok=True)
            sweep(target, temporary)
            temporary.mkdir(exist_ok=bool(resume))
            with locked(temporary):
                _reopen(temporary)
                keep_whole(temporary)
                yield temporary
                _seal(temporary, kind, meta, known)
                _publish(temporary, target, overwrite)
    except BlockingIOError:
        kept = True  # another process is at it
        raise UsageError(f"{target}: another process is writing this; wait for it, or choose another folder") from None
    except KeyboardInterrupt:
        kept = bool(resume)
        raise
    finally:
        if not kept:
            shutil.rmtree(temporary, ignore_errors=True)


def check_free(target: Path, overwrite: bool) -> None:
    """UsageError when ``target`` cannot be written: it exists and may not, or must not, be replaced, or it would lie in
    a folder that is whole as it is."""
    whole = next((above for above in target.parents if (above / MANIFEST).is_file()), None)
    if whole is not None:
        raise UsageError(f"{target}: lies in {whole}, which lorafx wrote and names all it holds; choose another folder")
    if is_free(target):
        return
    if not overwrite:
        raise UsageError(f"{target}: exists already; choose another folder, or overwrite it (--overwrite)")
    if not (target / MANIFEST).is_file():
        raise UsageError(f"{target}: lorafx did not write this, so it is not overwritten; remove it by hand")
    foreign = _foreign(target)
    if foreign:
        raise UsageError(f"{target}: holds {foreign}, which lorafx did not write; move that away to overwrite the rest")


def check_writable(path: str | PathLike[str], overwrite: bool) -> None:
    """Refuse, before hours of work and not after, what :func:`new_folder` would refuse of ``path``: UsageError where
    something is, ArtifactError where no folder can be made, in a file or in what may not be written to."""
    target = Path(path).resolve()
    with writing(target):
        check_free(target, overwrite)
        parent = next(above for above in target.parents if above.exists())
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{parent} is a file")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{parent} may not be written to")


def is_free(target: Path) -> bool:
    """Whether nothing is at ``target``, or an empty folder."""
    return not (target.exists() or target.is_symlink()) or (target.is_dir() and not any(target.iterdir()))


def _foreign(target: Path) -> str:
    """A file in a folder of lorafx's that its manifest does not name; hidden ones are left to desktops and editors."""
    try:
        known = {*manifest_of(target).files, MANIFEST}
    except ArtifactError:  # damaged: what it was is not known any more, and that it is to be written again is
        return ""
    found = sorted(file.relative_to(target).as_posix() for file in target.rglob("*") if file.is_file())
    shown = (name for name in found if not any(part.startswith(".") for part in PurePosixPath(name).parts))
    return next((name for name in shown if name not in known), "")


def _reopen(folder: Path) -> None:
    """Note the weight files of a sealed folder as complete: its writer was killed after it had removed its notes, and
    before the folder got its name. All else is written again."""
    with suppress(ArtifactError):
        files = read_manifest(folder).files
        note_whole(folder, {name: (one.size, one.sha256) for name, one in files.items() if name.endswith(_WEIGHTS)})


def _seal(folder: Path, kind: str, meta: Mapping[str, Any], known: Mapping[str, FileEntry]) -> None:
    """Write the manifest, and bring everything to the disk before the folder gets its name."""
    from ..version import __version__

    found_here = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    names = sorted(name for name in found_here if name != PROGRESS)
    files = {name: known.get(name) or found(folder / name) for name in names}
    record = Manifest(folder, kind, __version__, meta, files).to_json()
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    for name in names:
        _opened_to_readers(folder / name)
        _sync(folder / name)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    _sync(folder / MANIFEST)
    for inner in [*(entry for entry in folder.rglob("*") if entry.is_dir()), folder]:
        _sync(inner)


def _opened_to_readers(file: Path) -> None:
    """Give a file the permissions any new one has; some libraries write theirs for the owner alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    file.chmod(file.stat().st_mode & 0o111 | 0o666 & ~umask)


def found(file: Path) -> FileEntry:
    """What a manifest would say of a file, which is read for it."""
    return FileEntry(file.stat().st_size, file_hash(file))


def _publish(temporary: Path, target: Path, overwrite: bool) -> None:
    check_free(target, overwrite)  # again: another process may have written it meanwhile
    aside = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    if target.exists():
        target.rename(aside)
    try:
        end_progress(temporary)  # at the last moment: until then a killed writer is gone on with
        temporary.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # a folder cannot be synced there
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
