"""Masks that a model looks into: some leave a mask out where it masks nothing, and then compute another function.

A graph holds one of the two. The example has a padded row, so it is the one with the mask; where the eager model gives
something else for texts without padding, no graph is right for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..models.eager import cacheless, same_draws
from ..models.tokenizers import is_mask
from ..public import Program


def check_unpadded(program: Program) -> None:
    """CaptureError when the graph differs from the eager model on the example without its padding."""
    masks = {name: torch.ones_like(value) for name, value in program.example.items() if _is_mask(name, value)}
    if not masks:
        return
    model, inputs = program.source.model, {**program.example, **masks}
    modes = [(module, module.training) for module in model.modules()]
    try:
        expected = _outputs(model.eval(), inputs)
    finally:
        for module, mode in modes:
            module.training = mode
    found = _outputs(program.module().eval(), inputs)
    if not all(_close(a, b) for a, b in zip(expected, found, strict=True)):
        raise CaptureError(
            f"{program.name} computes something else for texts without padding: its code looks into "
            f"{', '.join(masks)}, and a graph cannot; capture it with every input that its processor makes"
        )


def _is_mask(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and is_mask(name) and value.dim() == 2 and not value.is_meta


def _outputs(model: nn.Module, inputs: Mapping[str, Any]) -> list[Any]:
    with torch.no_grad(), same_draws(), cacheless(model):
        return pytree.tree_leaves(model(**inputs))


def _close(a: Any, b: Any) -> bool:
    """Within the square root of the dtype's precision: far above rounding, far below another function."""
    if not isinstance(a, Tensor) or not a.is_floating_point():
        return True
    scale = float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=scale * torch.finfo(a.dtype).eps ** 0.5, equal_nan=True)
