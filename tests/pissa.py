"""A method whose initial values are made of the weights, as one in a package of its own would be written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from lorafx.base import Promise, option
from lorafx.edit import Edit
from lorafx.methods.low_rank import LowRank
from lorafx.site import Site

aten = torch.ops.aten


def right(rank: int, weight: Tensor) -> Tensor:
    """√S Vᵀ (rank, in) of the principal part."""
    _, s, v = torch.linalg.svd(weight, full_matrices=False)
    return s[:rank].sqrt().unsqueeze(1) * v[:rank]


def left(rank: int, weight: Tensor) -> Tensor:
    """U √S (out, rank)."""
    u, s, _ = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank].sqrt()


@dataclass(frozen=True)
class Pissa(LowRank):
    """Train the principal part of each selected weight (PiSSA).

    Before: ``y = W x + b``
    After: ``y = W x + b + (B A x - B₀ A₀ x)``, where B and A begin as B₀ and A₀, W's best approximation of this rank

    Keeps: the outputs, bit by bit, since the two branches begin alike. Does nothing where no target matches.
    Source: Meng et al. 2024, arXiv 2404.02948, eq. 2 to 5.
    """

    promise: ClassVar[Promise] = Promise.EXACT

    rank: int = option(4, "rank of the principal part", least=1)

    def rank_of(self, site: Site) -> int:
        return self.checked_rank(self.rank, site)

    def scale_of(self, site: Site) -> float:
        return 1.0

    def factor_a(self, edit: Edit, site: Site, shape: tuple[int, ...]) -> fx.Node:
        return edit.parameter(site, "lora_A.weight", shape, of_weight=partial(right, shape[0]))

    def factor_b(self, edit: Edit, site: Site, shape: tuple[int, ...]) -> fx.Node:
        return edit.parameter(site, "lora_B.weight", shape, of_weight=partial(left, shape[1]))

    def leave(self, edit: Edit, site: Site, delta: fx.Node) -> fx.Node:
        rank = self.rank_of(site)
        a, b = (rank, site.in_features), (site.out_features, rank)
        first = edit.parameter(site, "start_A", a, role="statistic", of_weight=partial(right, rank))
        second = edit.parameter(site, "start_B", b, role="statistic", of_weight=partial(left, rank))
        hidden = edit.call(aten.linear.default, edit.cast(site.input, first.meta["val"].dtype), first)
        return edit.call(aten.sub.Tensor, delta, edit.call(aten.linear.default, hidden, second))
