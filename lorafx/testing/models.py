"""The tiny random models that passes are held to their laws on: two layers, all parameters away from 0 and 1.

An encoder (linear weights with biases), a decoder (fused Conv1D weights and a tied output), and one with convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..frontend.capture import capture
from ..graph.program import P
from ..public import Program
from .captures import shared

VOCABULARY = 120
LABELS = 3
#: Dropout probabilities are not 0 while capturing, so that the training graph has them and evaluation must drop them.
DROPOUT = 0.1


@dataclass(frozen=True)
class Entry:
    """One family.

    Attributes:
        build: makes the model, given the dropout probability
        inputs: makes inputs for a batch size and a length
        free_length: whether the length of the inputs is free (images and sound have one size)
    """

    build: Callable[[float], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    free_length: bool = True


# ---- inputs


def generator(batch: int, length: int) -> torch.Generator:
    """Random numbers that are the same for inputs of one shape."""
    return torch.Generator().manual_seed(1000 * batch + length)


def text(batch: int, length: int) -> dict[str, Any]:
    """Token ids and a mask; the last row is padded to the right once it is longer than one token."""
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=generator(batch, length))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 + 1 :] = 0
    # Token 1 pads in every config below; RoBERTa reads positions from it and decoders' heads the last token.
    return {"input_ids": torch.where(mask.bool(), ids, torch.ones_like(ids)), "attention_mask": mask}


def image(batch: int, length: int) -> dict[str, Any]:
    """Pixels, 3 × 16 × 16."""
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator(batch, length))}


# ---- builders

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT_SIZES: dict[str, Any] = {**_SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 80, "pad_token_id": 1}
TEXT_SIZES |= {"num_labels": LABELS}
IMAGE_SIZES: dict[str, Any] = {**_SIZES, "image_size": 16, "patch_size": 8}


def hidden_dropout(p: float) -> dict[str, Any]:
    """The two dropouts of BERT and its kin."""
    return {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}


def _bert(p: float) -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**TEXT_SIZES, **hidden_dropout(p)))


def _gpt2(p: float) -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 80}
    dropouts: dict[str, Any] = {"resid_pdrop": p, "embd_pdrop": p, "attn_pdrop": p}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **dropouts, bos_token_id=2, eos_token_id=3, pad_token_id=1))


def _vit(p: float) -> nn.Module:
    labels: dict[str, Any] = {"num_labels": LABELS}
    return hf.ViTForImageClassification(hf.ViTConfig(**IMAGE_SIZES, **hidden_dropout(p), **labels))


#: By name.
FAMILIES: dict[str, Entry] = {
    "bert": Entry(_bert, text),
    "gpt2": Entry(_gpt2, text),
    "vit": Entry(_vit, image, free_length=False),
}


def built(entry: Entry, dropout: float = DROPOUT, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh model, the same at each call, in evaluation mode. Every parameter is moved off its initial value, so that
    no bias is accidentally 0 and no norm 1."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = entry.build(dropout)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


@shared
def captured(name: str, dropout: float = DROPOUT, dtype: torch.dtype = torch.float32) -> Program:
    """One of :data:`FAMILIES` as a program, made once; change a copy (:mod:`lorafx.testing.captures`)."""
    return capture(built(FAMILIES[name], dropout, dtype))


@cache
def saved(name: str, below: Path) -> Path:
    """One of :data:`FAMILIES` as a checkpoint folder, written once below a folder for the whole session."""
    folder = below / "lorafx-models" / name
    model: Any = built(FAMILIES[name])
    model.save_pretrained(folder)
    return folder


def tensors(outputs: Any) -> dict[str, Tensor]:
    """The tensors of a model output, by name."""
    flat, _ = pytree.tree_flatten_with_path(outputs)
    return {pytree.keystr(path): value for path, value in flat if isinstance(value, Tensor)}


def randomised(program: P, size: float = 0.3) -> P:
    """``program`` with normal random numbers in every adapter tensor that is zero, so that adapters do something."""
    generator = torch.Generator().manual_seed(1)
    values = {name: program.tensor(name) for name in program.names("adapter")}
    zero = [name for name, value in values.items() if not value.any()]
    program.load({name: size * torch.randn(values[name].shape, generator=generator) for name in zero})
    return program
