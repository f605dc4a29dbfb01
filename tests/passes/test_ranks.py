"""Ranks and the weights that cannot hold them: gates of one output, routers of few experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx.base import Pass
from lorafx.errors import NoSitesError, UsageError
from lorafx.passes.lora import Lora
from lorafx.passes.rose_lora import RoseLora


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate = nn.Linear(8, 6), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * self.gate(x).sigmoid()


@pytest.fixture(scope="module")
def gated() -> lorafx.Program:
    return lorafx.capture(Gated(), inputs={"x": torch.ones(2, 8)})


@pytest.mark.parametrize("method", [Lora(rank=2), RoseLora(rank=2)])
def test_all_linear_passes_over_what_cannot_hold_the_rank_and_says_so(gated: lorafx.Program, method: Pass):
    applied = lorafx.rewrite(gated, [method]).history[-1]
    assert [item.module for item in applied.inserted] == ["up"]
    (miss,) = applied.missed
    assert (miss.site.module, miss.reason) == (
        "gate",
        f"{method.pass_name()}: rank 2 at gate, whose weight allows 1 to 1",
    )


def test_a_rank_that_fits_is_taken(gated: lorafx.Program):
    assert [item.module for item in lorafx.rewrite(gated, [Lora(rank=1)]).history[-1].inserted] == ["up", "gate"]


@pytest.mark.parametrize("targets", ["gate", "up,gate", "role:other", ".*"])
def test_a_weight_that_is_named_is_the_users_to_decide(gated: lorafx.Program, targets: str):
    with pytest.raises(UsageError, match="lora: rank 2 at gate, whose weight allows 1 to 1"):
        lorafx.rewrite(gated, [Lora(targets=targets, rank=2)])


def test_a_rank_no_weight_can_hold_is_refused(gated: lorafx.Program):
    with pytest.raises(NoSitesError, match=r"took 0 of 2 weight uses.*rank 7 at"):
        lorafx.rewrite(gated, [Lora(rank=7)])
    with pytest.raises(UsageError, match="rank = 0, but it is at least 1"):
        lorafx.rewrite(gated, [Lora(rank=0)])
