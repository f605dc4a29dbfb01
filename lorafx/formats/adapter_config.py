"""The ``adapter_config.json`` of a LoRA adapter: every key is read, known to be irrelevant to the function, or refused
by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, did_you_mean
from ..methods.low_rank import pattern_value

CONFIG = "adapter_config.json"

#: Keys that do not affect what the trained adapter computes: where it came from, how it was initialised and trained.
_IRRELEVANT = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode"),
        *("runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("velora_config", "megatron_config", "megatron_core", "qalora_group_size", "fan_in_fan_out"),
    )
)
#: Keys that change the function in a way that is not known here, unless they have one of these values.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "ensure_weight_tying": (None, False),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
}
#: Initial values that do not touch the base. Of the others (PiSSA, OLoRA, CorDA, …) PEFT recomputes a changed base.
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")
_READ = frozenset(
    (
        *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"),
        *("bias", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        *("trainable_token_indices", "target_parameters", "init_lora_weights", "lora_dropout"),
    )
)


@dataclass(frozen=True)
class AdapterConfig:
    """The part of a LoRA adapter's config that decides what it computes, and how training continues; names are PEFT's.

    ``biases`` says that biases were trained too (``bias`` is not ``none``).
    """

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    lora_dropout: float
    use_dora: bool
    lora_bias: bool
    biases: bool
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    target_parameters: tuple[str, ...]
    tokens: tuple[int, ...] | Mapping[str, tuple[int, ...]]

    def rank(self, path: str) -> int:
        """The rank of the adapter at a module (or, for ``target_parameters``, at a parameter)."""
        return int(pattern_value(self.rank_pattern, path, self.r))

    def scale(self, path: str) -> float:
        """The factor of the low-rank product there."""
        rank, alpha = self.rank(path), pattern_value(self.alpha_pattern, path, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, path: str) -> bool:
        """Whether ``target_modules`` and the options that narrow it name the module ``path``."""
        if _names(self.exclude_modules, path) or self.saves_within(path):
            return False
        if isinstance(self.target_modules, str) or path in self.target_modules:
            return _names(self.target_modules, path)
        return _names(self.target_modules, path) and (not self.layers or self._layer(path) in self.layers)

    def targets_parameter(self, name: str) -> bool:
        """Whether ``target_parameters`` names the parameter ``name``."""
        return _names(self.target_parameters, name)

    def saves(self, path: str) -> bool:
        """Whether ``modules_to_save`` names the module: by the end of its path, which need not begin at a dot."""
        return any(path.endswith(name) for name in self.modules_to_save)

    def saves_within(self, path: str) -> bool:
        """Whether the module was saved in full, or is inside one that was."""
        return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.modules_to_save)

    def tokens_of(self, path: str, is_input: bool) -> tuple[int, ...] | None:
        """Which rows of the table at ``path`` were trained; ``is_input`` says that it is the model's input table."""
        if isinstance(self.tokens, Mapping):
            return next((rows for name, rows in self.tokens.items() if _names((name,), path)), None)
        return self.tokens if self.tokens and is_input else None

    def _layer(self, path: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for match in (re.match(pattern, path) for pattern in patterns) if match), None)
        return int(found.group(1)) if found else None


def _names(wanted: str | tuple[str, ...], path: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in wanted)


def read_config_file(folder: Path) -> dict[str, Any]:
    """The JSON object of an adapter's config; ArtifactError when there is none."""
    file = folder / CONFIG
    if not file.is_file():
        raise ArtifactError(f"{folder}: no {CONFIG}; give the folder of an adapter that PEFT or lorafx wrote")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: not valid JSON ({error}); fetch the adapter again") from None
    if not isinstance(data, dict) or not isinstance(data.get("peft_type"), str):
        raise ArtifactError(f"{file}: no config of a PEFT adapter (no peft_type); fetch the adapter again")
    return data


def parse_config(data: Mapping[str, Any], file: Path) -> AdapterConfig:
    """What a LoRA config says. ArtifactError: a key that is not known, or a value that changes what is computed in a
    way that is not known; the message names it."""
    known = {*_READ, *_IRRELEVANT, *_REFUSED}
    for key, value in data.items():
        if key not in known and value not in (None, False, [], {}):
            hint = did_you_mean(key, known)
            raise ArtifactError(f"{file}: unknown option {key} = {value!r}{hint}, which may change what it computes")
        if key in _REFUSED and value not in _REFUSED[key]:
            raise ArtifactError(f"{file}: {key} = {value!r} is not handled; merge this adapter with PEFT")
    initial = data.get("init_lora_weights")
    if not any(initial is one or initial == one for one in _INITIAL):
        raise ArtifactError(
            f"{file}: init_lora_weights = {initial!r} changes the base's weights; save the adapter for the original "
            "base (PEFT's path_initial_model_for_weight_conversion)"
        )
    if data.get("use_dora") and data.get("lora_bias"):
        raise ArtifactError(f"{file}: use_dora and lora_bias together are nothing that PEFT computes")
    try:
        return _parsed(data)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{file}: a value of the wrong kind ({error}); fetch the adapter again") from None


def _parsed(data: Mapping[str, Any]) -> AdapterConfig:
    layers = data.get("layers_to_transform")
    tokens = data.get("trainable_token_indices") or ()
    named = {name: tuple(map(int, rows)) for name, rows in tokens.items()} if isinstance(tokens, Mapping) else None
    return AdapterConfig(
        r=int(data.get("r", 8)),
        lora_alpha=float(data.get("lora_alpha", 8)),
        rank_pattern=dict(data.get("rank_pattern") or {}),
        alpha_pattern=dict(data.get("alpha_pattern") or {}),
        use_rslora=bool(data.get("use_rslora")),
        lora_dropout=float(data.get("lora_dropout") or 0.0),
        use_dora=bool(data.get("use_dora")),
        lora_bias=bool(data.get("lora_bias")),
        biases=data.get("bias", "none") != "none",
        target_modules=_text_or_list(data.get("target_modules")),
        exclude_modules=_text_or_list(data.get("exclude_modules")),
        layers=(layers,) if isinstance(layers, int) else tuple(layers or ()),
        layers_pattern=_list(data.get("layers_pattern")),
        modules_to_save=_list(data.get("modules_to_save")),
        target_parameters=_list(data.get("target_parameters")),
        tokens=named if named is not None else tuple(map(int, tokens)),
    )


def _text_or_list(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) and value else _list(value)


def _list(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and value else tuple(map(str, value or ()))
