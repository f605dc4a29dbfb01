"""A PEFT adapter folder as PEFT reads it: what is compared before an exported adapter gets its name."""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..graph.program import Program
from ..methods.low_rank import pattern_value
from ..models.checkpoint import open_model
from .peft import PREFIX

_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


def opened_adapter(program: Program, folder: Path) -> nn.Module:
    """The model that the adapter in ``folder`` makes of ``program``'s base, by PEFT itself where it is installed."""
    base = _base_of(program)
    if find_spec("peft") is None:
        apply_adapter(base, folder)
        return base
    from peft import PeftModel

    with warnings.catch_warnings():  # advice to those who train on; the comparison judges what is computed
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(cast(Any, base), folder).eval()


def _base_of(program: Program) -> nn.Module:
    """A base of its own: opened again, so that nothing but the adapter can bring what was learned."""
    source = program.source
    if source.path is None or not (Path(source.path) / "config.json").is_file():
        return copy.deepcopy(source.model).eval()
    with torch.random.fork_rng(devices=()):
        model, _ = open_model(Path(source.path), source.task, source.options, allow_pickle=True)
    return model.eval()


def apply_adapter(model: nn.Module, folder: Path) -> None:
    """Put a LoRA adapter of PEFT's format into ``model``, merged, as PEFT's rules say."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    stored = load_file(folder / "adapter_model.safetensors")
    values = {key.removeprefix(PREFIX): value for key, value in stored.items()}
    with torch.no_grad():
        for name, value in _whole(values).items():
            path, _, leaf = name.rpartition(".")
            if any(part.endswith(kept) for kept in config["modules_to_save"] or () for part in _parents(path)):
                # PEFT trains a copy of such a module: what was tied to it stays as it was.
                setattr(model.get_submodule(path), leaf, nn.Parameter(value.clone(), requires_grad=False))
            else:
                model.get_parameter(name).copy_(value)
        for path, module in list(model.named_modules()):
            pair = next((pair for pair in _PAIRS if f"{path}.{pair[0]}" in values), None)
            if pair is None or not _targeted(path, config["target_modules"]):
                continue
            a, b = (values[f"{path}.{short}"] for short in pair)
            update = _scale(config, path) * _product(module, a.double(), b.double())
            old: Any = module.weight
            module.weight = nn.Parameter((old.double() + update).to(old.dtype), requires_grad=False)


def _whole(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that replace the base's, under the base's names."""
    return {key.replace(".base_layer.", "."): value for key, value in values.items() if "lora_" not in key}


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _targeted(path: str, targets: str | list[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _scale(config: Mapping[str, Any], path: str) -> float:
    rank = pattern_value(config["rank_pattern"], path, config["r"])
    alpha = pattern_value(config["alpha_pattern"], path, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def _product(module: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """The update of a module's weight, in the layout the module stores it in."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Conv2d):
        return torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
    return (b @ a).T if isinstance(module, (nn.Embedding, Conv1D)) else b @ a
