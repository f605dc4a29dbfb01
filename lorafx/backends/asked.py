"""Whether transformers' generation asks a model for what the model computes of whole texts.

A graph with a cache is asked as generation asks. Where that is something else than what was trained, no graph mends it:
other positions, texts read both ways, padding that is counted as text. Each is found by running the eager model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CaptureError, UsageError
from ..graph.domain import leaves_of
from ..models.eager import cacheless, is_text, same, same_draws
from ..models.intact import unwritten
from ..models.tokenizers import length_limit
from ..public import Program
from .past import ELSE

_POSITIONS = "position_ids"
#: Lengths of texts that any encoder is given.
_LENGTHS = (1, 2, 3, 5, 8, 16)


def check_asked(model: Any, left: Mapping[str, Tensor], prefill: Mapping[str, Any]) -> None:
    """CaptureError unless what generation asks of ``model`` first is what it computes of each text alone.

    Args:
        model: a causal language model
        left: its example inputs, ``[batch, tokens]`` each, the first text whole and others padded on the left
        prefill: what transformers' generation gave it for them
    """
    what, asked = type(model).__name__, {name: value for name, value in prefill.items() if isinstance(value, Tensor)}
    alone = [_logits(model, _one(left, row)) for row in range(len(left["input_ids"]))]
    some = alone[0].shape[1] // 2
    if not same([alone[0][:, :some]], [_logits(model, {name: value[:1, :some] for name, value in left.items()})]):
        config = getattr(model.config, "is_decoder", True)
        said = "" if config else " (is_decoder = false in its config)"
        raise CaptureError(
            f"{what}: what follows a token changes what it says of it{said}: no cache holds that; {ELSE}"
        )
    if _agree(model, asked, alone[:1]):
        if _agree(model, asked, alone):
            return
        why = "it counts padding before a text among the text's positions, so that texts in a batch are others"
    elif _POSITIONS in asked and _agree(model, {k: v for k, v in asked.items() if k != _POSITIONS}, alone[:1]):
        why = "transformers' generation gives it position_ids from 0, others than those that it counts by itself"
    else:
        why = f"transformers' generation asks it, by {', '.join(asked)}, for something else than what it computes"
    raise CaptureError(f"{what}: {why}; {ELSE}")


def _agree(model: Any, asked: Mapping[str, Tensor], alone: Iterable[Tensor]) -> bool:
    """Whether the first texts of a batch have the logits that they have alone, ``[1, tokens, vocabulary]`` each."""
    found = _logits(model, asked)
    return all(same([one], [found[row : row + 1, -one.shape[1] :]]) for row, one in enumerate(alone))


def _one(left: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """One text without its padding."""
    count = int(left["attention_mask"][row].sum()) if "attention_mask" in left else left["input_ids"].shape[1]
    return {name: value[row : row + 1, -count:] for name, value in left.items()}


def _logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad(), same_draws(), cacheless(model), unwritten(model):
        return model(**inputs, return_dict=True).logits


def check_lengths(program: Program) -> None:
    """CaptureError unless a program of an encoder-decoder is one of texts of any length.

    The graph of its encoder cannot refuse a length. (A decoder's graph is traced with its cache, where lengths are
    others, and all it says of short texts is held against what the program says of long ones.)
    """
    limit, domain = length_limit(program.config), program.signature.domain
    for count in _LENGTHS:
        if limit is not None and count > limit:
            return
        inputs = {
            name: value.new_empty((len(value), count), device="meta") if is_text(value) else value
            for name, value in program.example.items()
        }
        try:
            domain.check(leaves_of(inputs), program.name)
        except UsageError as error:
            said = str(error).split(";")[0]
            why = "the graph of an encoder is given texts of every length and can refuse none"
            raise CaptureError(f"{said}; {why}; {ELSE}") from None
