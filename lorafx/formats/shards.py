"""Checkpoints written a tile at a time: no weight is ever in memory as a whole, and each byte is hashed on its way.

Which tensor is called what in a file, which of several names of one tensor is kept, and how tensors spread over files
is transformers' own: it is asked on the meta device. What it would then hold in memory is computed here and written.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from ..deferred.tiles import tiles
from ..files.folder import FileEntry

#: The format's names of dtypes (https://huggingface.co/docs/safetensors).
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAME, _INDEX = "model{suffix}.safetensors", "model.safetensors.index.json"


def write_checkpoint(model: nn.Module, folder: Path, shard_size: int | str = "5GB") -> dict[str, FileEntry]:
    """Write a transformers model whose parameters may be deferred as ``save_pretrained`` would.

    Args:
        model: in evaluation form; parameters and buffers may be of any dtype
        folder: an existing folder
        shard_size: bytes of a file at most, as a number or with a unit ("5GB")

    Returns:
        size and hash of every weight file
    """
    model.save_pretrained(folder, state_dict={})  # type: ignore[operator]  # everything but the weights
    state = _state(model)
    plan = split_torch_state_dict_into_shards(
        {name: _like(value) for name, value in state.items()}, filename_pattern=_NAME, max_shard_size=shard_size
    )
    entries = {
        name: write_file(folder / name, {key: state[key] for key in keys})
        for name, keys in plan.filename_to_tensors.items()
    }
    if plan.is_sharded:
        parameters = model.num_parameters()  # type: ignore[operator]
        index = {"metadata": {"total_parameters": parameters, **plan.metadata}, "weight_map": plan.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return entries


def _state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of the model holds, by the names it has there."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    held = {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in ignored}
    # Of meta tensors, ties are told by the model's own parameters, which are here what is tied.
    kept = remove_tied_weights_from_state_dict({name: _like(value) for name, value in held.items()}, model)  # type: ignore[arg-type]
    return revert_weight_conversion(model, {name: held[name].detach() for name in kept})  # type: ignore[arg-type]


def _like(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def write_file(file: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write one safetensors file from tensors that may be deferred; its size and sha256."""
    # The format's own order: wide dtypes first, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].dtype.itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        for part in (struct.pack("<Q", len(text)), text):
            stream.write(part)
            digest.update(part)
        for name in names:
            for part in _bytes(tensors[name]):
                stream.write(part)
                digest.update(part)
    return FileEntry(8 + len(text) + end, digest.hexdigest())


def _bytes(tensor: Tensor) -> Iterator[memoryview]:
    for tile in tiles(tensor if tensor.dim() else tensor.reshape(1)):
        if tile.numel():
            yield tile.contiguous().reshape(-1).view(torch.uint8).numpy().data
