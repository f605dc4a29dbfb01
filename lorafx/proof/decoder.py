"""A decoder folder in ONNX Runtime: tokens go in with what was cached of those before, logits and the cache come out.

The layout is what onnxruntime-genai and transformers.js read; :mod:`lorafx.backends.decoder` writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArtifactError, UsageError, first_line
from ..graph.precision import dtype_name
from ..models.layered import own_configs
from ..parity.inputs import InputSpec
from ..parity.runner import PROVIDERS, Place, Runner

GENAI = "genai_config.json"
MODEL = "onnx/model.onnx"
DATA = "onnx/model.onnx_data"

#: Keys and values by the names of the graph's inputs, ``[batch, heads, tokens, size]``.
Past = Mapping[str, Any]
_TYPES = {"tensor(float)": (np.float32, torch.float32), "tensor(float16)": (np.float16, torch.float16)}


def is_decoder(folder: Path) -> bool:
    """Whether a folder is one that clients generate from."""
    return (folder / GENAI).is_file() and (folder / MODEL).is_file()


@dataclass(frozen=True)
class CachedDecoder:
    """A session over a decoder with its cache.

    Attributes:
        session: ONNX Runtime's
        pasts: the names of the inputs that hold the cache, and of the outputs that give it, in one order
        dtype: of logits and cache
    """

    session: Any
    pasts: Mapping[str, str]
    dtype: torch.dtype

    def empty(self, batch: int) -> Past:
        """The cache before the first token."""
        types = {entry.name: entry for entry in self.session.get_inputs()}
        sizes = {name: types[name].shape for name in self.pasts}
        return {
            name: np.zeros((batch, size[1], 0, size[3]), dtype=_TYPES[types[name].type][0])
            for name, size in sizes.items()
        }

    def step(self, ids: Tensor, mask: Tensor, past: Past) -> tuple[Tensor, Past]:
        """Logits of new tokens, and the cache with them in it.

        Args:
            ids: the new tokens, ``[batch, new]``
            mask: of past and new tokens together, ``[batch, past + new]``; padding stands before a text
            past: what the step before gave
        """
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        known = {entry.name for entry in self.session.get_inputs()}
        feed = {name: value.numpy() for name, value in given.items() if name in known}
        outputs = self.session.run(["logits", *self.pasts.values()], {**feed, **past})
        return torch.from_numpy(outputs[0]), dict(zip(self.pasts, outputs[1:], strict=True))


def open_decoder(folder: Path, place: Place, label: str, trusted: bool = False) -> Runner:
    """A runner for a decoder folder, which gives whole texts to an empty cache; its ``decoder`` takes them by steps.

    Raises:
        ArtifactError: the folder cannot be opened
        UsageError: another dtype is asked for than it was exported in
    """
    import onnxruntime
    from transformers import AutoConfig

    from .exported import session_options_for

    try:
        with own_configs():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
        session: Any = onnxruntime.InferenceSession(folder / MODEL, **session_options_for(place))
    except Exception as error:  # ONNX Runtime raises classes of its own for a broken file
        raise ArtifactError(f"{folder}: the decoder cannot be opened: {first_line(error)}") from error
    inputs = {entry.name: entry for entry in session.get_inputs()}
    pasts = {name: name.replace("past_key_values.", "present.", 1) for name in inputs if name.startswith("past_key_")}
    given = {entry.name for entry in session.get_outputs()}
    if not pasts or not {"logits", *pasts.values()} <= given or not {"input_ids", "attention_mask"} <= inputs.keys():
        raise ArtifactError(
            f"{folder / MODEL}: not a decoder with its cache by its inputs and outputs; export it again"
        )
    dtype = _TYPES[inputs[next(iter(pasts))].type][1]
    if place.dtype not in (None, dtype):
        raise UsageError(f"{folder}: exported in {dtype_name(dtype)}; it cannot be computed in another dtype")
    decoder = CachedDecoder(session, pasts, dtype)
    specs = (
        InputSpec("input_ids", torch.int64, (None, None), 0, config.get_text_config().vocab_size),
        InputSpec("attention_mask", torch.int64, (None, None)),
    )
    used, asked = session.get_providers()[0], PROVIDERS[place.provider]
    note = "" if used == asked else f"{asked} was asked for but cannot be loaded here; {used} ran it"
    call = from_nothing(decoder)
    return Runner(label, "decoder", used, place.threads, dtype, specs, call, config, folder, note=note, decoder=decoder)


def from_nothing(decoder: CachedDecoder) -> Callable[[dict[str, Any]], Any]:
    """What gives whole texts to an empty cache."""

    def call(values: dict[str, Any]) -> Any:
        ids = values["input_ids"]
        return {"logits": decoder.step(ids, values["attention_mask"], decoder.empty(len(ids)))[0]}

    return call
