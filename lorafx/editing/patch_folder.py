"""Patches on checkpoint folders: put on, taken off and made tensor by tensor, so memory holds one tensor at a time.

Weight files are copied byte by byte except for the changed tensors, which stay in place: header, order and padding are
kept, so that a folder patched and reverted has exactly the files it had before. Bytes are hashed as they are written,
and a killed writer is resumed after the last complete file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArtifactError, UsageError
from ..files.folder import REMEDY, FileEntry, find_manifest, new_folder
from ..files.places import checkpoint_name
from ..formats.companions import copy_entry, inner_companions, is_of_its_weights, is_weights
from ..formats.shards import DTYPES, write_pieces, write_weights
from ..models.checkpoint import check_safetensors, read_config, weight_files
from ..models.hub import local_folder
from ..models.identity import check_written, written_hashes
from ..models.quantized import Quantization
from ..version import __version__
from .patch import Change, Patch, make

#: Where the tensors of a checkpoint of several files are.
INDEX = "model.safetensors.index.json"
#: Bytes that are copied at once.
_PART = 1 << 22
#: The dtypes of weights, by safetensors' names.
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Slot:
    """Where a tensor is stored: its file, the bytes from ``start`` to ``end``, dtype and shape."""

    file: Path
    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor."""
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            data = bytearray(self.end - self.start)
            stream.readinto(data)
        flat = torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)
        return flat.reshape(self.shape)


def apply(checkpoint: str | PathLike[str], patch: Patch, out: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Write the patched checkpoint: a copy of the folder's files, with the patch's weights in its safetensors files.

    Args:
        checkpoint: an ordinary checkpoint folder, sharded or not
        patch: what to change
        out: the folder to make; it appears whole or not at all. Weights in other formats are not copied, nor are
            scores, reports and certificates: they tell of the weights as they were
        overwrite: replace ``out`` if lorafx wrote it

    Raises:
        ArtifactError: the folder is damaged, is not the one the patch is for (names the tensor), or is already patched
        UsageError: not a checkpoint folder, or ``out`` exists
    """
    _exchange(checkpoint, patch, out, undo=False, overwrite=overwrite)


def revert(checkpoint: str | PathLike[str], patch: Patch, out: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Write the checkpoint as it was before :func:`apply`, every byte of every tensor. Arguments and errors as there.

    ArtifactError when the patch is not applied to ``checkpoint``.
    """
    _exchange(checkpoint, patch, out, undo=True, overwrite=overwrite)


def between(base: str | PathLike[str], edited: str | PathLike[str]) -> Patch:
    """The patch from one checkpoint folder to another of the same tensors, e.g. from a base to its folded rewrite."""
    folders = local_folder(base), local_folder(edited)
    for folder in folders:
        check_written(folder)
    old, new = map(slots, folders)
    for name in sorted(old.keys() ^ new.keys()):
        raise UsageError(f"no patch between {base} and {edited}: {name} is in one of the two only")
    changes: list[Change] = []
    for name in old:
        changes += make({name: old[name].read()}, {name: new[name].read()}).changes
    return Patch(tuple(changes))


def slots(checkpoint: Path) -> dict[str, Slot]:
    """Where every tensor of a checkpoint folder is stored, by name, in the order of its files."""
    manifest = find_manifest(checkpoint)
    if manifest is not None and manifest.kind != "hf":
        raise UsageError(
            f"{checkpoint}: a folder of kind {manifest.kind}, not a checkpoint; patches are for checkpoints"
        )
    quantization = Quantization.of(read_config(checkpoint))
    if quantization is not None:
        raise ArtifactError(
            f"{checkpoint}: its weights are quantised ({quantization.method}), and a patch needs them in full; fold or "
            "export it as a checkpoint first"
        )
    files = weight_files(checkpoint, allow_pickle=True)
    odd = [file for file in files if file.suffix != ".safetensors"]
    if odd or not files:
        found = f"{odd[0].name} is pickled" if odd else "there are none"
        raise ArtifactError(
            f"{checkpoint}: a patch needs weights in safetensors files; {found}: save it again as those"
        )
    return {name: slot for file in files for name, slot in _slots(file)}


def _slots(file: Path) -> Iterator[tuple[str, Slot]]:
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
    for name, entry in check_safetensors(file).items():
        if entry["dtype"] not in _DTYPES:
            raise ArtifactError(f"{file}: {name} is {entry['dtype']}, which patches cannot read")
        begin, end = entry["data_offsets"]
        yield name, Slot(file, start + begin, start + end, _DTYPES[entry["dtype"]], tuple(entry["shape"]))


def _exchange(checkpoint: Any, patch: Patch, out: Any, *, undo: bool, overwrite: bool) -> None:
    folder = local_folder(checkpoint)
    held = slots(folder)
    pairs = [(change, slot) for change in patch.changes for slot in _found(folder, held, change)]
    for change, slot in pairs:  # all of them before the first byte is copied: a wrong base is reported at once
        change.check(slot.read(), str(folder), undo=undo)
    meta = {"checkpoint": checkpoint_name(folder), "patch": "reverted" if undo else "applied", "changed": patch.changed}
    files = {slot.file for slot in held.values()}
    size = sum(file.stat().st_size for file in files)
    as_written = written_hashes(folder)
    writers = {
        file.name: partial(_write_patched, file, _of(pairs, file), undo, as_written.get(file.name))
        for file in sorted(files)
    }
    known: dict[str, FileEntry] = {}
    with new_folder(out, "hf", meta, overwrite, known, _digest(patch, files, undo)) as target:
        for name in (*_top_files(folder), *inner_companions(folder)):
            if name not in writers:
                copy_entry(folder / name, target / name)
        known.update(write_weights(target, writers, size))


_Pairs = list[tuple[Change, Slot]]


def _of(pairs: _Pairs, file: Path) -> _Pairs:
    """The changes to one file, in the order of its bytes."""
    return sorted((pair for pair in pairs if pair[1].file == file), key=lambda pair: pair[1].start)


def _write_patched(
    file: Path, pairs: _Pairs, undo: bool, known: str | None, target: Path, progress: Callable[[int], object]
) -> FileEntry:
    """Write ``file`` again as ``target``, with the tensors in ``pairs`` exchanged. ArtifactError where its sha256 is
    ``known`` and it is another: a manifest would vouch for the copy."""
    seen = hashlib.sha256()
    see = seen.update if known is not None else len  # nobody asks

    def pieces() -> Iterator[Iterable[memoryview]]:
        place = 0
        for change, slot in pairs:
            yield _copied(file, place, slot.start, see)
            value = slot.read()
            for part in _parts(value):
                see(part)
            yield _parts(change.exchanged(value, undo=undo))
            place = slot.end
        yield _copied(file, place, file.stat().st_size, see)

    entry = write_pieces(target, pieces(), progress)
    if known not in (None, seen.hexdigest()):
        raise ArtifactError(
            f"{file}: not the file that was written (its sha256 differs); write the folder again, {REMEDY}"
        )
    return entry


def _copied(file: Path, start: int, end: int, see: Callable[[memoryview], object]) -> Iterator[memoryview]:
    """A part of a file in pieces, each shown to ``see``."""
    with file.open("rb") as stream:
        stream.seek(start)
        for place in range(start, end, _PART):
            part = memoryview(stream.read(min(_PART, end - place)))
            see(part)
            yield part


def _parts(value: Tensor) -> Iterator[memoryview]:
    data = value.reshape(-1).view(torch.uint8).numpy().data
    yield from (data[place : place + _PART] for place in range(0, len(data), _PART))


def _digest(patch: Patch, files: Iterable[Path], undo: bool) -> str:
    """What a patched folder is made from: the patch, and the files as they are on disk."""
    changes = [(change.names, change.before, change.after) for change in patch.changes]
    stats = {str(file.absolute()): (file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)}
    return hashlib.sha256(json.dumps([__version__, undo, changes, stats]).encode()).hexdigest()[:16]


def _top_files(folder: Path) -> list[str]:
    """All files that still hold for other weights: no scores, reports nor certificates. Weights go only with the index
    that places them; those that no patch reaches, in other formats say, would not match the patched folder."""
    names = [file.name for file in folder.iterdir() if file.is_file() and not is_of_its_weights(file.name)]
    return sorted(name for name in names if name == INDEX or not is_weights(name))


def _found(folder: Path, held: dict[str, Slot], change: Change) -> list[Slot]:
    """Where the tensor is stored: a tied one usually once, under any of its names."""
    found = [held[name] for name in change.names if name in held]
    if not found:
        raise ArtifactError(f"{folder}: wrong base: it holds no {change.name}; the patch is for another model")
    return found
