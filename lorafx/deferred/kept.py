"""An operator that restores a tensor's old bits wherever the values are equal.

A number that did not change may have lost its sign: -0.0 + 0 is +0.0. Telling which, number by number, takes half the
time of composing a low-rank weight in bf16, and only zeros can be affected, so it is checked first whether there are
any.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The integer type for the bits of a number, by its size in bytes.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_library = torch.library.Library("lorafx", "DEF")
_library.define("keep_bits(Tensor value, Tensor old) -> Tensor", tags=(torch.Tag.pointwise,))


def _keep_bits(value: Tensor, old: Tensor) -> Tensor:
    if not _has_zeros(value):
        return value.clone()
    return torch.where(value == old, old, value)


def _has_zeros(value: Tensor) -> bool:
    """Whether any number is zero, of either sign: all of its bits but the first are."""
    bits = value.contiguous().view(_BITS[value.element_size()]) << 1
    return int(bits.count_nonzero()) < value.numel()


def _of_shapes(value: Tensor, old: Tensor) -> Tensor:
    return torch.empty_like(value)


_library.impl("keep_bits", _keep_bits, "CompositeExplicitAutograd")
_library.impl("keep_bits", _of_shapes, "Meta")

#: ``value`` with the bits of ``old`` where the two are equal; of one shape and dtype, and not to be trained.
keep_bits = torch.ops.lorafx.keep_bits.default
