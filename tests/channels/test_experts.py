"""Experts: hidden units go that no expert needs, and those that each expert can spare, whichever they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx.channels.groups import axis_groups
from lorafx.graph.precision import recast
from lorafx.graph.tree import put_tensor
from lorafx.passes.dead_channels import DeadChannels
from lorafx.pipeline import run, to_eval
from lorafx.public import Program
from tests import zoo

EXPERTS, HIDDEN, WIDTH = 4, 48, 32
GATE_UP, DOWN = "model.layers.{}.mlp.experts.gate_up_proj", "model.layers.{}.mlp.experts.down_proj"


def closed(layers: dict[int, dict[int, list[int]]], how: str = "everywhere", dtype: Any = torch.float64) -> Program:
    """Mixtral with zeros: for each layer, for each expert, the hidden units closed.

    Args:
        how: ``gate``, ``up`` or ``down`` alone, or everywhere
    """
    bf16 = dtype == torch.bfloat16  # in which transformers takes another operator
    program = to_eval(zoo.captured("mixtral", dtype=dtype)) if bf16 else recast(to_eval(zoo.captured("mixtral")), dtype)
    program = program.copy()
    for layer, experts in layers.items():
        gate_up, down = (program.tensor(name.format(layer)).detach().clone() for name in (GATE_UP, DOWN))
        for expert, units in experts.items():
            if how in ("gate", "everywhere"):
                gate_up[expert, units] = 0.0
            if how in ("up", "everywhere"):
                gate_up[expert, [unit + HIDDEN for unit in units]] = 0.0
            if how in ("down", "everywhere"):
                down[expert, :, units] = 0.0
        for name, value in ((GATE_UP, gate_up), (DOWN, down)):
            put_tensor(program.root, name.format(layer), nn.Parameter(value, requires_grad=False))
    return program


def removed(program: Program) -> Program:
    sliced = run(program, [DeadChannels()])
    # The same sums over fewer terms: rounding of fp64.
    assert lorafx.verify(program, sliced, dtype=torch.float64).max_rel < 1e-12
    return sliced


def widths(program: Program) -> list[int]:
    """The hidden width of each layer's experts; gate and up, and down, agree."""
    found = []
    for layer in range(2):
        gate_up, down = (tuple(program.tensor(name.format(layer)).shape) for name in (GATE_UP, DOWN))
        assert gate_up == (EXPERTS, 2 * down[2], WIDTH)
        assert down[:2] == (EXPERTS, WIDTH)
        found.append(down[2])
    return found


@pytest.mark.parametrize("how", ["everywhere", "gate", "up", "down"])
def test_units_closed_in_all_experts_go(how: str) -> None:
    units = [0, 7, 8, 47]
    before = closed({0: dict.fromkeys(range(EXPERTS), units)}, how)
    sliced = removed(before)
    assert widths(sliced) == [HIDDEN - 4, HIDDEN]
    kept = [unit for unit in range(HIDDEN) if unit not in units]
    assert torch.equal(sliced.tensor(DOWN.format(0)), before.tensor(DOWN.format(0))[:, :, kept]), "the order is kept"


@pytest.mark.parametrize("how", ["everywhere", "gate", "up", "down"])
def test_each_expert_spares_units_of_its_own(how: str) -> None:
    spared = {0: list(range(20)), 1: list(range(30, 48)), 2: list(range(0, 48, 2)), 3: [5, *range(10, 29)]}
    before = closed({0: spared, 1: {0: [1], 1: [2], 2: [3], 3: [4]}}, how)
    sliced = removed(before)
    assert widths(sliced) == [HIDDEN - 18, HIDDEN - 1]  # expert 1 spares the fewest
    kept = [unit for unit in range(HIDDEN) if unit not in spared[1]]
    assert torch.equal(sliced.tensor(DOWN.format(0))[1], before.tensor(DOWN.format(0))[1][:, kept])


def test_zeros_in_different_places_of_one_expert_add_up() -> None:
    program = closed({0: {0: [0]}}, "gate")
    gate_up, down = (program.tensor(name.format(0)) for name in (GATE_UP, DOWN))
    with torch.no_grad():
        gate_up[1, HIDDEN + 9] = 0.0
        down[2, :, 11] = 0.0
        down[3, :, 47] = 0.0
    assert widths(removed(program)) == [HIDDEN - 1, HIDDEN]


def test_an_expert_that_needs_all_units_keeps_the_width() -> None:
    program = closed({0: {0: [0, 1], 1: [2, 3], 2: list(range(HIDDEN))}})
    assert DeadChannels().sites(program).taken == ()


def test_a_dead_expert_is_no_wider_than_the_others() -> None:
    spared = {0: list(range(HIDDEN)), 1: [0, 1, 2], 2: [4, 5, 6, 7], 3: [44, 45, 46, 47]}
    sliced = removed(closed({0: spared}))
    assert widths(sliced) == [HIDDEN - 3, HIDDEN]
    left = [row for row in sliced.history[-1].facts["Zero but kept"] if row["weight"] == GATE_UP.format(0)]
    why = "experts are chosen by number"
    assert left == [{"weight": GATE_UP.format(0), "dimension": 0, "zero": 1, "of": EXPERTS, "why": why}]


def test_experts_dead_altogether_keep_one_unit() -> None:
    assert widths(removed(closed({1: {expert: [*range(HIDDEN)] for expert in range(EXPERTS)}}))) == [HIDDEN, 1]


def test_wanted_widths_are_kept() -> None:
    program = closed({0: {expert: [*range(expert, expert + 11)] for expert in range(EXPERTS)}})
    assert widths(run(program, [DeadChannels(uniform=True)])) == [HIDDEN, HIDDEN]
    sliced = run(program, [DeadChannels(round_to=8)])
    assert widths(sliced) == [40, HIDDEN], "37 are needed"
    assert lorafx.verify(program, sliced, dtype=torch.float64).max_rel < 1e-12


def test_the_kernel_gets_the_widths_it_can_run() -> None:
    program = closed({0: {expert: [*range(expert, expert + 11)] for expert in range(EXPERTS)}}, dtype=torch.bfloat16)
    assert any("aten._grouped_mm" in str(node.target) for node in program.graph.nodes)
    sliced = run(program, [DeadChannels()])
    assert widths(sliced) == [40, HIDDEN], "37 are needed, and rows of weights begin at multiples of 16 bytes"
    # bf16 keeps 8 bits, and sums over fewer terms may be split otherwise.
    assert zoo.distance(zoo.run(program, zoo.text(2, 7)), zoo.run(sliced, zoo.text(2, 7))) < 2**-6


def test_random_sets() -> None:
    rng = np.random.default_rng(0)
    for _ in range(4):
        spared = {
            layer: {
                expert: rng.choice(HIDDEN, rng.integers(1, HIDDEN), replace=False).tolist() for expert in range(EXPERTS)
            }
            for layer in range(2)
        }
        sliced = removed(closed(spared, rng.choice(["everywhere", "gate", "up", "down"])))
        assert widths(sliced) == [HIDDEN - min(map(len, spared[layer].values())) for layer in range(2)]


def test_what_was_removed_is_said() -> None:
    program = closed({0: {0: [0, 1], 1: [2, 3], 2: [4, 5], 3: [6, 7]}})
    facts = run(program, [DeadChannels()]).history[-1].facts
    assert facts == {
        "Removed": [
            {"tensor": GATE_UP.format(0), "before": "[4, 96, 32]", "after": "[4, 92, 32]"},
            {"tensor": DOWN.format(0), "before": "[4, 32, 48]", "after": "[4, 32, 46]"},
        ]
    }


def test_groups_show_the_experts() -> None:
    groups = [str(group) for group in axis_groups(to_eval(zoo.captured("mixtral")))]
    for layer in range(2):
        expected = f"48 of 48 channels removable: {GATE_UP.format(layer)}[1], {DOWN.format(layer)}[2]"
        assert expected in groups


# ---- by hand


class Mixture(nn.Module):
    """Two products with three experts, and something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 6, 8))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.arange(1, 4, dtype=torch.int32) * x.shape[0] // 3
        product = torch.ops.transformers.grouped_mm_fallback
        return product(self.between(product(x, self.up.transpose(1, 2), ends)), self.down.transpose(1, 2), ends)


class Scale(nn.Module):
    """A factor for each channel, the same for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def mixture(between: Callable[[Tensor], Tensor]) -> Program:
    torch.manual_seed(0)
    model = Mixture(between)
    with torch.no_grad():
        for expert in range(3):
            model.down[expert, :, [expert, expert + 3]] = 0.0
    return to_eval(lorafx.capture(model.double().eval(), inputs={"x": torch.randn(9, 6).double()}))


SAME_FOR_ALL_UNITS: dict[str, Callable[[Tensor], Tensor]] = {
    "an activation": torch.relu,
    "parts put together": lambda h: torch.cat([torch.tanh(h), torch.relu(h)], 1).chunk(2, 1)[0] * h,
}
#: An order for each expert would change what these compute.
NOT_THE_SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "halves of their own": lambda h: torch.cat([torch.tanh(h[:, :4]), torch.relu(h[:, 4:])], 1),
    "neighbours": lambda h: torch.cat([h[:, 4:] * h[:, :4], h[:, 4:]], 1),
    "a sum over rows": lambda h: h - h.sum(0),
    "running sums over rows": lambda h: h.cumsum(0),
    "a row for all": lambda h: h * h[:1],
    "rows moved on": lambda h: torch.cat([h[1:], h[:1]]),
    "a factor for all experts": Scale(),
}


@pytest.mark.parametrize("between", SAME_FOR_ALL_UNITS)
def test_units_that_are_treated_alike_are_reordered(between: str) -> None:
    sliced = removed(mixture(SAME_FOR_ALL_UNITS[between]))
    assert tuple(sliced.tensor("up").shape) == (3, 6, 6)
    assert tuple(sliced.tensor("down").shape) == (3, 6, 6)


@pytest.mark.parametrize("between", NOT_THE_SAME)
def test_units_that_are_not_stay(between: str) -> None:
    program = mixture(NOT_THE_SAME[between])
    assert DeadChannels().sites(program).taken == ()


# ---- formats


SPARED = {0: [*range(8)], 1: [*range(3, 11)], 2: [*range(40, 48)], 3: [*range(0, 16, 2)]}


def test_a_checkpoint_of_fewer_units_opens_in_transformers(tmp_path: Path) -> None:
    import transformers

    program = closed({0: SPARED, 1: SPARED}, dtype=torch.float32)
    folded = lorafx.fold(program)
    assert widths(folded) == [40, 40]
    lorafx.export(folded, tmp_path / "folded", format="hf")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    assert plain.config.intermediate_size == 40
    inputs = zoo.text(2, 7)
    # fp32 sums over fewer terms, in another order.
    assert zoo.distance(zoo.run(program, inputs), zoo.eager(plain, inputs)) < 1e-5


@pytest.mark.filterwarnings("default")  # the converter's own
def test_onnx_equals_the_closed_program(tmp_path: Path) -> None:
    from transformers.exporters.base import ExportedModel

    program = closed({0: SPARED, 1: {**SPARED, 3: [0]}}, dtype=torch.float32)
    folded = lorafx.fold(program)
    assert widths(folded) == [40, 47]
    lorafx.export(folded, tmp_path / "onnx", format="onnx", provider="cpu")
    exported = ExportedModel.from_pretrained(tmp_path / "onnx")
    inputs = zoo.text(2, 7)
    # fp32 rounding through other kernels, relative to the outputs' scale.
    assert zoo.distance(zoo.run(program, inputs), zoo.tensors(exported(**inputs))) < 1e-5
