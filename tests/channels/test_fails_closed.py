"""Channels that an analysis does not account for stay: what folding leaves computes what the model computed.

Every case is a small module of a kind that was once folded wrongly, and how much of it goes (nothing, where the kind is
one that cannot be followed). Compared in fp64, at the captured batch and at one row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lorafx
from lorafx.channels import plan as removal_plan
from lorafx.channels import table as axis_table
from lorafx.public import Program

#: Sums over fewer terms, in fp64, through a handful of layers.
CLOSE = 1e-12


class Model(nn.Module):
    """A function of the input ``x`` over named parts."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: Any):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def linear(ins: int, outs: int, zero: Any = None, unread: Any = None, **options: Any) -> nn.Linear:
    """A linear whose rows ``zero`` are 0 (their bias stays) and whose columns ``unread`` are 0."""
    result = nn.Linear(ins, outs, **options)
    with torch.no_grad():
        if zero is not None:
            result.weight[zero] = 0.0
        if unread is not None:
            result.weight[:, unread] = 0.0
    return result


def heads(x: Tensor, count: int = 2) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def folded(model: nn.Module, x: Tensor, caplog: pytest.LogCaptureFixture) -> Program:
    """The fold of a model, held to what the model computes; no rule may have been caught out."""
    model = model.double().eval()
    with torch.no_grad():
        wants = [model(x=rows) for rows in (x, x[:1])]
    with caplog.at_level(logging.WARNING):
        result = lorafx.fold(lorafx.capture(model, inputs={"x": x}))
    assert not [record.message for record in caplog.records if "stay" in record.message]
    module = result.module().eval()
    for rows, want in zip((x, x[:1]), wants, strict=True):
        with torch.no_grad():
            got = module(x=rows)
        assert got.shape == want.shape
        assert float((got - want).abs().max()) <= CLOSE * float(want.abs().max())
    return result


def numbers(program: Program) -> int:
    return sum(value.numel() for value in {id(v): v for v in program.root.parameters()}.values())


def tokens() -> Tensor:
    return torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ---- axes that a rule once dropped: their channels counted as unneeded

DROPPED: dict[str, Callable[[], nn.Module]] = {
    "a 2-d kernel over features": lambda: Model(
        lambda s, x: s.o(functional.relu(s.c(s.a(x)[:, None])).mean((2, 3))),
        a=linear(8, 12),
        c=nn.Conv2d(1, 4, 3),
        o=linear(4, 4),
    ),
    "a 1-d kernel over features": lambda: Model(
        lambda s, x: s.c(s.a(x)).mean(-1), a=linear(8, 12), c=nn.Conv1d(5, 4, 3, padding=1)
    ),
    "a transposed kernel over features": lambda: Model(
        lambda s, x: s.c(s.a(x)).mean(-1), a=linear(8, 12), c=nn.ConvTranspose1d(5, 4, 3)
    ),
    "pooled features": lambda: Model(lambda s, x: functional.max_pool1d(s.a(x), 2), a=linear(8, 12)),
    "adaptively pooled features": lambda: Model(
        lambda s, x: functional.adaptive_avg_pool1d(s.a(x), 3), a=linear(8, 12)
    ),
    "pooled tokens and features": lambda: Model(
        lambda s, x: functional.avg_pool2d(s.a(x)[:, None], 2)[:, 0], a=linear(8, 12)
    ),
    "a batch norm over tokens": lambda: Model(lambda s, x: s.n(s.a(x)).mean(1), a=linear(8, 12), n=nn.BatchNorm1d(5)),
    "a group norm over tokens": lambda: Model(lambda s, x: s.n(s.a(x)), a=linear(8, 12), n=nn.GroupNorm(1, 5)),
    "learned queries": lambda: Model(
        lambda s, x: joined(
            functional.scaled_dot_product_attention(
                heads(s.q(s.t.expand(x.shape[0], -1, -1))), heads(s.k(x)), heads(s.v(x))
            )
        ).mean(1),
        q=linear(8, 8),
        k=linear(8, 8),
        v=linear(8, 8),
        t=nn.Parameter(torch.randn(1, 4, 8)),
    ),
    "a learned memory": lambda: Model(
        lambda s, x: joined(
            functional.scaled_dot_product_attention(
                heads(s.q(x)), heads(s.k(s.t.expand(x.shape[0], -1, -1))), heads(s.v(s.t.expand(x.shape[0], -1, -1)))
            )
        ),
        q=linear(8, 8),
        k=linear(8, 8),
        v=linear(8, 8),
        t=nn.Parameter(torch.randn(1, 4, 8)),
    ),
    "one value channel a head": lambda: Model(
        lambda s, x: s.o(joined(functional.scaled_dot_product_attention(heads(s.q(x)), heads(s.k(x)), heads(s.v(x))))),
        q=linear(8, 8),
        k=linear(8, 8),
        v=linear(8, 2),
        o=linear(2, 4),
    ),
    "a part without channels": lambda: Model(lambda s, x: torch.cat([x, s.a(x)], 1).mean(1), a=linear(8, 8)),
    "a stack with a part without channels": lambda: Model(
        lambda s, x: torch.stack([x, s.a(x)], 1).mean(1), a=linear(8, 8)
    ),
    "features gathered": lambda: Model(
        lambda s, x: s.a(x).gather(-1, torch.zeros(x.shape[0], 5, 2, dtype=torch.long)), a=linear(8, 12)
    ),
    "features turned round": lambda: Model(lambda s, x: torch.roll(s.a(x), 1, -1), a=linear(8, 12)),
    "resized features": lambda: Model(lambda s, x: functional.interpolate(s.a(x), 6), a=linear(8, 12)),
    "features summed up": lambda: Model(lambda s, x: s.a(x).cumsum(-1)[..., -1:], a=linear(8, 12)),
    "an einsum over features": lambda: Model(
        lambda s, x: torch.einsum("blc,bmc->blm", s.a(x), s.b(x)), a=linear(8, 6), b=linear(8, 6)
    ),
    "one of several gates": lambda: Model(
        lambda s, x: s.g(x).softmax(-1)[..., :1] * s.a(x), g=linear(8, 3), a=linear(8, 8)
    ),
    "scores with a table of positions": lambda: Model(
        lambda s, x: (torch.bmm(s.q(x), s.k(x).transpose(1, 2)) + s.t).softmax(-1) @ s.v(x),
        q=linear(8, 8),
        k=linear(8, 8),
        v=linear(8, 6),
        t=nn.Parameter(torch.randn(5, 5)),
    ),
    "attention without heads": lambda: Model(
        lambda s, x: functional.scaled_dot_product_attention(s.q(x), s.k(x), s.v(x)),
        q=linear(8, 8),
        k=linear(8, 8),
        v=linear(8, 8),
    ),
    "a table of a kernel's width": lambda: Model(
        lambda s, x: s.c(s.a(x)[:, None])[..., 0].amax(-1), a=linear(8, 16), c=nn.Conv2d(1, 8, (3, 16))
    ),
}


@pytest.mark.parametrize("kind", list(DROPPED))
def test_nothing_of_a_model_without_zeros_goes(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = DROPPED[kind]()
    assert numbers(folded(model, tokens(), caplog)) == sum(value.numel() for value in model.parameters())


# ---- values that a result repeats, or takes together, for other channels: needed wherever that result is


def normed(h: Tensor) -> Tensor:
    """An RMS norm written out."""
    return h * (h.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt()


def attended(parts: Iterable[Tensor], scale: Tensor) -> Tensor:
    """Attention with query and key normed within their heads."""
    q, k, v = map(heads, parts)
    q, k = (functional.rms_norm(part, scale.shape, scale) for part in (q, k))
    return functional.scaled_dot_product_attention(q, k, v)


REPEATED: dict[str, Callable[[], nn.Module]] = {
    "a computed factor for all heads": lambda: Model(
        lambda s, x: s.o((s.a(x).unflatten(-1, (3, 4)) * s.g(torch.tanh(s.h(x)))[..., None, :]).flatten(2)),
        a=linear(8, 12),
        h=linear(8, 9),
        g=linear(9, 4),
        o=linear(12, 5, unread=[0, 1, 2, 3]),
    ),
    "a computed factor a head": lambda: Model(
        lambda s, x: s.o((s.a(x).unflatten(-1, (3, 4)) * s.g(torch.tanh(s.h(x)))[..., None]).flatten(2)),
        a=linear(8, 12),
        h=linear(8, 9),
        g=linear(9, 3),
        o=linear(12, 5, unread=[0, 1, 2, 3]),
    ),
    "a norm within heads whose scale has a zero": lambda: Model(
        lambda s, x: s.o(joined(attended(s.qkv(torch.tanh(s.h(x))).chunk(3, -1), s.w))),
        h=linear(8, 10),
        qkv=linear(10, 24),
        w=nn.Parameter(torch.tensor([1.0, 0.0, 2.0, 0.5])),
        o=linear(8, 4),
    ),
    "a norm by hand within heads whose scale has a zero": lambda: Model(
        lambda s, x: s.o((normed(s.a(torch.tanh(s.h(x))).unflatten(-1, (3, 4))) * s.w).flatten(2)),
        h=linear(8, 9),
        a=linear(9, 12),
        w=nn.Parameter(torch.tensor([1.0, 0.0, 2.0, 0.5])),
        o=linear(12, 4),
    ),
    "heads folded into the batch": lambda: Model(
        lambda s, x: s.o(heads(s.a(torch.tanh(s.h(x))), 3).flatten(0, 1)).unflatten(0, (-1, 3)).sum(1),
        h=linear(8, 9),
        a=linear(9, 12),
        o=linear(4, 5, unread=[1]),
    ),
    "one linear over every head, with constants in them": lambda: Model(
        lambda s, x: s.o(torch.relu(s.a(x).unflatten(-1, (3, 4)))).flatten(2),
        a=linear(8, 12, zero=[1, 5, 9]),
        o=linear(4, 3),
    ),
    "a mean of heads": lambda: Model(
        lambda s, x: s.o(s.a(torch.tanh(s.h(x))).unflatten(-1, (3, 4)).mean(-1)),
        h=linear(8, 9),
        a=linear(9, 12),
        o=linear(3, 5, unread=[1]),
    ),
}


@pytest.mark.parametrize("kind", list(REPEATED))
def test_what_a_result_repeats_is_needed(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    folded(REPEATED[kind](), tokens(), caplog)


def test_a_head_goes_whose_factor_is_computed(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    result = folded(REPEATED["a computed factor a head"](), tokens(), caplog)
    assert result.tensor("a.weight").shape == (8, 8)
    assert result.tensor("g.weight").shape == (2, 9)


@pytest.mark.parametrize("shape", [(2, 5, 5), (1, 2, 5, 5), (5, 5)])
def test_heads_that_a_mask_tells_apart_stay(shape: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Model(
        lambda s, x: s.o(
            joined(functional.scaled_dot_product_attention(heads(s.q(x)), heads(s.k(x)), heads(s.v(x)), attn_mask=s.m))
        ),
        q=linear(8, 8),
        k=linear(8, 8),
        v=linear(8, 8),
        o=linear(8, 3, unread=[4, 5, 6, 7]),
        m=nn.Parameter(torch.randn(shape)),
    )
    result = folded(model, tokens(), caplog)
    # With one mask for all heads the second goes; else it keeps a channel of its value, as many as the first.
    assert result.tensor("q.weight").shape == ((4 if shape == (5, 5) else 8), 8)


# ---- literals and geometry


class Shrinks(nn.Module):
    """An MLP with dead units, whose channels then go through ``function`` to a linear that leaves some unread."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int, unread: list[int]):
        super().__init__()
        self.a, self.function = linear(8, 12), function
        self.o = linear(width, 4, unread=unread)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.function(torch.tanh(self.a(x)))))


def rotated(h: Tensor) -> Tensor:
    """Pairs of neighbours turned by a quarter."""
    return h + torch.stack([-h[..., 1::2], h[..., ::2]], -1).flatten(-2)


#: What is done to twelve channels, how many come out, which of these nobody reads, and how many of the twelve are left.
GEOMETRY: dict[str, tuple[Callable[[Tensor], Tensor], int, list[int], int]] = {
    "every other channel": (lambda h: h[..., ::2], 6, [1, 3], 8),
    "every other channel, from the second": (lambda h: h[..., 1::2], 6, [0], 10),
    "every other channel of a part": (lambda h: h[..., 1:8:2], 4, [0], 12),
    "every fifth channel": (lambda h: h[..., ::5], 3, [0], 12),
    "neighbours turned": (rotated, 12, [4, 5], 10),
    "one of two neighbours turned is read": (rotated, 12, [4], 12),
    "halves turned": (lambda h: h + torch.cat([-h[..., 6:], h[..., :6]], -1), 12, [4, 10], 10),
    "turned round": (lambda h: h.flip(-1), 12, [0, 1], 10),
    "rolled": (lambda h: h.roll(1, -1), 12, [0, 1], 12),
    "each twice in a row": (lambda h: h.repeat_interleave(2, -1), 24, [0, 1, 3], 11),
    "twice": (lambda h: h.repeat(1, 1, 2), 24, [0, 12, 5], 11),
    "padded with zeros": (lambda h: functional.pad(h, (1, 1)), 14, [1], 12),
    "tokens padded": (lambda h: functional.pad(h, (0, 0, 1, 0)), 12, [0, 1], 10),
    "one channel expanded": (lambda h: h[..., :1].expand(-1, -1, 12), 12, [3], 1),
    "as a square and back": (lambda h: h.unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2), 12, [0, 3, 6, 9], 8),
    "through other sizes": (lambda h: h.reshape(h.shape[0] * 5, 12).view(-1, 5, 12), 12, [2], 11),
    "stacked and unbound": (lambda h: sum(torch.stack([h, h * 2], 2).unbind(2)), 12, [7], 11),  # type: ignore[arg-type, return-value]
}


@pytest.mark.parametrize("kind", list(GEOMETRY))
def test_literals_fit_what_stays(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    function, width, unread, left = GEOMETRY[kind]
    result = folded(Shrinks(function, width, unread), tokens(), caplog)
    assert result.tensor("a.weight").shape == (left, 8)


def test_a_slice_elsewhere_is_left_alone_when_something_goes(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Model(
        lambda s, x: s.a(x + s.down(torch.relu(s.up(x))))[..., ::2],
        up=linear(8, 16, zero=slice(0, 4)),
        down=linear(16, 8),
        a=linear(8, 12),
    )
    assert folded(model, tokens(), caplog).tensor("up.weight").shape == (12, 8)


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolutions_keep_their_channels(groups: int, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    first = nn.Conv1d(8, 8, 1)
    with torch.no_grad():
        first.weight[:2] = 0.0
    model = Model(lambda s, x: s.b(functional.relu(s.a(x))), a=first, b=nn.Conv1d(8, 8, 3, groups=groups))
    assert folded(model, tokens().transpose(1, 2), caplog).tensor("b.weight").shape == (8, 8 // groups, 3)


# ---- operators read wrongly


def weights(ins: int = 8, outs: int = 12) -> nn.Parameter:
    """A matrix stored (in, out) whose first columns, so outputs, are 0."""
    value = torch.randn(ins, outs)
    value[:, :4] = 0.0
    return nn.Parameter(value)


BIASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "scaled": (lambda s, x: torch.addmm(s.b, x, s.w, beta=0.5, alpha=2.0), (12,)),
    "scaled by alpha alone": (lambda s, x: torch.addmm(s.b, x, s.w, alpha=-1.0), (12,)),
    "as a row": (lambda s, x: torch.addmm(s.b, x, s.w), (1, 12)),
    "one number": (lambda s, x: torch.addmm(s.b, x, s.w), (1,)),
    "an activation": (lambda s, x: torch.addmm(torch.cat([x, x[:, :4]], -1), x, s.w) + s.b, (12,)),
    "of batches": (
        lambda s, x: torch.baddbmm(s.b, x[:, None], s.w.expand(x.shape[0], -1, -1), beta=0.5)[:, 0],
        (1, 1, 12),
    ),
}


@pytest.mark.parametrize("kind", list(BIASES))
def test_biases_of_every_form(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    function, shape = BIASES[kind]
    model = Model(
        lambda s, x: s.o(torch.tanh(function(s, x))), b=nn.Parameter(torch.randn(shape)), w=weights(), o=linear(12, 3)
    )
    folded(model, tokens()[:, 0], caplog)


def written(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    h[..., :3] = 7.0
    return s.o(torch.relu(s.b(h)))


def filled(s: Any, x: Tensor) -> Tensor:
    template = torch.zeros(8, dtype=x.dtype)
    template[2:5] = 3.0
    return s.o(torch.relu(s.a(x * template)))


def added(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    h.view(h.shape[0], -1)[:, :2].add_(1.0)
    return s.o(h)


def later(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    view = h.transpose(1, 2)
    h += 1.0
    return s.o(torch.relu(view.transpose(1, 2)))


@pytest.mark.parametrize("function", [written, filled, added, later])
def test_what_is_changed_in_place_is_not_taken_for_what_it_was(
    function: Callable[[Any, Tensor], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    b = linear(12, 6)
    with torch.no_grad():
        b.weight[:2, 4:] = 0.0
    o = linear(6 if function is written else 12, 4)
    folded(Model(function, a=linear(8, 12, zero=slice(0, 4)), b=b, o=o), tokens(), caplog)


def test_a_number_rounded_to_an_integer_is_no_constant_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    up = linear(8, 12, zero=[0, 1])
    with torch.no_grad():
        up.bias[:2] = 0.6
    model = Model(lambda s, x: s.o(s.a(x).to(torch.int64).to(x.dtype)), a=up, o=linear(12, 3))
    folded(model, tokens(), caplog)


# ---- the runner


def test_a_rule_that_says_nothing_of_an_axis_pins_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Model(lambda s, x: s.o(torch.tanh(s.a(x))), a=linear(8, 12), o=linear(12, 3, unread=[0])).double().eval()
    monkeypatch.setitem(axis_table.RULES, torch.ops.aten.tanh.default, lambda axes, node: [])
    program = lorafx.fold(lorafx.capture(model, inputs={"x": tokens()}))
    assert program.tensor("a.weight").shape == (12, 8)
    reasons = removal_plan.Axes(program, axis_table.RULES).pins.values()
    assert any("aten.tanh" in why and "does not say" in why for why in reasons)


def test_a_rule_that_raises_pins_what_the_operator_touches(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(axes: Any, node: Any) -> Any:
        raise IndexError("a rule of mine")

    torch.manual_seed(0)
    model = Model(lambda s, x: s.o(torch.tanh(s.a(x))), a=linear(8, 12), o=linear(12, 3, unread=[0])).double().eval()
    monkeypatch.setitem(axis_table.RULES, torch.ops.aten.tanh.default, broken)
    with caplog.at_level(logging.WARNING):
        program = lorafx.fold(lorafx.capture(model, inputs={"x": tokens()}))
    assert program.tensor("a.weight").shape == (12, 8)
    assert "aten.tanh" in caplog.text
    assert "a rule of mine" in caplog.text


def test_a_rule_that_is_wrong_is_found_out_and_the_rest_still_goes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = (
        Model(
            lambda s, x: s.p(torch.relu(s.o(s.a(x).cumsum(-1)))),
            a=linear(8, 12, zero=[0, 1]),
            o=linear(12, 6, unread=[2]),
            p=linear(6, 3, unread=[4, 5]),
        )
        .double()
        .eval()
    )
    want = model(x=tokens())
    # As if sums up to a channel were sums of that channel alone.
    monkeypatch.setitem(axis_table.RULES, torch.ops.aten.cumsum.default, axis_table.shaped_like)
    with caplog.at_level(logging.WARNING):
        program = lorafx.fold(lorafx.capture(model, inputs={"x": tokens()}))
    assert torch.allclose(program.module().eval()(x=tokens()), want, rtol=CLOSE)
    assert program.tensor("a.weight").shape == (12, 8)
    assert program.tensor("o.weight").shape == (4, 12)
    assert "does not do what its rule says" in caplog.text
    (step,) = (step for step in program.report.passes if step.missed)
    assert step.name == "dead-channels"
    (reason,) = step.missed
    assert reason.startswith("its rule did not hold on the example inputs: its channels stay")
    assert step.missed[reason] == ("cumsum",)
    assert "not taken: its rule did not hold" in program.report.text()


# ---- heads that keep different channels, and what puts the channels in front

IN_ORDER, TURNED, SHUFFLED, GROUPS = (0, 1, 2), (0, 2, 1), (0, 3, 1, 2), (0, 2, 1, 3)
#: Sizes of a layer's features, the order they are put in, which of them are dead, and how many then stay.
ORDERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], list[int], int]] = {
    "another channel of each head, in order": ((3, 3), IN_ORDER, [0, 4, 8], 6),
    "another channel of each head, channels in front": ((3, 3), TURNED, [0, 4, 8], 9),
    "the same channel of every head, channels in front": ((3, 3), TURNED, [0, 3, 6], 6),
    "a head, channels in front": ((3, 3), TURNED, [3, 4, 5], 6),
    "a head, and the same channel of the others": ((3, 3), TURNED, [0, 3, 4, 5, 6], 4),
    "a channel of each head of each group, channels in front": ((2, 2, 3), SHUFFLED, [0, 3, 6, 9], 12),
    "a channel of each head of each group, heads in front of groups": ((2, 2, 3), GROUPS, [0, 4, 8, 9], 8),
    "another head of each group, heads in front of groups": ((2, 2, 3), GROUPS, [0, 1, 2, 9, 10, 11], 12),
}


@pytest.mark.parametrize("name", ORDERS)
def test_channels_that_change_places_with_heads(name: str, caplog: pytest.LogCaptureFixture) -> None:
    sizes, order, dead, left = ORDERS[name]
    torch.manual_seed(0)
    width = torch.Size(sizes).numel()
    model = Model(
        lambda s, x: s.o(torch.relu(s.a(x)).view(x.shape[0], *sizes).permute(order).flatten(1)),
        a=linear(8, width, zero=dead, bias=False),
        o=linear(width, 4),
    )
    program = folded(model, tokens()[:, 0], caplog)
    assert program.tensor("a.weight").shape == (left, 8)
    assert program.tensor("o.weight").shape == (4, left)


def test_channels_in_groups_are_shuffled_together(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Model(
        lambda s, x: s.o(functional.channel_shuffle(torch.relu(s.a(x))[:, :, None], 3)[:, :, 0]),
        a=linear(8, 12, zero=[0, 5, 10], bias=False),
        o=linear(12, 4),
    )
    folded(model, tokens()[:, 0], caplog)


def test_a_view_need_not_stay_one_when_heads_become_one_channel_wide(caplog: pytest.LogCaptureFixture) -> None:
    # What flattens a copy of narrow heads may lie in memory as the heads do, and as no view of the next shape can.
    torch.manual_seed(0)

    def forward(s: Any, x: Tensor) -> Tensor:
        repeated = heads(s.a(x))[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)
        return s.o(joined(repeated).view(x.shape[0], -1).view(x.shape[0], 5, 16))

    model = Model(forward, a=linear(8, 8, zero=[1, 2, 3, 5, 6, 7], bias=False), o=linear(16, 3))
    program = folded(model, tokens(), caplog)
    assert program.tensor("a.weight").shape == (2, 8)
    assert program.tensor("o.weight").shape == (3, 4)
