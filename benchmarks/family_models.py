"""Tiny random models of transformers' families, built from their config classes.

A family is a model type, the auto class that opens it, and what its inputs are. Sizes come from one table that knows
the names configs use; a family adds what the table cannot know. All parameters are moved off their initial values, so
that no bias is 0, no norm 1 and no weight tied by accident.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCABULARY, LABELS, PAD, SIDE, POSITIONS = 120, 3, 1, 32, 80
#: Not 0 while capturing: the training graph has to have them, the evaluation graph must not.
DROPOUT = 0.1

#: The families and the sizes of their configs: a group a way of opening them, and what each needs beyond the sizes.
TABLE = tomllib.loads(Path(__file__).with_name("families.toml").read_text(encoding="utf-8"))
#: The value of a config field, by its name.
SIZES: dict[str, Any] = {name: row["value"] for row in TABLE["sizes"] for name in row["fields"].split()}
#: Noise a graph cannot turn off, which capture leaves out with a warning.
_NOISY = ("layerdrop", "layer_dropout", "drop_path", "stochastic_depth")


Inputs = Callable[[int, int], dict[str, Any]]


# ---- inputs


def _generator(batch: int, length: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * batch + length)


def text(batch: int, length: int) -> dict[str, Any]:
    """Token ids and a mask; the last row is padded to the right once it is longer than one token."""
    ids = torch.randint(8, VOCABULARY, (batch, length), generator=_generator(batch, length))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 + 1 :] = 0
    return {"input_ids": torch.where(mask.bool(), ids, torch.full_like(ids, PAD)), "attention_mask": mask}


def two_texts(batch: int, length: int) -> dict[str, Any]:
    """Encoder and decoder inputs; the decoder's sequence is one longer, so that no dimension is shared by accident."""
    target = torch.randint(8, VOCABULARY, (batch, length + 1), generator=_generator(batch, length))
    return {**text(batch, length), "decoder_input_ids": target}


def choices(batch: int, length: int) -> dict[str, Any]:
    """Two texts to choose from in each row."""
    given = text(2 * batch, length)
    return {name: value.reshape(batch, 2, length) for name, value in given.items()}


def image(batch: int, length: int, side: int = SIDE, channels: int = 3) -> dict[str, Any]:
    """Pixels, 3 × 32 × 32."""
    return {"pixel_values": torch.randn(batch, channels, side, side, generator=_generator(batch, length))}


def video(frames: int) -> Inputs:
    """Pixels of some frames."""
    return lambda batch, length: {
        "pixel_values": torch.randn(batch, frames, 3, SIDE, SIDE, generator=_generator(batch, length))
    }


def wave(batch: int, length: int) -> dict[str, Any]:
    """A waveform of 400 samples."""
    return {"input_values": torch.randn(batch, 400, generator=_generator(batch, length))}


def features(name: str, *sizes: int) -> Inputs:
    """Some floating-point tensor, batch × sizes."""
    return lambda batch, length: {name: torch.randn(batch, *sizes, generator=_generator(batch, length))}


def speech_to_text(batch: int, length: int) -> dict[str, Any]:
    """Mel features, 8 bins × 160 frames, and the decoder's text."""
    target = torch.randint(8, VOCABULARY, (batch, length + 1), generator=_generator(batch, length))
    mel = torch.randn(batch, 8, 2 * POSITIONS, generator=_generator(batch, length))
    return {"input_features": mel, "decoder_input_ids": target}


def text_and_image(batch: int, length: int) -> dict[str, Any]:
    """A text and an image, for models that take one of each."""
    return {**text(batch, length), **image(batch, length)}


def around_image(tokens: int, token: int = 5) -> Inputs:
    """A text with the image's tokens before it: ``tokens`` times the id ``token``."""

    def make(batch: int, length: int) -> dict[str, Any]:
        given = text(batch, length)
        ids = torch.cat([torch.full((batch, tokens), token), given["input_ids"]], 1)
        mask = torch.cat([torch.ones(batch, tokens, dtype=torch.long), given["attention_mask"]], 1)
        return {"input_ids": ids, "attention_mask": mask, **image(batch, length)}

    return make


def around_frame(tokens: int) -> Inputs:
    """The same, with an axis for the images of a text."""

    def make(batch: int, length: int) -> dict[str, Any]:
        given = around_image(tokens)(batch, length)
        return {**given, "pixel_values": given["pixel_values"].unsqueeze(1)}

    return make


def around_patches(tokens: int) -> Inputs:
    """The same, with the patches of all images laid end to end, batch · 16 × (3 · 2 · 8 · 8)."""

    def make(batch: int, length: int) -> dict[str, Any]:
        given = around_image(tokens)(batch, length)
        pixels = torch.randn(batch * 16, 384, generator=_generator(batch, length))
        kinds = (torch.arange(tokens + length) < tokens).long().repeat(batch, 1)
        grid = torch.tensor([[1, 4, 4]] * batch)
        return {**given, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}

    return make


def inputs_called(spec: str) -> Inputs:
    """``text``, or a maker with its arguments: ``features:input_values,32,16``."""
    name, _, given = spec.partition(":")
    arguments = [int(item) if item.isdigit() else item for item in given.split(",")] if given else []
    maker = globals()[name]
    return maker(*arguments) if arguments else maker


# ---- models


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        kind: its model type in transformers
        head: the auto class, without ``AutoModel``: ``ForCausalLM``; empty for the bare model
        inputs: makes inputs for a batch size and a length
        changes: of its config, beyond the table of sizes
        free_length: whether the length of the inputs is free (images and sound have one size)
        own_inputs: whether capture gets example inputs, instead of making them up
    """

    kind: str
    head: str
    inputs: Callable[[int, int], dict[str, Any]]
    changes: Mapping[str, Any] = field(default_factory=dict)
    free_length: bool = True
    own_inputs: bool = False


def tiny_config(cls: type, changes: Mapping[str, Any]) -> Any:
    """A config of ``cls`` with the table's sizes and ``changes``, which may hold dicts for configs within it."""
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(cls):
        default = entry.default
        if any(word in entry.name for word in _NOISY):
            values[entry.name] = 0.0 if isinstance(default, float) else default
        elif "drop" in entry.name and isinstance(default, float | int) and not isinstance(default, bool):
            values[entry.name] = DROPOUT
        elif entry.name in SIZES and not isinstance(default, list | tuple):
            values[entry.name] = SIZES[entry.name]
    changes = dict(changes)
    for name, part in getattr(cls, "sub_configs", {}).items():
        inner = changes.pop(name, {})
        if isinstance(inner, Mapping):
            inner = dict(inner)
            kind = inner.pop("model_type", None)
            owner = hf.CONFIG_MAPPING[kind] if kind else part
            if owner is hf.AutoConfig:
                continue
            inner = tiny_config(owner, inner)
        values[name] = inner
    values = {name: value for name, value in values.items() if value is not dataclasses.MISSING}
    return cls(**{**values, **changes})


def build(family: Family) -> nn.Module:
    """A fresh model, the same at each call, in evaluation mode."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        config = tiny_config(hf.CONFIG_MAPPING[family.kind], {**_labels(family.head), **family.changes})
        owner = getattr(hf, f"AutoModel{family.head}", None)
        model = owner.from_config(config) if owner is not None else getattr(hf, family.head)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _labels(head: str) -> dict[str, Any]:
    return {"num_labels": LABELS} if head.endswith(("Classification", "Segmentation")) else {}


def _read() -> dict[str, Family]:
    found: dict[str, Family] = {}
    for group in TABLE["group"]:
        inputs, free, own = inputs_called(group["inputs"]), group.get("free", True), group.get("own", False)
        for kind in group["kinds"].split():
            name = group.get("name", kind)
            assert name not in found, f"two families are called {name}"
            found[name] = Family(kind, group["head"], inputs, TABLE["changes"].get(name, {}), free, own)
    return found


#: Every family, by name.
FAMILIES = _read()
