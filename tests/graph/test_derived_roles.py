"""Roles read off the graph: a model whose names say nothing has them where its operators do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

import lorafx
from lorafx.models.roles import role_of
from lorafx.passes.finegates import Finegates
from lorafx.passes.lora import Lora
from tests import zoo

WIDTH, HEADS, HIDDEN = 16, 2, 24


class Block(nn.Module):
    """Attention and a feed-forward part; ``fused`` and ``gated`` say how, the names say nothing."""

    def __init__(self, fused: bool, gated: bool):
        super().__init__()
        self.fused, self.gated = fused, gated
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.m1 = nn.Linear(WIDTH, 3 * WIDTH if fused else WIDTH)
        self.m2, self.m3, self.m4 = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.m5, self.m6, self.m7 = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.m8 = nn.Linear(WIDTH, 2 * HIDDEN)
        self.m9 = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n1(x)
        parts = self.m1(y).chunk(3, -1) if self.fused else (self.m1(y), self.m2(y), self.m3(y))
        q, k, v = (part.view(*part.shape[:-1], HEADS, WIDTH // HEADS).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q * q.cos(), F.normalize(k), v)
        x = x + self.m4(mixed.transpose(1, 2).reshape(x.shape))
        y = self.n2(x)
        if self.fused:
            gate, up = self.m8(y).chunk(2, -1)
            hidden = F.silu(gate) * up
        else:
            hidden = F.silu(self.m5(y)) * self.m6(y) if self.gated else F.gelu(self.m5(y))
        return x + self.m7(hidden) + self.m9(y)


class Opaque(nn.Module):
    def __init__(self, fused: bool = False, gated: bool = False):
        super().__init__()
        self.first = nn.Linear(4, WIDTH)
        self.parts = nn.ModuleList(Block(fused, gated) for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.first(x)
        for part in self.parts:
            y = part(y)
        return {"y": y}


def captured(**how: bool) -> lorafx.Program:
    torch.manual_seed(0)
    return lorafx.capture(Opaque(**how), inputs={"x": torch.randn(2, 5, 4)})


def roles(program: Any) -> dict[str, str]:
    """The roles in the second block, and outside, by the last component."""
    own = [site for site in program.sites() if program.roles[site.parameter] == "base" and site.block != 0]
    return {site.module.rpartition(".")[2]: site.role for site in own}


ATTENTION = {"m1": "attn.query", "m2": "attn.key", "m3": "attn.value", "m4": "attn.out"}
REST = {"m9": "other", "first": "other"}
PLAIN = {**ATTENTION, "m5": "ffn.up", "m7": "ffn.down", **REST}
EXPECTED: dict[str, tuple[dict[str, bool], dict[str, str]]] = {
    "plain": ({}, PLAIN),
    "gated": ({"gated": True}, {**PLAIN, "m5": "ffn.gate", "m6": "ffn.up"}),
    "fused": (
        {"fused": True},
        {"m1": "attn.qkv", "m4": "attn.out", "m8": "ffn.gate_up", "m7": "ffn.down", **REST},
    ),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_opaque_names_have_the_roles_of_their_places(kind: str) -> None:
    how, expected = EXPECTED[kind]
    assert roles(captured(**how)) == expected


def test_a_target_may_name_a_role_that_no_name_tells() -> None:
    taken = Lora(targets="role:attn.query").sites(captured()).taken
    assert [site.module for site in taken] == ["parts.0.m1", "parts.1.m1"]


def test_what_is_inserted_leaves_the_roles_as_they_are() -> None:
    program = captured(gated=True)
    adapted = lorafx.rewrite(program, [Lora(rank=2), Finegates(couple=False)], check=False)
    assert roles(adapted) == roles(program)


def test_names_that_are_known_decide() -> None:
    for model in ("bert", "gpt2", "llama"):
        for site in zoo.captured(model).sites():
            if site.role not in ("other", "head"):
                assert site.role == role_of(site.module, site.kind)
