"""An encoder-decoder folder in ONNX Runtime: a text or sound is read once, then tokens go in with what was cached.

The layout is what transformers.js reads; :mod:`lorafx.backends.encoder_decoder` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..formats.companions import GENERATION
from ..parity.inputs import InputSpec
from ..parity.runner import Place, Runner
from .decoder import Past, cache_of, dtype_of, empty_cache, open_config, open_session, provider_of
from .exported import read_json

ENCODER = "onnx/encoder_model.onnx"
DECODER = "onnx/decoder_model_merged.onnx"
TEXT, SOUND = "input_ids", "input_features"


def is_encoder_decoder(folder: Path) -> bool:
    """Whether a folder is one that clients generate from, by two graphs."""
    return (folder / ENCODER).is_file() and (folder / DECODER).is_file()


@dataclass(frozen=True)
class Reply:
    """What answers texts that were read: the decoder, with what it is given beside tokens and cache.

    Attributes:
        session: ONNX Runtime's, of the decoder
        pasts: the names of the inputs that hold the cache, and of the outputs that give it, in one order
        read: the encoder's states and their mask, as the decoder takes them
    """

    session: Any
    pasts: Mapping[str, str]
    read: Mapping[str, Any]

    def empty(self, batch: int) -> Past:
        """The cache before the first token."""
        return empty_cache(self.session, self.pasts, batch)

    def step(self, ids: Tensor, mask: Tensor, past: Past) -> tuple[Tensor, Past]:
        """Logits of new tokens, ``[batch, new]``, and the cache with them in it; ``mask`` hides none of them."""
        outputs = self.session.run(["logits", *self.pasts.values()], {"input_ids": ids.numpy(), **self.read, **past})
        return torch.from_numpy(outputs[0]), dict(zip(self.pasts, outputs[1:], strict=True))


@dataclass(frozen=True)
class CachedEncoderDecoder:
    """Sessions over an encoder and a decoder with its cache.

    Attributes:
        encoder: ONNX Runtime's session
        decoder: another
        pasts: as in :class:`Reply`
        dtype: of logits and cache
        start: the tokens that every answer begins with
        reads: what the encoder takes, texts (``input_ids``) or sound (``input_features``)
    """

    encoder: Any
    decoder: Any
    pasts: Mapping[str, str]
    dtype: torch.dtype
    start: tuple[int, ...]
    reads: str = TEXT

    #: Where padding stands in a batch of texts to answer.
    side = "right"
    slow = False

    def begin(self, ids: Tensor, mask: Tensor) -> tuple[Reply, Tensor, Tensor]:
        """What answers texts, ``[batch, tokens]``, and the tokens with their mask that answers begin with.

        Sound, ``[batch, bins, frames]``, has a mask that nobody reads.
        """
        text = _taken(self.encoder, {self.reads: ids.numpy(), "attention_mask": mask.numpy()})
        states = self.encoder.run(["last_hidden_state"], text)[0]
        read = _taken(self.decoder, {"encoder_hidden_states": states, "encoder_attention_mask": mask.numpy()})
        start = torch.tensor(self.start).expand(len(ids), -1)
        return Reply(self.decoder, self.pasts, read), start, torch.ones_like(start)

    def asked(self, text: Tensor, said: Tensor) -> dict[str, Tensor]:
        """What a model without a cache is given for one text, ``[tokens]``, and what was ``said`` in answer."""
        if self.reads == TEXT:
            return whole(text[None], said[None])
        return {self.reads: text[None], "decoder_input_ids": said[None]}

    def call(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits of whole answers."""
        read = values[self.reads]
        reply, _, _ = self.begin(read, values.get("attention_mask", torch.ones_like(read)))
        ids = values["decoder_input_ids"]
        return {"logits": reply.step(ids, torch.ones_like(ids), reply.empty(len(ids)))[0]}


def _taken(session: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``values`` that a graph reads."""
    known = {entry.name for entry in session.get_inputs()}
    return {name: value for name, value in values.items() if name in known}


def whole(texts: Tensor, said: Tensor) -> dict[str, Tensor]:
    """What an encoder-decoder without a cache is given: texts and what was said in answer, ``[batch, tokens]`` each."""
    return {"input_ids": texts, "attention_mask": torch.ones_like(texts), "decoder_input_ids": said}


def starts(config: Any, *folders: Path | None) -> tuple[int, ...]:
    """The tokens that answers begin with, by the generation settings in a folder or else by the config.

    Raises:
        UsageError: none of them names one
    """
    files = [folder / GENERATION for folder in folders if folder is not None and (folder / GENERATION).is_file()]
    said = [*(read_json(file) for file in files), config.to_dict() if config is not None else {}]
    for names in (("decoder_start_token_id", "forced_bos_token_id"), ("bos_token_id",)):
        found = [next((settings[name] for settings in said if settings.get(name) is not None), None) for name in names]
        if found[0] is not None:
            return tuple(int(token) for token in found if token is not None)
    raise UsageError(f"no {GENERATION} or config says which token an answer begins with (decoder_start_token_id)")


def open_encoder_decoder(folder: Path, place: Place, label: str, trusted: bool = False) -> Runner:
    """A runner for such a folder, which gives whole answers to an empty cache; its ``decoder`` takes them by steps.

    Raises:
        ArtifactError: the folder cannot be opened
        UsageError: another dtype is asked for than it was exported in, or nothing says how answers begin
    """
    config = open_config(folder, trusted)
    encoder, decoder = (open_session(folder / name, place) for name in (ENCODER, DECODER))
    pasts = cache_of(decoder, folder / DECODER, {"input_ids", "encoder_hidden_states"})
    dtype = dtype_of(decoder, next(iter(pasts)), folder, place)
    known = {entry.name: entry.shape for entry in encoder.get_inputs()}
    reads = SOUND if SOUND in known else TEXT
    both = CachedEncoderDecoder(encoder, decoder, pasts, dtype, starts(config, folder), reads)
    size = config.get_text_config().vocab_size
    specs = (InputSpec("decoder_input_ids", torch.int64, (None, None), 0, size),)
    if reads == TEXT:
        text = InputSpec(TEXT, torch.int64, (None, None), 0, size)
        specs = (text, *specs, InputSpec("attention_mask", torch.int64, (None, None)))
    else:
        specs = (InputSpec(SOUND, dtype, (None, *known[SOUND][1:])), *specs)
    used, note = provider_of(decoder, place)
    kind = "encoder-decoder"
    return Runner(label, kind, used, place.threads, dtype, specs, both.call, config, folder, note=note, decoder=both)
