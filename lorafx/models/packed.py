"""Weights that GPTQ and AWQ packed, several to an integer, as the numbers that they stand for.

Both store an integer q of a few bits for each weight and, for each group of inputs and each output, a scale s and a
zero point z: the weight is ``s (q - z)``, exact in fp32 when s has the 11 bits of fp16. The layouts are those of
GPTQModel and AutoAWQ.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ArtifactError

#: Where a ``config.json`` says how its weights are quantised; in a model of several parts, perhaps for one part only.
KEYS = ("quantization_config", "compression_config")
_INDEX = "model.safetensors.index.json"
#: What a packed weight is stored as, below its module.
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
#: Where AWQ puts each of eight neighbours in a word.
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
#: The layouts that are known, the one that is meant where a config names none first, and the keys by which they are
#: named: those of AutoGPTQ, AutoAWQ, and of GPTQModel since it reads both.
_LAYOUTS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
_NAMED_BY = ("checkpoint_format", "version", "format")
#: Other settings of a config that change what the numbers stand for.
_CHANGES = ("dynamic", "planar", "adapter", "rotation")
_BITS = {"gptq": (2, 4, 8), "awq": (4,)}


def check_layout(path: Path, method: str, config: Mapping[str, Any]) -> None:
    """ArtifactError for a layout that is not known here."""
    named, bits = _named(config), config.get("bits", config.get("w_bit"))
    strange = [name for name in named if name not in _LAYOUTS[method]] or named[1:]  # of two names, which is right?
    odd = f"layout {strange[0]}" if strange else f"{bits} bits" if bits not in _BITS[method] else ""
    odd = odd or next((f"{name} set" for name in _CHANGES if config.get(name)), "")
    if odd:
        raise ArtifactError(
            f"{path}: its weights are quantised ({method} with {odd}), which is not dequantised here; give the "
            "checkpoint it was made from"
        )


def _named(config: Mapping[str, Any]) -> list[str]:
    """The layouts that a config names, each once."""
    return list(dict.fromkeys(str(config[key]).lower() for key in _NAMED_BY if config.get(key)))


@contextmanager
def unpacked(path: Path, files: list[Path], method: str, config: Mapping[str, Any]) -> Iterator[tuple[Path, list[str]]]:
    """A folder for as long as it is open: the checkpoint ``path`` with its ``files`` unpacked to fp32 and no mention of
    quantisation, and the modules whose weights these were.

    It is among temporary files (``TMPDIR``) and takes four bytes for each weight.

    Raises:
        ArtifactError: parts of a packed weight that are missing or do not fit each other
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        folder = Path(made)
        for file in path.iterdir():
            if file not in files and file.name not in (_INDEX, "config.json"):
                (folder / file.name).symlink_to(file.absolute())
        said = _in_full(json.loads((path / "config.json").read_text(encoding="utf-8")))
        said = {key: _in_full(part) if isinstance(part, dict) else part for key, part in said.items()}
        (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
        packed, places = [], {}
        for file in files:
            names, modules = _unpack_file(file, folder / file.name, method, config)
            places |= dict.fromkeys(names, file.name)
            packed += modules
        (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
        yield folder, packed


def _in_full(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in KEYS}


def check_owners(path: Path, model: nn.Module, packed: Collection[str]) -> None:
    """ArtifactError unless the modules are linear layers, so that a weight is (out, in)."""
    for name, module in model.named_modules():
        if name in packed and not isinstance(module, nn.Linear):
            raise ArtifactError(
                f"{path}: {name} is quantised and a {type(module).__name__}, whose layout is not known here; "
                "give the checkpoint it was made from"
            )


def _unpack_file(file: Path, out: Path, method: str, config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Write a file unpacked; returns the tensor names in it, and the modules that were packed."""
    with safe_open(file, framework="pt") as stream:
        names = list(stream.keys())
        modules = [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]
        parts = {f"{module}.{part}" for module in modules for part in _PARTS}
        values = {name: stream.get_tensor(name) for name in names if name not in parts}
        for module in modules:
            held = {part: stream.get_tensor(f"{module}.{part}") for part in _PARTS if f"{module}.{part}" in names}
            values[f"{module}.weight"] = _weight(f"{file}: {module}", held, method, config)
    save_file(values, out, metadata={"format": "pt"})
    return list(values), modules


def _weight(where: str, held: Mapping[str, Tensor], method: str, config: Mapping[str, Any]) -> Tensor:
    """The weight (out, in) of a module."""
    missing = next((part for part in ("qzeros", "scales") if part not in held), None)
    if missing is not None:
        raise ArtifactError(f"{where} has a qweight and no {missing} beside it; fetch the checkpoint again")
    bits, scales = int(config.get("bits", config.get("w_bit", 0))), held["scales"].float()
    if held["qweight"].dtype != torch.int32:
        raise ArtifactError(f"{where} is packed into {held['qweight'].dtype}, where 32 bits are known")
    zeros = _fields(held["qzeros"], bits)
    if method == "awq":
        codes, zeros = (_in_order(value) for value in (_fields(held["qweight"], bits), zeros))
    else:
        codes = _fields(held["qweight"].t(), bits).t()
        zeros = _stored_one_less(where, zeros, bits) if _named(config) != ["gptq_v2"] else zeros
    zeros = zeros[:, : scales.shape[1]]
    size = int(config.get("group_size", config.get("q_group_size", -1)))
    groups = held.get("g_idx", torch.arange(len(codes)) // (size if size > 0 else len(codes))).long()
    fits = codes.shape[1] == scales.shape[1] and zeros.shape == scales.shape and groups.shape == (len(codes),)
    if not fits or not 0 <= int(groups.min()) <= int(groups.max()) < len(scales):
        raise ArtifactError(f"{where}: its qweight, qzeros, scales and groups do not fit each other; fetch it again")
    return (scales[groups] * (codes - zeros[groups])).t().contiguous()


def _fields(words: Tensor, bits: int) -> Tensor:
    """The numbers in each row of words (rows, words), lowest bits first: (rows, words · 32 / bits)."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(2) >> shifts) & (2**bits - 1)).flatten(1)


def _in_order(fields: Tensor) -> Tensor:
    return fields.unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1)


def _stored_one_less(where: str, zeros: Tensor, bits: int) -> Tensor:
    if bool((zeros == 2**bits - 1).any()):
        raise ArtifactError(f"{where} has zeros that GPTQ's first layout cannot hold, and tools read them differently")
    return zeros + 1
