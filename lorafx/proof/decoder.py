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

#: Bytes of weights that are too many to be read from their file for every token.
_MANY = 1 << 32
_UNOPTIMISED = "its weights stayed in their file, so ONNX Runtime ran the graph as it is, without its own optimisations"

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
        slow: whether every step reads many gigabytes of weights from their file
    """

    session: Any
    pasts: Mapping[str, str]
    dtype: torch.dtype
    slow: bool = False

    #: Where padding stands in a batch of texts to go on with.
    side = "left"

    def begin(self, ids: Tensor, mask: Tensor) -> tuple[CachedDecoder, Tensor, Tensor]:
        """What goes on with texts, and the tokens with their mask that it goes on with: their own."""
        return self, ids, mask

    @staticmethod
    def asked(text: Tensor, said: Tensor) -> dict[str, Tensor]:
        """What a model without a cache is given for one text, ``[tokens]``, and what was ``said``, which holds it."""
        return {"input_ids": said[None], "attention_mask": torch.ones_like(said[None])}

    def empty(self, batch: int) -> Past:
        """The cache before the first token."""
        return empty_cache(self.session, self.pasts, batch)

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


def empty_cache(session: Any, pasts: Mapping[str, str], batch: int) -> Past:
    """A cache without a token, as wide as the inputs of ``session``."""
    entries = {entry.name: entry for entry in session.get_inputs()}
    kinds = {name: (entries[name].shape, _TYPES[entries[name].type][0]) for name in pasts}
    return {name: np.zeros((batch, shape[1], 0, shape[3]), dtype=kind) for name, (shape, kind) in kinds.items()}


def open_session(file: Path, place: Place) -> Any:
    """ONNX Runtime's session over a file; ArtifactError when it cannot be opened."""
    import onnxruntime

    from .exported import session_options_for

    how = session_options_for(place)
    try:
        return onnxruntime.InferenceSession(file, how["session_options"], how["providers"])
    except Exception as error:  # ONNX Runtime raises classes of its own for a broken file
        raise ArtifactError(f"{file}: the graph cannot be opened: {first_line(error)}") from error


def open_config(folder: Path, trusted: bool) -> Any:
    """The config in a folder; ArtifactError when it cannot be read."""
    from transformers import AutoConfig

    try:
        with own_configs():
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
    except Exception as error:  # whatever its code raises
        raise ArtifactError(f"{folder}: its config cannot be opened: {first_line(error)}") from error


def cache_of(session: Any, file: Path, needed: set[str]) -> dict[str, str]:
    """The inputs that hold the cache, each with the output that gives it; ArtifactError: none, or not all of
    ``needed`` beside them."""
    inputs = [entry.name for entry in session.get_inputs()]
    pasts = {name: name.replace("past_key_values.", "present.", 1) for name in inputs if name.startswith("past_key_")}
    given = {entry.name for entry in session.get_outputs()}
    if not pasts or not {"logits", *pasts.values()} <= given or not needed <= set(inputs):
        raise ArtifactError(f"{file}: not a decoder with its cache by its inputs and outputs; export it again")
    return pasts


def dtype_of(session: Any, name: str, folder: Path, place: Place) -> torch.dtype:
    """The dtype of an input; UsageError when another one is asked for."""
    dtype = _TYPES[next(entry.type for entry in session.get_inputs() if entry.name == name)][1]
    if place.dtype not in (None, dtype):
        raise UsageError(f"{folder}: exported in {dtype_name(dtype)}; it cannot be computed in another dtype")
    return dtype


def provider_of(session: Any, place: Place) -> tuple[str, str]:
    """What runs a session, and a note when that is not what was asked for."""
    used, asked = session.get_providers()[0], PROVIDERS[place.provider]
    return used, "" if used == asked else f"{asked} was asked for but cannot be loaded here; {used} ran it"


def open_decoder(folder: Path, place: Place, label: str, trusted: bool = False) -> Runner:
    """A runner for a decoder folder, which gives whole texts to an empty cache; its ``decoder`` takes them by steps.

    Raises:
        ArtifactError: the folder cannot be opened
        UsageError: another dtype is asked for than it was exported in
    """
    config, session = open_config(folder, trusted), open_session(folder / MODEL, place)
    pasts = cache_of(session, folder / MODEL, {"input_ids", "attention_mask"})
    dtype = dtype_of(session, next(iter(pasts)), folder, place)
    late = place.by_block and (folder / f"{MODEL}_data").is_file()
    decoder = CachedDecoder(session, pasts, dtype, late and (folder / f"{MODEL}_data").stat().st_size > _MANY)
    specs = (
        InputSpec("input_ids", torch.int64, (None, None), 0, config.get_text_config().vocab_size),
        InputSpec("attention_mask", torch.int64, (None, None)),
    )
    used, note = provider_of(session, place)
    note = note or (_UNOPTIMISED if place.by_block else "")
    call = from_nothing(decoder)
    return Runner(label, "decoder", used, place.threads, dtype, specs, call, config, folder, note=note, decoder=decoder)


def from_nothing(decoder: CachedDecoder) -> Callable[[dict[str, Any]], Any]:
    """What gives whole texts to an empty cache."""

    def call(values: dict[str, Any]) -> Any:
        ids = values["input_ids"]
        return {"logits": decoder.step(ids, values["attention_mask"], decoder.empty(len(ids)))[0]}

    return call
