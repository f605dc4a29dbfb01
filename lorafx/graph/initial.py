"""The initial value of a new tensor: zero, random, or computed from a weight once that has values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import CaptureError
from .site import WEIGHT_OPS, Site


def initial_value(
    site: Site,
    weight: Tensor,
    shape: tuple[int, ...],
    init: Callable[[Tensor], object] | None,
    of_weight: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """A tensor of ``shape`` in fp32, or wider if ``weight`` is; see :meth:`lorafx.graph.edit.Edit.parameter`.

    Where the weight is. Of one without values yet it is on the meta device if it is made of it, else on the CPU.

    Raises:
        CaptureError: what was made of the weight has another shape, or is not finite
    """
    dtype = torch.promote_types(torch.float32, weight.dtype)
    if of_weight is None:
        value = torch.zeros(shape, dtype=dtype)  # on the CPU, so that a seed gives the same values on every device
        if init is not None:
            with torch.no_grad():
                init(value)
        return value if weight.is_meta else value.to(weight.device)
    if weight.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    with torch.no_grad():
        plain = weight.detach().to(dtype)
        # A copy: it may be a part of the weight, and is to be trained.
        value = of_weight(site.op.matrix(plain) if site.node.target in WEIGHT_OPS else plain).to(dtype, copy=True)
    if value.shape != shape or not bool(value.isfinite().all()):
        found = "values that are not finite" if value.shape == shape else f"shape {tuple(value.shape)}, not {shape}"
        raise CaptureError(f"{site.module}: what was made of its weight has {found}; look at the pass's initial values")
    return value.contiguous()
