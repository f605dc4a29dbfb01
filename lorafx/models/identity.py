"""What identifies the weight files of a checkpoint: their sha256, or what is known where no weight is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from ..errors import ArtifactError
from ..files.folder import MANIFEST, REMEDY, file_hash, find_manifest
from .checkpoint import weight_files

#: What an identity begins with that is told without reading weights: of a file's header, its size, and when it was
#: modified.
_BY_HEADER = "header:"


def weight_hashes(path: Path, *, read: bool = True) -> dict[str, str]:
    """What identifies each weight file of a checkpoint folder, by file name: its sha256.

    Without ``read``, no weight is read of safetensors files. In a folder that lorafx wrote, its manifest says their
    sha256. Elsewhere their size and the sha256 of their header (which has the names and shapes) stand for them, marked
    as such, with their time of modification.
    """
    files = weight_files(path, allow_pickle=True)
    if read:
        return {file.name: file_hash(file) for file in files}
    known = written_hashes(path)
    return {file.name: known.get(file.name) or _unread(file) for file in files}


def check_written(checkpoint: Path, hashes: Mapping[str, str] | None = None) -> None:
    """ArtifactError for weights that are not those which lorafx wrote, if it wrote the checkpoint: what they are was
    proven then. ``hashes`` are of its weight files, which are read for them by default."""
    known = written_hashes(checkpoint)
    hashes = weight_hashes(checkpoint) if known and hashes is None else hashes or {}
    for name in hashes.keys() & known.keys() - set(by_header(hashes)):
        if hashes[name] != known[name]:
            raise ArtifactError(
                f"{checkpoint / name}: not the file that was written (its sha256 differs); write the folder again, "
                f"{REMEDY}"
            )


def has_identity(file: Path, known: str) -> bool:
    """Whether a file is the one that an identity was taken of, by what that is of; but for its time of modification,
    which copying a file may change."""
    if not known.startswith(_BY_HEADER):
        return file_hash(file) == known
    return _timeless(_by_header(file)) == _timeless(known)


def by_header(hashes: Mapping[str, str]) -> list[str]:
    """The files known only by their headers, sizes and times."""
    return [name for name, identity in hashes.items() if identity.startswith(_BY_HEADER)]


def modified(file: Path, known: str) -> bool:
    """Whether a file known by its header has another time of modification: whether its weights are the same cannot be
    told, for a copy may have one too."""
    return known.startswith(_BY_HEADER) and _timeless(known) != known and _by_header(file) != known


def written_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file in a folder that lorafx wrote; nothing of others."""
    manifest = find_manifest(folder) if (folder / MANIFEST).is_file() else None
    return {} if manifest is None else {name: entry.sha256 for name, entry in manifest.files.items()}


def _unread(file: Path) -> str:
    return _by_header(file) if file.suffix == ".safetensors" else file_hash(file)


def _by_header(file: Path) -> str:
    with file.open("rb") as stream:
        start = stream.read(8)
        header = stream.read(int.from_bytes(start, "little"))
    about = file.stat()
    return f"{_BY_HEADER}{hashlib.sha256(start + header).hexdigest()}:{about.st_size}:{about.st_mtime_ns}"


def _timeless(identity: str) -> str:
    """An identity of a header without the time of modification, which earlier ones have not."""
    return ":".join(identity.split(":")[:3])
