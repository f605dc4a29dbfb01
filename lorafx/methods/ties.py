"""Weights that may share factors: those at one place of every block, and those of one module that read one value."""

from __future__ import annotations

import torch
from torch import fx

from ..graph.site import Site, stack_of

aten = torch.ops.aten

#: Operators whose result is their input in another shape or dtype.
_SAME = (aten.view.default, aten.reshape.default, aten.contiguous.default, aten.to.dtype, aten._to_copy.default)


def place_in_block(site: Site) -> str:
    """The place of a weight in its block, with its shape: ``encoder.layer.attention.query.64x32``, the same in all."""
    stack, size = stack_of(site.module), f"{site.out_features}x{site.in_features}"
    inside = site.module.removeprefix(stack).lstrip(".").partition(".")[2]
    return f"{stack}.{inside}.{size}" if inside else f"{site.module}.{size}"


def value_read(site: Site) -> fx.Node:
    """The value a weight reads, before it is reshaped or cast for it."""
    value = site.input
    while value.target in _SAME and isinstance(value.args[0], fx.Node):
        value = value.args[0]
    return value
