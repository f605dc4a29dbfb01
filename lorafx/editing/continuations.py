"""What a causal language model says next: prompts as token ids, greedy continuations, most likely tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..models.checkpoint import open_tokenizer
from ..models.tokenizers import TOKEN_TYPES

#: Prompts in one forward pass: the logits of a batch are its largest tensor.
_BATCH = 16
#: A prompt's token ids, and those of the target that follows it.
Pair = tuple[list[int], list[int]]


class Encoder:
    """Texts to token ids with the tokenizer of a checkpoint folder. ArtifactError when the folder has none.

    A text of more than ``limit`` tokens is a UsageError.
    """

    def __init__(self, checkpoint: Path, limit: int | None = None):
        self._tokenizer = open_tokenizer(checkpoint)
        self._limit = limit

    def prompt(self, text: str) -> list[int]:
        """The ids of a prompt, with the special tokens that come before a text and without those after it."""
        return self._checked(text, self._lead(text) + self._plain(text))

    def pair(self, prompt: str, target: str) -> Pair:
        """The ids of a prompt and of its target, after a space unless there is one between them already.

        Both are cut from the ids of the whole text, as a tokenizer may join characters across the cut: a token that
        spans it belongs to the target.
        """
        gap = "" if target[:1].isspace() or prompt[-1:].isspace() else " "
        alone, whole = self._plain(prompt), self._plain(prompt + gap + target)
        same = [a == b for a, b in zip(alone, whole, strict=False)]
        cut = same.index(False) if False in same else len(same)
        ids = self._lead(prompt) + whole[:cut]
        self._checked(f"{prompt}{gap}{target}", ids + whole[cut:])
        if not ids or not whole[cut:]:
            raise UsageError(f"{prompt!r} and {target!r}: the tokenizer makes nothing of one of them")
        return ids, whole[cut:]

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _lead(self, text: str) -> list[int]:
        plain, full = self._plain(text), list(self._tokenizer(text)["input_ids"])
        found = (start for start in range(len(full)) if full[start : start + len(plain)] == plain)
        return full[: next(found, 0)]

    def _checked(self, text: str, ids: list[int]) -> list[int]:
        if not ids:
            raise UsageError(f"{text!r}: the tokenizer makes nothing of it")
        if self._limit is not None and len(ids) > self._limit:
            raise UsageError(f"{text[:40]!r}… has {len(ids)} tokens; the model reads {self._limit}")
        return ids


def batch_of(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Rows of token ids as inputs (rows, longest), padded on the right and masked, so that no position shifts."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def inputs_of(model: Any, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Rows as inputs of a model, on its device, with the token types that its tokenizer gives a single text, if any."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch_of(rows).items()}
    captured = model.program.example if hasattr(model, "program") else {}
    return {**inputs, **({TOKEN_TYPES: torch.zeros_like(inputs["input_ids"])} if TOKEN_TYPES in captured else {})}


@torch.no_grad()
def top_tokens(model: Any, prompts: Sequence[Sequence[int]]) -> list[int]:
    """The most likely next token after each prompt."""
    tops = []
    for rows, logits in _logits(model, prompts):
        tops += [int(own[len(row) - 1].argmax()) for row, own in zip(rows, logits, strict=True)]
    return tops


@torch.no_grad()
def says(model: Any, pairs: Sequence[Pair]) -> list[bool]:
    """Whether the greedy continuation of each prompt is its target: read from one pass over prompt and target, since
    that is so exactly when each token of the target is the most likely one after those before it.
    """
    hits: list[bool] = []
    for rows, logits in _logits(model, [prompt + target for prompt, target in pairs]):
        for row, own, (_, target) in zip(rows, logits, pairs[len(hits) :], strict=False):
            first = len(row) - len(target)
            hits.append(own[first - 1 : len(row) - 1].argmax(-1).tolist() == target)
    return hits


def _logits(model: Any, rows: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[Sequence[int]], Tensor]]:
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        yield part, model(**inputs_of(model, part)).logits
