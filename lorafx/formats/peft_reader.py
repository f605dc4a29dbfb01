"""A PEFT adapter folder as PEFT reads it: an exported adapter is compared through it before it gets its name."""

from __future__ import annotations

import copy
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..graph.program import Program
from ..models.checkpoint import open_model
from .adapter import read_adapter
from .changes import Factors, Whole


def opened_adapter(program: Program, folder: Path) -> nn.Module:
    """The model that the adapter in ``folder`` makes of ``program``'s base, by PEFT itself where it is installed."""
    base = _base_of(program)
    if find_spec("peft") is None:
        apply_adapter(base, folder)
        return base
    from peft import PeftModel

    with warnings.catch_warnings():  # advice for further training; the comparison judges what is computed
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(cast(Any, base), folder).eval()


def _base_of(program: Program) -> nn.Module:
    """A base of its own: opened again, so that what was learned can only come from the adapter."""
    source = program.source
    if source.path is None or not (Path(source.path) / "config.json").is_file():
        return copy.deepcopy(source.model).eval()
    with torch.random.fork_rng(devices=()):
        model, _ = open_model(Path(source.path), source.task, source.options, allow_pickle=True)
    return model.eval()


def apply_adapter(model: nn.Module, folder: Path) -> None:
    """Put a LoRA adapter of PEFT's format into ``model``, merged; each tensor is rounded once."""
    changes = read_adapter(folder).changes(model)
    # Tensors trained in full come first: other changes may build on them.
    with torch.no_grad():
        for change in sorted(changes, key=lambda change: not isinstance(change, Whole)):
            old = model.get_parameter(change.name)
            new = change.updated(old).to(old.dtype)
            if change.tied:
                old.copy_(new)
            else:
                _put(model, change.name, new)
            moved = change.of_bias() if isinstance(change, Factors) else None
            if moved is not None:
                bias = getattr(model.get_submodule(moved.name.removesuffix(".bias")), "bias", None)
                _put(model, moved.name, moved.updated(torch.zeros(()) if bias is None else bias).to(old.dtype))


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
