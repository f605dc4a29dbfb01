"""Graphs the judge found failing, made small: each is one kind of fault, and everything has to hold for it now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.judge.judge import SIZES, hold

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | None]] = {}


class Small(nn.Module):
    """A module from a function of its parts, which stand in a block, and of an input."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: Any):
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.layers[0].register_buffer(name, part)
            else:
                setattr(self.layers[0], name, part)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layers[0], x)


def case(*shape: int) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register a module with the shape of its input beside the batch; none for token numbers."""

    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        CASES[make.__name__] = make, shape or None
        return make

    return register


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 2)


def closed(part: Any, rows: slice, bias: float = 0.0) -> Any:
    """A part some rows of whose weight are zero; their bias is a constant."""
    part.weight.data[rows] = 0.0
    if getattr(part, "bias", None) is not None:
        part.bias.data[rows] = bias
    return part


# ---- axes


@case(6, 8)
def keys_and_values_of_unequal_width_from_one_projection() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        k, v = s.kv(x).unflatten(-1, (2, 7)).transpose(1, 2).split([3, 4], -1)
        q = s.q(x).view(x.shape[0], 6, 2, 3).permute(0, 2, 1, 3)
        state = k.softmax(-2).transpose(-1, -2) @ v
        return s.o((q.softmax(-1) @ state).transpose(1, 2).flatten(2)).mean(1)

    return Small(forward, kv=closed(nn.Linear(8, 14), slice(2, 5)), q=nn.Linear(8, 6), o=nn.Linear(8, 2))


@case(4, 12)
def experts_weighted_by_one_channel_each() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        scores = s.router(x).softmax(-1)
        experts = [s.down(F.relu(s.up(x))), s.other(x)]
        return scores[..., 0:1] * experts[0] + scores[..., 1:2] * experts[1]

    up = closed(nn.Linear(12, 8), slice(0, 8, 2), 0.5)
    return Small(forward, router=nn.Linear(12, 3), up=up, down=nn.Linear(8, 12), other=nn.Linear(12, 12))


@case(4, 5)
def addmm_with_beta_and_closed_columns() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.o(torch.addmm(s.b, x.reshape(-1, 5), s.w, beta=0.5).view(x.shape[0], 4, 8))

    w = weight(5, 8)
    w.data[:, [1, 3, 4, 5]] = 0.0
    return Small(forward, w=w, b=weight(8), o=nn.Linear(8, 2))


@case()
def addmm_with_a_bias_of_one_row_and_alpha() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = torch.addmm(s.b, s.e(x).reshape(-1, 6), s.w, alpha=2.0)
        return s.o(h.view(x.shape[0], x.shape[1], 8))

    return Small(forward, e=closed(nn.Embedding(11, 6), slice(0, 4)), b=weight(1, 8), w=weight(6, 8), o=nn.Linear(8, 3))


@case(4, 12)
def every_second_channel_is_cut_out() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.o(s.b(s.a(x)[..., ::2])[:, 0])

    b = nn.Linear(12, 12)
    b.weight.data[:, 3:7] = 0.0
    return Small(forward, a=nn.Linear(12, 24), b=b, o=nn.Linear(12, 3))


@case(6, 8)
def cat_along_tokens_with_a_part_that_has_no_channels() -> nn.Module:
    return Small(lambda s, x: s.o(torch.cat([x, s.a(x)], 1)), a=closed(nn.Linear(8, 8), slice(2, 5)), o=nn.Linear(8, 3))


@case()
def two_output_channels_a_group() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.b(s.a(s.e(x).transpose(1, 2)))

    a = nn.Conv1d(6, 8, 1, bias=False)
    a.weight.data[:, [1, 2, 4]] = 0.0
    return Small(forward, e=nn.Embedding(11, 6), a=a, b=nn.Conv1d(8, 16, 1, groups=8, bias=False))


@case(6, 8)
def fused_attention_without_heads_whose_values_are_wider() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        q = s.q(x)
        return s.o(F.scaled_dot_product_attention(q, q, s.v(x)))

    return Small(forward, q=nn.Linear(8, 4), v=closed(nn.Linear(8, 12), slice(0, 3), 0.5), o=nn.Linear(12, 2))


@case(6, 8)
def transposed_convolution_in_groups_then_a_linear_over_positions() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        return F.linear(s.b(s.a(s.l(x))), s.w, s.c)

    a = closed(nn.Conv1d(6, 8, 2, padding=1), slice(1, 8, 3), 0.5)
    b = nn.ConvTranspose1d(8, 8, 1, stride=2, groups=2, bias=False)
    return Small(forward, l=closed(nn.Linear(8, 12), slice(2, 6)), a=a, b=b, w=weight(2, 25), c=weight(2))


@case()
def baddbmm_of_a_number_and_scores() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.b(s.a(s.e(x)).square())
        return torch.baddbmm(s.t, s.q(h), (h @ s.k).transpose(1, 2), alpha=0.5).softmax(-1) @ (h @ s.v)

    parts = {"q": nn.Linear(8, 4), "k": weight(8, 4), "v": weight(8, 12), "t": weight(1, 1, 1)}
    a = closed(nn.Linear(8, 8), slice(1, 8, 2))
    return Small(forward, e=nn.Embedding(11, 8), a=a, b=nn.Linear(8, 8), **parts)


# ---- what is written in place


@case()
def every_second_channel_of_a_table_grows_in_place() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.e(x)
        h[..., ::2] += 1.0
        return F.linear(s.a(h), s.w, s.b)

    e = nn.Embedding(11, 8)
    e.weight.data[:] = 0.0
    return Small(forward, e=e, a=nn.Linear(8, 4), w=weight(3, 4), b=weight(3))


@case()
def part_of_a_result_grows_in_place() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.b(s.a(s.e(x)))
        h[..., ::2] += 1.0
        return h

    a = closed(nn.Linear(8, 12), slice(1, 9, 2))
    return Small(forward, e=nn.Embedding(11, 8), a=a, b=nn.Linear(12, 8, bias=False))


# ---- adapters, gates and what folds


@case(6, 8)
def weight_times_a_row_before_a_linear() -> nn.Module:
    return Small(lambda s, x: s.o(F.linear(x, s.w * s.r)), w=weight(4, 8), r=weight(8), o=nn.Linear(4, 6, bias=False))


@case(4, 6)
def linear_of_a_transposed_value() -> nn.Module:
    """torch sums in another order where the weight trains: inserting an adapter, which freezes it, keeps the bits."""
    return Small(lambda s, x: F.linear(x.transpose(1, 2), s.w, s.b), w=weight(6, 4), b=weight(6))


@case()
def encoder_layer_of_torch() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 3, 8, batch_first=True, norm_first=True, dropout=0.0)
    return Small(lambda s, x: s.t(s.e(x)), e=nn.Embedding(11, 6), t=closed_hidden(layer))


def closed_hidden(layer: Any) -> Any:
    closed(layer.linear1, slice(0, 3), -0.5)
    return layer


@case()
def two_weights_of_one_module_over_learned_tokens() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        learned = s.t.expand(x.shape[0], -1, -1)
        return F.linear(F.linear(learned, s.a), s.b, s.c) + s.e(x).mean(1, keepdim=True)

    return Small(forward, e=nn.Embedding(11, 8), t=weight(1, 3, 8), a=weight(4, 8), b=weight(8, 4), c=weight(8))


@case()
def linear_of_nothing_and_a_value_repeated_from_one_channel() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.b(F.linear(s.e(x), s.w, s.c).expand(*x.shape, 12))
        return (h + s.d(s.a(h) * 0.0)) @ s.v

    parts = {"a": nn.Linear(6, 6), "d": nn.Linear(6, 6), "v": weight(6, 2)}
    return Small(forward, e=nn.Embedding(11, 6), w=weight(1, 6), c=weight(1), b=nn.Linear(12, 6, bias=False), **parts)


@case(8)
def norm_over_rows_that_are_no_channels() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.n(s.a(x[:, None].expand(-1, 6, -1)))
        return h @ s.w

    norm = nn.LayerNorm([6, 12])
    norm.weight.data[2:] = 0.0
    norm.bias.data[2:] = 0.0
    return Small(forward, a=closed(nn.Linear(8, 12), slice(0, 3)), n=norm, w=weight(12, 3))


@case()
def scores_of_narrowed_queries_with_a_bias_of_one_number() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.c(s.e(x).transpose(1, 2)).transpose(1, 2)
        return s.o(torch.baddbmm(s.b, h, s.q(h).transpose(1, 2), alpha=0.5).softmax(-1) @ (h @ s.v))

    parts = {"c": nn.Conv1d(6, 6, 2, groups=6), "q": closed(nn.Linear(6, 6, bias=False), slice(2, 3))}
    return Small(forward, e=nn.Embedding(11, 6), b=weight(1, 1, 1), v=weight(6, 6), o=nn.Linear(6, 6), **parts)


@case()
def group_norm_of_what_is_equal_but_for_rounding() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = torch.sigmoid(s.a(s.e(x))).transpose(1, 2)[:, :1]
        return s.n(h - h.mean((1, 2), keepdim=True) + torch.cat([h * 0.1 + h * 0.2 - h * 0.3] * 3, 1)) * 1e3

    return Small(forward, e=nn.Embedding(11, 6), a=nn.Linear(6, 4), n=nn.GroupNorm(1, 3))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_everything_holds(name: str) -> None:
    make, shape = CASES[name]
    torch.manual_seed(0)
    model = make().double().eval()
    if shape is None:
        inputs = [{"x": torch.randint(0, 11, sizes)} for sizes in SIZES]
    else:
        inputs = [{"x": torch.randn(batch, *shape, dtype=torch.float64)} for batch, _ in SIZES]
    for seed in (1, 4):  # coupled gates, and gates of rows and of columns
        hold(model, inputs, seed)
