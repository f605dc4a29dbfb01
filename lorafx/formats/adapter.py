"""A LoRA adapter as PEFT writes it, read without PEFT: every tensor of its file becomes a change of one tensor.

A change (:mod:`.changes`) knows the tensor of the model that it changes, and computes the new one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import ArtifactError, did_you_mean
from ..graph.site import WEIGHT_OPS, WeightOp
from ..graph.tree import named_tensors
from ..models.checkpoint import check_safetensors
from .adapter_config import CONFIG, AdapterConfig, parse_config, read_config_file
from .changes import Change, Factors, Rows, Stack, Whole
from .peft import PREFIX, parents

WEIGHTS = "adapter_model.safetensors"
aten = torch.ops.aten

_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight|\.bias)?")
_ROWS = ".token_adapter.trainable_tokens_delta"
#: Wrappers that PEFT puts around a module, and keeps it in.
_WRAPPED = (".token_adapter.base_layer.", ".original_module.", ".base_layer.")


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter folder: its config and its tensors by their keys. ``changes`` binds them to a model."""

    folder: Path
    config: AdapterConfig
    tensors: Mapping[str, Tensor]

    def changes(self, model: nn.Module) -> list[Change]:
        """Its changes to ``model`` (which may be on the meta device), every tensor of the file in exactly one of them.

        Raises:
            ArtifactError: a tensor that no module takes or that does not fit, a module without its tensors
        """
        return _Binding(self, model).changes()

    def resized(self, model: Any) -> int | None:
        """The size of the vocabulary of its saved embedding layers, if it differs from the model's."""
        table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        path = next((path for path, module in model.named_modules() if module is table), None)
        if table is None or path is None:
            return None
        for key, value in self.tensors.items():
            if _plain(key) == f"{path}.weight" and value.shape[1:] == table.weight.shape[1:]:
                return len(value) if len(value) != len(table.weight) else None
        return None


def read_adapter(path: str | PathLike[str]) -> Adapter:
    """Open the folder of a LoRA adapter, without PEFT.

    Raises:
        ArtifactError: no adapter, an incomplete file, or a config with settings that are not known here
    """
    folder = Path(path)
    data = read_config_file(folder)
    if data["peft_type"] != "LORA":
        raise ArtifactError(f"{folder}: a {data['peft_type']} adapter, not LoRA; it is read by PEFT alone")
    config, file = parse_config(data, folder / CONFIG), folder / WEIGHTS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        what = "only pickled weights (adapter_model.bin); save them as safetensors" if pickled else f"no {WEIGHTS}"
        raise ArtifactError(f"{folder}: {what}")
    check_safetensors(file)
    with safe_open(file, framework="pt") as stream:
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 - no mapping
    return Adapter(folder, config, tensors)


def _plain(key: str) -> str:
    """A key without PEFT's wrappers: the name of a tensor of the model."""
    name = key.removeprefix(PREFIX)
    for wrapper in _WRAPPED:
        name = name.replace(wrapper, ".")
    return name


class _Binding:
    """Matches the tensors of one adapter with the modules of one model."""

    def __init__(self, adapter: Adapter, model: nn.Module):
        self.adapter, self.config = adapter, adapter.config
        self.model: Any = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.held = dict(named_tensors(model))
        self.file = adapter.folder / WEIGHTS

    def changes(self) -> list[Change]:
        groups: dict[str, dict[str, str]] = {}
        rest: list[str] = []
        for key in self.adapter.tensors:
            match = _FACTOR.fullmatch(key.removeprefix(PREFIX))
            if not key.startswith(PREFIX):
                raise ArtifactError(f"{self.file}: {key} has no name that PEFT gives (it begins with {PREFIX})")
            if match is None:
                rest.append(key)
                continue
            short = "lora_B.bias" if match[3] == ".bias" else match[2]
            groups.setdefault(match[1], {})[short] = key
        # A name that the base does not have is more telling than what is missing as a consequence.
        others, places = list(self._others(rest)), {owner: self._place(owner, keys) for owner, keys in groups.items()}
        found = [*(self._low_rank(*places[owner], keys) for owner, keys in groups.items()), *others]
        self._check_missing(found, set(groups))
        tables = [id(self.held[change.name]) for change in found if isinstance(change, Rows)]
        if len(set(tables)) < len(tables):
            raise ArtifactError(f"{self.file}: it holds rows of two tables that are one tensor in this base")
        return found

    # ---- low-rank factors

    def _place(self, owner: str, keys: dict[str, str]) -> tuple[str, int]:
        """The module that low-rank factors belong to, and how many wrappers are around it."""
        path, depth = owner, 0
        while path not in self.modules and path.endswith(".base_layer"):
            path, depth = path.removesuffix(".base_layer"), depth + 1
        if path not in self.modules:
            hint = did_you_mean(path, self.modules)
            raise self._odd(next(iter(keys.values())), f"the base has no module {path}{hint}; is it another base?")
        return path, depth

    def _low_rank(self, path: str, depth: int, keys: dict[str, str]) -> Change:
        stacked = self._targeted_parameters(path)
        if stacked:
            return self._stack(path, stacked, depth, keys)
        use = _use(self.modules[path])
        if use is None or depth:
            kind = type(self.modules[path]).__name__
            raise self._odd(next(iter(keys.values())), f"{path} is a {kind}, which is adapted in no way known here")
        return self._factors(path, use, keys)

    def _factors(self, path: str, use: WeightOp, keys: dict[str, str]) -> Factors:
        names = ("lora_embedding_A", "lora_embedding_B") if use.kind == "embedding" else ("lora_A", "lora_B")
        wanted = [*names, *(["lora_magnitude_vector"] if self.config.use_dora else [])]
        wanted += ["lora_B.bias"] if self.config.lora_bias and use.kind != "embedding" else []
        a, b, *more = self._all_of(path, wanted, keys)
        name = f"{path}.weight"
        out, features = use.size(self.held[name].shape)
        rank = self._rank(path, keys[names[0]], len(a))
        self._check(keys[names[0]], a.flatten(1), (rank, features))
        self._check(keys[names[1]], b.flatten(1), (out, rank))
        for key, value in zip(wanted[2:], more, strict=True):
            self._check(keys[key], value.reshape(-1), (out,))
        magnitude = more[0] if self.config.use_dora else None
        shift = more[-1] if self.config.lora_bias and more else None
        scale = self.config.scale(path)
        return Factors(name, tuple(keys.values()), False, path, use, a, b, scale, magnitude, shift)

    def _targeted_parameters(self, path: str) -> list[str]:
        own = (name for name, _ in self.modules[path].named_parameters(recurse=False))
        return [name for name in own if self.config.targets_parameter(f"{path}.{name}")]

    def _stack(self, path: str, names: list[str], depth: int, keys: dict[str, str]) -> Stack:
        # PEFT puts one wrapper around another, in the order of the parameters: the last is outermost.
        if depth >= len(names):
            raise self._odd(next(iter(keys.values())), f"{path} has {len(names)} adapted parameters")
        name = f"{path}.{names[-1 - depth]}"
        a, b = self._all_of(name, ["lora_A", "lora_B"], keys)
        shape = self.held[name].shape
        if len(shape) not in (2, 3):
            raise self._odd(keys["lora_A"], f"{name} has {len(shape)} dimensions, where 2 or 3 can be adapted")
        transposed = len(shape) == 3 and bool(getattr(self.modules[path], "is_transposed", False))
        experts, (out, features) = (shape[0] if len(shape) == 3 else 1), shape[-2:]
        out, features = (features, out) if transposed else (out, features)
        rank = self._rank(name, keys["lora_A"], len(a), experts)
        self._check(keys["lora_A"], a, (experts * rank, features))
        self._check(keys["lora_B"], b, (out, experts * rank))
        return Stack(name, tuple(keys.values()), False, a, b, self.config.scale(name), experts, transposed)

    def _all_of(self, path: str, wanted: list[str], keys: dict[str, str]) -> list[Tensor]:
        for short in wanted:
            if short not in keys:
                raise ArtifactError(f"{self.file}: {path} has no {short} here; the file is not whole")
        odd = next((key for short, key in keys.items() if short not in wanted), None)
        if odd is not None:
            raise self._odd(odd, "its config says nothing of such a tensor")
        return [self.adapter.tensors[keys[short]] for short in wanted]

    def _rank(self, path: str, key: str, found: int, experts: int = 1) -> int:
        rank = self.config.rank(path)
        if found != rank * experts:
            raise self._odd(key, f"it has rank {found / experts:g}, where {CONFIG} says {rank}")
        return rank

    # ---- everything else

    def _others(self, keys: list[str]) -> Iterator[Change]:
        for key in keys:
            if key.endswith(_ROWS):
                yield self._rows(key)
                continue
            name = _plain(key)
            if "lora_" in name or name not in self.held:
                hint = did_you_mean(name, self.held)
                raise self._odd(key, f"the base has no tensor {name}{hint}; is it another base?")
            value = self.adapter.tensors[key]
            self._check(key, value, tuple(self.held[name].shape))
            copied = any(self.config.saves(path) for path in parents(name))
            yield Whole(name, (key,), not copied, value)

    def _rows(self, key: str) -> Rows:
        path = key.removeprefix(PREFIX).removesuffix(_ROWS)
        module, values = self.modules.get(path), self.adapter.tensors[key]
        rows = self.config.tokens_of(path, module is not None and module is self._table)
        if module is None or rows is None:
            raise self._odd(key, f"trainable_token_indices in {CONFIG} names no rows of {path}")
        size = self.held[f"{path}.weight"].shape
        self._check(key, values, (len(rows), size[1]))
        if not all(0 <= row < size[0] for row in rows):
            raise self._odd(key, f"a row of trainable_token_indices is none of the {size[0]} of {path}")
        return Rows(f"{path}.weight", (key,), True, rows, values)

    @cached_property
    def _table(self) -> nn.Module | None:
        return self.model.get_input_embeddings() if hasattr(self.model, "get_input_embeddings") else None

    def _check_missing(self, found: list[Change], owners: set[str]) -> None:
        """ArtifactError for a module that the config names but the file has no tensors for."""
        changed = {change.name for change in found}
        for path, module in self.modules.items():
            missing = None
            if self.config.targets(path) and _use(module) is not None and path not in owners:
                missing = "lora_A, lora_B"
            elif any(f"{path}.{name}" not in changed for name in self._targeted_parameters(path)):
                missing = "lora_A, lora_B of " + ", ".join(self._targeted_parameters(path))
            elif self.config.saves(path) and not any(self.config.saves(up) for up in parents(path)):
                held = (name for name in module.state_dict() if f"{path}.{name}" not in changed)
                missing = next(held, None)
            elif self.config.tokens_of(path, module is self._table) and isinstance(module, nn.Embedding):
                missing = "token_adapter" if not any(isinstance(c, Rows) for c in found) else None
            if missing:
                raise ArtifactError(f"{self.file}: {CONFIG} names {path}, and {missing} of it is not in the file")

    def _check(self, key: str, value: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(value.shape) != shape:
            found = tuple(value.shape)
            raise self._odd(key, f"it is {found} where this base takes {shape}: an adapter of another base")

    def _odd(self, key: str, why: str) -> ArtifactError:
        return ArtifactError(f"{self.file}: {key} cannot be used: {why}")


def _use(module: nn.Module) -> WeightOp | None:
    """How a module that PEFT can adapt uses its weight."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return WEIGHT_OPS[aten.linear.default]
    if isinstance(module, Conv1D):
        return WEIGHT_OPS[aten.addmm.default]
    if isinstance(module, nn.Embedding):
        return WEIGHT_OPS[aten.embedding.default]
    return WEIGHT_OPS[aten.conv2d.default] if isinstance(module, nn.Conv2d) else None
