"""Masks whose values a model's code reads: some models drop a mask that masks nothing, and then compute another
function.

A graph holds one of the two. The example has a padded row, so it is the one with the mask; where the eager model
differs for texts without padding, no graph is right for both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CaptureError
from ..models.eager import answers, in_mode, same
from ..models.tokenizers import is_mask
from ..public import Program


def check_unpadded(program: Program) -> None:
    """CaptureError when the graph differs from the eager model on the example without its padding."""
    masks = {name: torch.ones_like(value) for name, value in program.example.items() if _is_mask(name, value)}
    if not masks:
        return
    model, inputs = program.source.model, {**program.example, **masks}
    with in_mode(model, training=False):
        expected = answers(model, inputs)
    if not same(expected, answers(program.module().eval(), inputs)):
        raise CaptureError(
            f"{program.name} computes something else for texts without padding: its code looks into "
            f"{', '.join(masks)}, and a graph cannot; capture it with every input that its processor makes"
        )


def _is_mask(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and is_mask(name) and value.dim() == 2 and not value.is_meta
