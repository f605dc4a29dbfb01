"""Checkpoints whose weights are quantised: opened as the numbers that their weights stand for, or refused in one line.

What is folded is then an ordinary model in fp32, however its base was stored; no later stage knows about quantisation.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from .layered import own_configs
from .packed import KEYS, check_layout, check_owners, unpacked

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kind:
    """How a kind is dequantised: by transformers as it reads the files; once the model is open, as a whole or tensor by
    tensor; or before, in :mod:`.packed`. And the package that this needs."""

    when: Literal["reading", "model", "tensors", "before"]
    package: str = ""


_KINDS: Mapping[str, _Kind] = {
    "bitsandbytes": _Kind("model", "bitsandbytes"),
    "torchao": _Kind("tensors", "torchao"),
    "compressed-tensors": _Kind("reading", "compressed-tensors"),
    "fp8": _Kind("reading"),
    "mxfp8": _Kind("reading"),
    "mxfp4": _Kind("reading"),
    "gptq": _Kind("before"),
    "awq": _Kind("before"),
}


@dataclass(frozen=True)
class Quantization:
    """What a checkpoint's config says about quantisation: the method's name, and all its settings."""

    method: str
    config: Mapping[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Quantization | None:
        """The one in a ``config.json``; None for weights in full precision."""
        parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
        found = next((part[key] for part in parts for key in KEYS if isinstance(part.get(key), Mapping)), None)
        if not found:
            return None
        bits = found.get("load_in_4bit") or found.get("load_in_8bit")
        return cls(str(found.get("quant_method") or ("bitsandbytes" if bits else "a method without a name")), found)

    def options(self, path: Path) -> dict[str, Any]:
        """How transformers is to open the checkpoint in ``path``.

        Raises:
            ArtifactError: a method that is not dequantised here, or a package that is not installed
        """
        kind = _KINDS.get(self.method)
        if kind is None:
            raise ArtifactError(
                f"{path}: its weights are quantised ({self.method}), which is not dequantised here (known: "
                f"{', '.join(_KINDS)}); give the checkpoint it was made from"
            )
        if kind.package and find_spec(kind.package.replace("-", "_")) is None:
            raise ArtifactError(
                f"{path}: its weights are quantised, and {kind.package} that reads them is not installed "
                f"(pip install {kind.package})"
            )
        if kind.when == "before":
            check_layout(path, self.method, self.config)
            return {}
        if kind.when != "reading":
            return {"device_map": "cpu"}
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as CONFIGS

        return {"quantization_config": CONFIGS[self.method](dequantize=True)}

    def folder(self, path: Path, files: list[Path]) -> AbstractContextManager[tuple[Path, list[str]]]:
        """The folder to open for the checkpoint in ``path`` with these weight ``files``, and the modules whose weights
        were unpacked into it."""
        packed = _KINDS[self.method].when == "before"
        return unpacked(path, files, self.method, self.config) if packed else nullcontext((path, []))

    def applied(self, cls: Any, path: Path, options: Mapping[str, Any]) -> Any:
        """A checkpoint of weights in full that this method quantised, as the numbers that its weights then stand for.

        Errors are those of transformers and the method's package: many need a device or data to calibrate with.
        """
        from transformers.quantizers.auto import AutoQuantizationConfig

        again = AutoQuantizationConfig.from_dict(dict(self.config))
        model = cls.from_pretrained(path, quantization_config=again, device_map="cpu", dtype=torch.float32, **options)
        return self._plain(path, model)

    def dequantized(self, path: Path, model: Any, unpacked: Collection[str] = ()) -> Any:
        """The model that was opened so, of plain tensors. ArtifactError: some of it is still quantised, or was unpacked
        for a layer of another layout."""
        check_owners(path, model, unpacked)
        model = self._plain(path, model)
        _log.warning("%s: its weights are quantised (%s); they are taken in float32", path, self.method)
        return model

    def _plain(self, path: Path, model: Any) -> Any:
        when = _KINDS[self.method].when
        if when == "model":
            # It rounds to the dtype that it once quantised from, unless told otherwise.
            for value in model.parameters():
                state = getattr(value, "quant_state", None)
                if state is not None:
                    state.dtype = torch.float32
            model = model.dequantize(dtype=torch.float32)
        elif when == "tensors":
            _make_plain(model)
            model.hf_quantizer.remove_quantization_config(model)
        odd = next((name for name, value in model.named_parameters() if not _is_plain(value)), None)
        if odd is not None or getattr(model.config, "quantization_config", None) is not None:
            raise ArtifactError(
                f"{path}: its weights are quantised ({self.method}), and transformers leaves "
                f"{odd or 'its config'} so; give the checkpoint it was made from"
            )
        return model


def read_in_full(
    cls: Any, path: Path, files: list[Path], options: Mapping[str, Any], quantization: Quantization | None
) -> tuple[nn.Module, Mapping[str, Any]]:
    """The model that ``cls`` reads from a checkpoint's weight ``files``, of weights in full, and what it says of them.

    Errors are those of transformers, and ArtifactError for what cannot be dequantised.
    """
    whole = nullcontext((path, ())) if quantization is None else quantization.folder(path, files)
    with own_configs(), warnings.catch_warnings(), whole as (folder, unpacked):
        warnings.filterwarnings("ignore", "You passed `quantization_config`")  # intended: it is dequantised
        model, info = cls.from_pretrained(
            folder, output_loading_info=True, **{**options, "ignore_mismatched_sizes": True}
        )
    return (model if quantization is None else quantization.dequantized(path, model, unpacked)), info


def _make_plain(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            if not _is_plain(value):
                stored: Any = value.data
                setattr(module, name, nn.Parameter(stored.dequantize().float(), requires_grad=False))


def _is_plain(value: Tensor) -> bool:
    return type(value.data) is Tensor and value.is_floating_point() and value.dtype.itemsize > 1
