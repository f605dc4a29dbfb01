"""Scale keys, values and feed-forward activations by learned vectors ((IA)³)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorafx.base import Method, Promise, option
from lorafx.edit import Edit
from lorafx.module import MethodState
from lorafx.site import Site

aten = torch.ops.aten


@dataclass(frozen=True)
class Ia3(Method):
    """Scale keys, values and feed-forward activations by learned vectors.

    Before: ``k = W_k x + b``, ``y = W_down h + b``
    After: ``k = l ⊙ (W_k x + b)``, ``y = W_down (l ⊙ h) + b``

    One vector l for each weight, fp32, initialised to ones: on what a weight gives, except for the down projection of
    a feed-forward layer, where it is on what the weight reads. It folds into the weight, so the deployed model is as
    large and as fast as the base.

    Keeps: the outputs, bit by bit, since l = 1. Does nothing where no target matches (and says so).
    Source: Liu et al. 2022, arXiv 2205.05638, section 3.3.
    """

    promise: ClassVar[Promise] = Promise.EXACT

    targets: str | tuple[str, ...] = option(
        ("role:attn.{key,value}", "role:ffn.down"), "where: as for every pass; (IA)³ scales keys, values and h"
    )
    allow_empty: bool = option(True, "selecting nothing is not an error")
    pull: float = option(0.0, "weight of a penalty that pulls the vectors towards one", least=0)

    def rewrite(self, edit: Edit, site: Site) -> None:
        inside = site.role == "ffn.down"
        size = site.in_features if inside else site.out_features
        scale = edit.parameter(site, "ia3_l", (size,), nn.init.ones_)
        value = site.input if inside else site.node
        with edit.after(value):
            wide = edit.cast(value, scale.meta["val"].dtype)
            scaled = edit.cast(edit.call(aten.mul.Tensor, wide, scale), value.meta["val"].dtype)
        if inside:
            edit.feed(site.node, value, scaled)
        else:
            edit.replace(value, scaled)

    def penalty(self, state: MethodState) -> Tensor | None:
        if self.pull == 0.0 or not state.sites:
            return None
        distances = [(site["ia3_l"] - 1).square().mean() for site in state.sites]
        return self.pull * torch.stack(distances).mean()
