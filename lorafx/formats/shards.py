"""Checkpoints written a tile at a time: no weight is ever in memory as a whole, and each byte is hashed on its way.

Names in files, which of several names of one tensor is kept, and how tensors are spread over files are left to
transformers, run on the meta device. The values, which it would hold in memory, are computed here as they are written.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers.utils import logging as hf_logging
from transformers.utils.logging import tqdm

from ..deferred.tensor import passing_tiles
from ..files.folder import FileEntry, found
from ..files.progress import note_whole, noted_whole
from ..models.layered import own_configs

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: The format's names of dtypes (https://huggingface.co/docs/safetensors), in the order in which it writes them.
DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAME, _INDEX = "model{suffix}.safetensors", "model.safetensors.index.json"
#: Tiles that wait to be written.
_WAITING = 4
#: Bytes that take long enough to be watched.
_LONG = 1 << 28


def write_checkpoint(model: Any, folder: Path, shard_size: int | str = "5GB") -> dict[str, FileEntry]:
    """Write a transformers model whose parameters may be deferred as ``save_pretrained`` would.

    Weight files that an interrupted run completed in ``folder`` are kept, if ``new_folder`` resumed it.

    Args:
        model: in evaluation form; parameters and buffers may be of any dtype
        folder: an existing folder
        shard_size: the most bytes in a file, as a number or with a unit ("5GB")

    Returns:
        size and hash of every weight file
    """
    with TemporaryDirectory(dir=folder) as beside:  # transformers deletes the weight files that it finds
        with own_configs(model.config), _no_bars():
            model.save_pretrained(beside, state_dict={})  # everything but the weights
        for file in Path(beside).iterdir():
            file.replace(folder / file.name)
    state = _state(model)
    plan = split_torch_state_dict_into_shards(
        {name: _like(value) for name, value in state.items()}, filename_pattern=_NAME, max_shard_size=shard_size
    )

    def writer(keys: list[str]) -> Writer:
        return lambda file, progress: write_file(file, {key: state[key] for key in keys}, progress)

    size = sum(value.numel() * value.dtype.itemsize for value in state.values())
    entries = write_weights(folder, {name: writer(keys) for name, keys in plan.filename_to_tensors.items()}, size)
    if plan.is_sharded:
        parameters = model.num_parameters()
        index = {"metadata": {"total_parameters": parameters, **plan.metadata}, "weight_map": plan.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return entries


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hide transformers' progress bar over weight files: it writes none."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


#: Writes one file and reports bytes as they are written.
Writer = Callable[[Path, Callable[[int], object]], FileEntry]


def write_weights(folder: Path, writers: Mapping[str, Writer], size: int) -> dict[str, FileEntry]:
    """Write the weight files of a ``new_folder``, each noted when it is complete; those noted before are kept.

    Args:
        writers: what writes each file, by its name
        size: bytes of all of them, roughly; for many, progress is shown

    Returns:
        size and hash of every file
    """
    entries = _whole(folder, writers)
    with tqdm(total=size, unit="B", unit_scale=True, desc="Writing weights", disable=size < _LONG) as bar:
        bar.update(sum(entry.size for entry in entries.values()))
        for name, write in writers.items():
            if name not in entries:
                entries[name] = write(folder / name, bar.update)
                note_whole(folder, {name: (entry.size, entry.sha256) for name, entry in entries.items()})
    return entries


def _whole(folder: Path, wanted: Iterable[str]) -> dict[str, FileEntry]:
    """The files ``wanted`` that an interrupted run finished, as its notes say and their hashes confirm; others that it
    noted are removed."""
    entries = {}
    for name, noted in noted_whole(folder).items():
        file, entry = folder / name, FileEntry(*noted)
        if name not in wanted:
            file.unlink(missing_ok=True)
        elif file.is_file() and found(file) == entry:
            entries[name] = entry
    return entries


def _state(model: Any) -> dict[str, Tensor]:
    """What a checkpoint of the model holds, by the names it has there."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    held = {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in ignored}
    # For meta tensors, ties follow from the model's own parameters.
    kept = remove_tied_weights_from_state_dict({name: _like(value) for name, value in held.items()}, model)
    return revert_weight_conversion(model, {name: held[name].detach() for name in kept})


def _like(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def write_file(file: Path, tensors: Mapping[str, Tensor], progress: Callable[[int], object] = int) -> FileEntry:
    """Write one safetensors file from tensors that may be deferred; its size and sha256.

    ``progress`` is told of bytes as they are written.
    """
    # Wide dtypes first, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (list(DTYPES).index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].dtype.itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head: list[Buffer] = [struct.pack("<Q", len(text)), text]
    return write_pieces(file, chain([head], (_bytes(tensors[name]) for name in names)), progress)


def write_pieces(file: Path, pieces: Iterable[Iterable[Buffer]], progress: Callable[[int], object] = int) -> FileEntry:
    """Write a file of pieces, one after another, each in parts; returns its size and sha256, computed meanwhile.

    A few parts wait to be written while the next is made; a piece may be freed when the next one begins. ``progress``
    is told of bytes as they are written.
    """
    size = 0
    with file.open("wb") as stream, _Writer(stream) as out:
        for piece in pieces:
            size += out.put_all(piece, progress)
    return FileEntry(size, out.digest.hexdigest())


class _Writer:
    """Writes and hashes in a thread of its own, in order, while the next tile is computed; a few wait at most."""

    def __init__(self, stream: BinaryIO):
        self.digest = hashlib.sha256()
        self._stream = stream
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def put(self, part: Buffer) -> None:
        """Write ``part``, soon. Raises what went wrong with an earlier one."""
        while len(self._waiting) >= _WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write, part))

    def put_all(self, parts: Iterable[Buffer], progress: Callable[[int], object]) -> int:
        """Write ``parts``, and wait until they are written; their bytes."""
        size = 0
        for part in parts:
            self.put(part)
            size += memoryview(part).nbytes
            progress(memoryview(part).nbytes)
        self.wait()
        return size

    def wait(self) -> None:
        """Wait until all is written; raises what went wrong."""
        while self._waiting:
            self._waiting.popleft().result()

    def _write(self, part: Buffer) -> None:
        self._stream.write(part)
        self.digest.update(part)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown(cancel_futures=True)


def _bytes(tensor: Tensor) -> Iterator[memoryview]:
    for tile in passing_tiles(tensor if tensor.dim() else tensor.reshape(1)):
        if tile.numel():
            yield tile.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
