"""Dead channels: what is removed leaves the function alone, whatever closed it, wherever it lies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx.channels.axes import Axes
from lorafx.channels.table import RULES
from lorafx.errors import RecipeError
from lorafx.graph.precision import recast
from lorafx.graph.tree import named_tensors, put_tensor
from lorafx.passes.dead_channels import DeadChannels
from lorafx.pipeline import run, to_eval
from lorafx.public import Program
from tests import zoo
from tests.captures import shared

#: Random closed sets for each family; a release takes 25.
SEEDS = int(os.environ.get("LORAFX_SEEDS", "6"))


@shared
def evaluating(model: str) -> Program:
    """A family's random model in fp64, ready for evaluation."""
    return recast(to_eval(zoo.captured(model)), torch.float64)


def free_channels(axes: Axes) -> np.ndarray[Any, Any]:
    """For each label, whether its channel is not pinned."""
    pinned = np.zeros(axes.count, bool)
    pinned[axes.channel[np.fromiter(axes.pins, int)]] = True
    return ~pinned[axes.channel]


def closed(program: Program, seed: int) -> tuple[Program, int]:
    """A copy with random channels closed, some as whole rows (heads): all that holds them, or only what reads them, or
    only what makes them while biases stay."""
    rng = np.random.default_rng(seed)
    result, axes = program.copy(), Axes(program, RULES)
    free = free_channels(axes)
    channels = np.unique(axes.channel[free])
    chosen = np.isin(axes.channel, rng.choice(channels, max(1, int(len(channels) * rng.uniform(0.1, 0.5))), False))
    rows = np.unique(axes.head_row[free])
    if (rows >= 0).any():
        chosen |= np.isin(axes.head_row, rng.choice(rows[rows >= 0], max(1, (rows >= 0).sum() // 3), False))
    chosen &= free
    how = ("everywhere", "where read", "where made")[rng.integers(3)]
    done: dict[int, Tensor] = {}
    tensors = list(named_tensors(result.root))
    for name, value in tensors:
        if name in axes.members and value.is_floating_point() and id(value) not in done:
            done[id(value)] = zeroed(name, value, axes, chosen, how)
    for name, value in tensors:
        if id(value) in done:  # a tied weight under its other name too
            put_tensor(result.root, name, done[id(value)])
    return result, int(chosen.sum())


def zeroed(name: str, value: Tensor, axes: Axes, chosen: np.ndarray[Any, Any], how: str) -> Tensor:
    made = 1 if ".c_" in name and value.dim() == 2 else 0  # GPT-2 stores its weights (in, out)
    result = value.detach().clone()
    for dim, labels in enumerate(axes.members[name]):
        skipped = {"everywhere": False, "where read": dim == made, "where made": dim != made or value.dim() == 1}[how]
        if not skipped:
            result.index_fill_(dim, torch.tensor(chosen[labels]).nonzero().flatten(), 0.0)
    return nn.Parameter(result, requires_grad=False) if isinstance(value, nn.Parameter) else result


def size(program: Program) -> int:
    return sum(value.numel() for value in {id(v): v for v in program.root.parameters()}.values())


@pytest.mark.parametrize("model", list(zoo.ZOO))
def test_sliced_equals_masked(model: str) -> None:
    for seed in range(SEEDS):
        masked, channels = closed(evaluating(model), seed)
        assert channels > 0
        sliced = run(masked, [DeadChannels()])
        # The same sums over fewer terms: rounding of fp64.
        assert lorafx.verify(masked, sliced, dtype=torch.float64).max_rel < 1e-12
        assert all(value.numel() for _, value in named_tensors(sliced.root))
        assert size(sliced) < size(masked)


@pytest.mark.slow
@pytest.mark.parametrize("model", list(zoo.ZOO))
@pytest.mark.filterwarnings("default")  # the converter's own
def test_onnx_equals_sliced(model: str, tmp_path: Path) -> None:
    from transformers.exporters.base import ExportedModel

    masked, _ = closed(evaluating(model), 1)
    sliced = lorafx.fold(recast(masked, torch.float32))
    assert size(sliced) < size(masked)
    lorafx.export(sliced, tmp_path / "onnx", format="onnx", provider="cpu")
    exported = ExportedModel.from_pretrained(tmp_path / "onnx")
    inputs = zoo.ZOO[model].inputs(2, 7)
    # fp32 rounding through other kernels, relative to the outputs' scale.
    assert zoo.distance(zoo.run(sliced, inputs), zoo.tensors(exported(**inputs))) < 1e-5


@pytest.mark.parametrize("widths", [{"round_to": 4}, {"keep_at_least": 3}, {"uniform": True}])
@pytest.mark.parametrize("model", ["bert", "llama", "gpt2"])
def test_wanted_widths_are_kept(model: str, widths: dict[str, Any]) -> None:
    for seed in range(3):
        masked, _ = closed(evaluating(model), seed)
        sliced = run(masked, [DeadChannels(**widths)])
        assert lorafx.verify(masked, sliced, dtype=torch.float64).max_rel < 1e-12
        for name, before in masked.root.named_parameters():
            after = sliced.tensor(name)
            for old, new in zip(before.shape, after.shape, strict=True):
                assert new % widths.get("round_to", 1) == 0 or new == old
                assert new >= min(old, widths.get("keep_at_least", 1))
            if widths.get("uniform") and ".0." in name:
                assert after.shape == sliced.tensor(name.replace(".0.", ".1.")).shape


def test_widths_that_are_no_width_are_refused() -> None:
    with pytest.raises(RecipeError, match="at least 1"):
        run(evaluating("bert"), [DeadChannels(round_to=0)])


def test_a_training_graph_is_left_alone() -> None:
    masked, _ = closed(recast(zoo.captured("bert"), torch.float64), 0)
    assert DeadChannels().sites(masked).taken == ()


def test_a_program_without_dead_channels_is_left_alone() -> None:
    assert DeadChannels().sites(evaluating("bert")).taken == ()


# ---- by hand


def captured(model: nn.Module, *inputs: Tensor) -> Program:
    names = ["x", "y"][: len(inputs)]
    program = lorafx.capture(model.double().eval(), inputs=dict(zip(names, inputs, strict=True)))
    return to_eval(program)


def removed(program: Program) -> Program:
    sliced = run(program, [DeadChannels()])
    assert lorafx.verify(program, sliced, dtype=torch.float64).max_rel < 1e-12
    return sliced


class Holder(nn.Module):
    """A model around layers, with the input called ``x``."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Mlp(nn.Module):
    """Two linears around an activation."""

    def __init__(self, activation: nn.Module, bias: bool = True):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.GELU(), nn.ReLU()])
def test_what_a_constant_unit_gave_is_in_the_next_bias(activation: nn.Module, bias: bool) -> None:
    torch.manual_seed(0)
    model = Mlp(activation, bias)
    with torch.no_grad():
        model.up.weight[[1, 4, 5]] = 0.0  # constant units, of values f(b) that differ from 0
    sliced = removed(captured(model, torch.randn(3, 6).double()))
    assert sliced.tensor("up.weight").shape == (5, 6)
    assert sliced.tensor("down.weight").shape == (5, 5)


class Convolutions(nn.Module):
    """A residual block with batch norms, pooled into a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.inner_norm = nn.Conv2d(6, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.outer, self.head = nn.Conv2d(10, 6, 1), nn.Linear(6, 4)
        for norm in (self.norm, self.inner_norm):
            nn.init.uniform_(norm.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = x + self.outer(torch.relu(self.inner_norm(self.inner(x))))
        return self.head(x.mean((2, 3)))


def test_convolution_channels_go_with_their_batch_norm() -> None:
    torch.manual_seed(0)
    model = Convolutions()
    with torch.no_grad():
        model.outer.weight[:, [0, 3]] = 0.0
        model.inner_norm.weight[5] = model.inner_norm.bias[5] = 0.0
    sliced = removed(captured(model, torch.randn(2, 3, 8, 8).double()))
    assert sliced.tensor("inner.weight").shape == (7, 6, 3, 3)
    assert sliced.tensor("inner_norm.running_var").shape == (7,)
    assert sliced.tensor("first.weight").shape == (6, 3, 3, 3), "the residual stream keeps its width"


class SharedTwice(nn.Module):
    """One weight used twice: a channel goes only if both uses can spare it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.one(torch.tanh(self.shared(x))) + self.two(torch.relu(self.shared(y)))


def test_a_shared_weight_loses_what_both_uses_can_spare() -> None:
    torch.manual_seed(0)
    model = SharedTwice()
    with torch.no_grad():
        model.one.weight[:, [0, 1]] = 0.0
        model.two.weight[:, [1, 2]] = 0.0
    sliced = removed(captured(model, torch.randn(2, 4).double(), torch.randn(2, 4).double()))
    assert sliced.tensor("shared.weight").shape == (5, 4)


class Moved(nn.Module):
    """Channels that are concatenated, sliced, split and put together again on their way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([torch.relu(self.a(x)), torch.tanh(self.b(x))], -1)
        low, high = both[..., :5], both[..., 5:]
        first, second = high.split([3, 4], -1)
        return self.out(torch.cat([second, low, first], -1))


def test_channels_are_followed_through_cat_slice_and_split() -> None:
    torch.manual_seed(0)
    model = Moved()
    with torch.no_grad():
        model.a.weight[[0, 5]] = model.b.weight[2] = 0.0
        model.a.bias[[0, 5]] = model.b.bias[2] = 0.0
        model.out.weight[:, 1] = 0.0  # the second of `second`: channel 9 of both, b's channel 3
    sliced = removed(captured(model, torch.randn(2, 4).double()))
    assert sliced.tensor("a.weight").shape == (4, 4)
    assert sliced.tensor("b.weight").shape == (4, 4)
    assert sliced.tensor("out.weight").shape == (3, 8)


class PerHead(nn.Module):
    """Heads of four channels, each times a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(6, 12), nn.Linear(12, 5)
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0, 3.0])[:, None])

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(x).unflatten(-1, (3, 4)) * self.scale
        return self.out(torch.tanh(heads.flatten(-2)))


@pytest.mark.parametrize(
    ("unread", "heads", "channels"), [([4, 5, 6, 7], 2, 4), ([1, 4, 10], 3, 3), ([3, 4, 5, 6, 7, 8], 2, 3)]
)
def test_a_number_for_each_head_stays_with_its_head(unread: list[int], heads: int, channels: int) -> None:
    torch.manual_seed(0)
    model = PerHead()
    with torch.no_grad():
        model.out.weight[:, unread] = 0.0
    sliced = removed(captured(model, torch.randn(2, 6).double()))
    assert sliced.tensor("up.weight").shape == (heads * channels, 6)
    assert sliced.tensor("scale").shape == (heads, 1)


def test_a_number_that_is_needed_elsewhere_keeps_its_head() -> None:
    class Read(PerHead):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.sort(self.scale[:, 0]).values.sum()

    torch.manual_seed(0)
    model = Read()
    with torch.no_grad():
        model.out.weight[:, :5] = 0.0
        model.out.weight[:, 8] = 0.0
    sliced = removed(captured(model, torch.randn(2, 6).double()))
    assert sliced.tensor("up.weight").shape == (9, 6)
    assert sliced.tensor("scale").shape == (3, 1)


class Unknown(nn.Module):
    """An operator nobody wrote a rule for between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last, self.out = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        sorted_values = torch.sort(self.up(x), dim=-1).values
        return self.out(torch.relu(self.last(self.down(sorted_values))))


def test_nothing_beyond_an_unknown_operator_is_touched() -> None:
    torch.manual_seed(0)
    model = Unknown()
    with torch.no_grad():
        model.up.weight[0] = model.up.bias[0] = 0.0
        model.down.weight[:, 0] = 0.0
        model.out.weight[:, [1, 2]] = 0.0
    program = captured(model, torch.randn(2, 6).double())
    sliced = removed(program)
    assert sliced.tensor("up.weight").shape == (6, 6)
    assert sliced.tensor("last.weight").shape == (4, 6)
    assert any("aten.sort" in why for why in Axes(program, RULES).pins.values()), "what pinned it is named"


def test_a_norm_over_an_input_keeps_its_channels() -> None:
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3))
    with torch.no_grad():
        model[1].weight[:, :4] = 0.0  # type: ignore[index, operator]
    sliced = removed(captured(Holder(model), torch.randn(2, 5, 6).double()))
    assert sliced.tensor("inner.0.weight").shape == (6,)


def test_every_unit_dead_leaves_one() -> None:
    model = Mlp(nn.ReLU())
    with torch.no_grad():
        model.up.weight.zero_()
        model.up.bias.fill_(-1.0)
    sliced = removed(captured(model, torch.randn(3, 6).double()))
    assert sliced.tensor("up.weight").shape == (1, 6)


class Factorised(nn.Module):
    """A table of few columns and a linear that makes more of them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(50, 16), nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.table(x))


def test_columns_of_a_table_go() -> None:
    torch.manual_seed(0)
    model = Factorised()
    with torch.no_grad():
        model.up.weight[:, [1, 5, 15]] = 0.0
        model.table.weight[:, 2] = 0.5  # a constant, which goes into the bias
    sliced = removed(captured(model, torch.randint(0, 50, (2, 5))))
    assert sliced.tensor("table.weight").shape == (50, 12)
    assert sliced.tensor("up.weight").shape == (32, 12)
