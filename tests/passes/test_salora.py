"""SaLoRA: hard-concrete gates, the budget of ranks and its multiplier, against plain arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafx.base import Pass
from lorafx.methods.gates import HardConcrete
from lorafx.passes.salora import Salora
from lorafx.reporting.report import report_of
from lorafx.training.module import RewrittenModel, build_module
from tests.methods import (
    EVERY,
    RECIPES,
    assert_equal,
    batch,
    fit,
    layer,
    optimiser,
    square,
    state_of,
    stirred,
    training,
)


def test_hard_concrete_gates_close_at_minus_1_599() -> None:
    threshold = HardConcrete.TEMPERATURE * math.log(-HardConcrete.GAMMA / HardConcrete.ZETA)
    assert round(threshold, 3) == -1.599
    gates = HardConcrete.median(torch.tensor([-1.5990, -1.5982, 10.0], dtype=torch.float64))
    assert float(gates[0]) == 0.0
    assert 0.0 < float(gates[1]) < 1e-3
    assert float(gates[2]) == 1.0


def bare(step: Pass, gate: str) -> tuple[RewrittenModel, Tensor]:
    """One linear whose weight is 0 and whose branch is the identity, so that the output is gates times input."""
    model = layer(0.0, step)
    for name in model.program.names("adapter"):
        model.program.load({name: torch.eye(16)})
    return model, state_of(model).sites[0][gate]


WIDE_SALORA = Salora(rank=16, alpha=16.0, trainable=())


def test_the_evaluation_graph_has_the_median_gates() -> None:
    model, log_alpha = bare(WIDE_SALORA, "lora_gate")
    values = torch.linspace(-4.0, 4.0, 16)
    with torch.no_grad():
        log_alpha.copy_(values)
        first, second = model.eval()(x=torch.ones(3, 5, 16)), model.eval()(x=torch.ones(3, 5, 16))
    soft = 1 / (1 + torch.exp(-values.double() / (2 / 3)))
    expected = (soft * 1.2 - 0.1).clamp(0, 1)
    assert ((first == 0) == (expected == 0)).all()
    torch.testing.assert_close(first[0, 0].double(), expected, rtol=0, atol=1e-6)  # fp32 rounding of numbers up to 1
    assert torch.equal(first, second)
    assert torch.equal(first[0, 0], HardConcrete.median(values))


def test_training_draws_one_gate_a_rank_and_forward() -> None:
    model, log_alpha = bare(WIDE_SALORA, "lora_gate")
    with torch.no_grad():
        log_alpha.copy_(torch.tensor([-3.0, 0.0, 1.0, 3.0]).repeat(4))
        torch.manual_seed(0)
        draws = [model.train()(x=torch.ones(3, 5, 16)) for _ in range(1500)]
    assert all(torch.equal(draw, draw[0, 0].expand(3, 5, 16)) for draw in draws), "all tokens share one draw"
    assert not torch.equal(draws[0], draws[1])
    seen = torch.stack([draw[0, 0] for draw in draws])
    open_share = (seen > 0).double().reshape(-1, 4, 4).mean((0, 1))
    # P(g > 0) = σ(log α - τ log(-γ/ζ)); 6,000 draws have a deviation of at most 0.0065, held to five of them.
    expected = HardConcrete.expected_open(torch.tensor([-3.0, 0.0, 1.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(open_share, expected, rtol=0, atol=0.033)
    assert float(expected[1]) == pytest.approx(1 / (1 + math.exp(-1.5986)), abs=1e-5)


#: The Lagrangian as published: the multiplier watches the expected share, against the target from the start.
PUBLISHED: dict[str, Any] = {"steer": "expected", "ramp": 0.0, "multiplier_rate": 0.05, "restart": False}


def salora(**options: Any) -> RewrittenModel:
    return training(Salora(**{"rank": 4, "alpha": 4.0, **PUBLISHED, **options}), total_steps=10)


def test_open_gates_get_a_gradient_from_the_l0_term_alone() -> None:
    model = salora(orthogonality=0.0)
    state = state_of(model)
    gates = [site["lora_gate"] for site in state.sites]
    with torch.no_grad():
        for gate in gates:
            gate.fill_(4.0)
        state.shared["multiplier"].fill_(0.5)
    assert bool((HardConcrete.median(gates[0]) == 1).all()), "fully open"
    square(model.eval()(**batch(4, 5))).backward()
    assert gates[0].grad is None or not gates[0].grad.any(), "the clamp lets no gradient of the task through"
    model.zero_grad()
    penalty = model.train().penalty()
    assert penalty is not None
    penalty.backward()
    chance = torch.sigmoid(torch.tensor(4.0) + 2 / 3 * math.log(11))
    expected = 0.5 * chance * (1 - chance) / (4 * len(gates))
    for gate in gates:
        torch.testing.assert_close(gate.grad, expected.expand(4), rtol=1e-5, atol=0.0)  # fp32: 1 - σ cancels digits


def test_the_lagrangian_is_the_formula() -> None:
    model = salora(density=0.25, orthogonality=0.3)
    stirred(model.program)
    state = state_of(model)
    with torch.no_grad():
        for site in state.sites:
            site["lora_gate"].clamp_(-4.0, 4.0)  # within the bounds that a step keeps
    state.shared["multiplier"].fill_(0.7)
    gates = torch.cat([site["lora_gate"].detach().double() for site in state.sites])
    expected_open = (1 / (1 + (-(gates + 2 / 3 * math.log(11))).exp())).mean()
    terms = []
    for site in state.sites:
        is_open = (HardConcrete.median(site["lora_gate"]) > 0).nonzero().flatten()
        a, b = site["lora_A"].detach().double()[is_open], site["lora_B"].detach().double()[:, is_open]
        eye = torch.eye(len(is_open), dtype=torch.float64)
        terms.append((a @ a.T - eye).square().sum() + (b.T @ b - eye).square().sum())
    expected = 0.3 * torch.stack(terms).mean() + 0.7 * (expected_open - 0.25)
    penalty = model.penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-5)  # fp32 sums
    before = float(state.shared["multiplier"])
    model.after_step()
    assert float(state.shared["multiplier"]) == pytest.approx(before + 0.05 * (expected_open.item() - 0.25), rel=1e-5)


def test_the_quadratic_penalty_is_the_formula() -> None:
    model = salora(constraint="penalty", weight=0.01, density=0.25, orthogonality=0.0)
    stirred(model.program)
    gates = torch.cat([site["lora_gate"].detach().double() for site in state_of(model).sites])
    expected_open = (1 / (1 + (-(gates + 2 / 3 * math.log(11))).exp())).sum()
    penalty = model.penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.01 * (expected_open.item() - 0.25 * len(gates)) ** 2, rel=1e-5)
    model.after_step()
    assert float(state_of(model).shared["multiplier"]) == 0.0


def test_the_multiplier_rises_while_infeasible_and_is_never_trained() -> None:
    model = salora()
    assert "salora.multiplier" in dict(model.named_buffers())
    assert not any("multiplier" in name for name, _ in model.named_parameters())
    multiplier = state_of(model).shared["multiplier"]
    held = {id(value) for group in optimiser(model).param_groups for value in group["params"]}
    assert id(multiplier) not in held
    seen = [0.0]
    for step in range(3):
        fit(model, [batch(4, 5, step)])
        seen.append(float(multiplier))
    assert seen == sorted(set(seen)), "all gates open: it rises every step"
    with torch.no_grad():
        for site in state_of(model).sites:
            site["lora_gate"].fill_(-4.0)
    for step in range(4):
        multiplier.fill_(0.01)
        fit(model, [batch(4, 5, step)])
        assert float(multiplier) == 0.0


def test_log_alpha_is_clamped_to_log_100() -> None:
    model = salora()
    gates = [site["lora_gate"] for site in state_of(model).sites]
    with torch.no_grad():
        gates[0].fill_(9.0)
        gates[1].fill_(-9.0)
        gates[2].fill_(4.0)
    model.after_step()
    bounds = [gate.detach().unique().tolist() for gate in gates[:3]]
    assert bounds == [[pytest.approx(math.log(100))], [pytest.approx(-math.log(100))], [4.0]]


def test_recomputed_activations_see_the_same_noise() -> None:
    for name in ("salora", "finegates", "salora + finegates"):
        found = []
        for checkpointing in (False, True):
            model = training(*RECIPES[name])
            stirred(model.program)
            model.checkpointing = checkpointing
            torch.manual_seed(7)
            output = model.train()(**batch(4, 5))
            square(output).backward()
            found.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
        assert_equal(*found)
        assert any(bool(value.any()) for key, value in found[0].items() if "gate" in key)


@pytest.mark.parametrize("options", [{}, {**PUBLISHED, "multiplier_rate": 0.01, "gate_rate": 0.05}])
def test_the_density_asked_for_is_reached(options: dict[str, Any]) -> None:
    # As published the multiplier has no way back, so its rate has to suit the loss, which is of size 0.1.
    step = Salora(targets=EVERY, rank=8, alpha=8.0, density=0.5, **options)
    model = training(step, total_steps=400, seed=0)
    fit(model, (batch(8, 6, seed) for seed in range(400)))
    shown = report_of(model.program).sections["salora: Open ranks"][0]
    assert shown["open"] == pytest.approx(0.5, abs=0.02)
    rows = report_of(model.program).sections["salora: Rank by module"]
    assert sum(row["rank"] for row in rows) == round(shown["open"] * 80)
    assert {row["of"] for row in rows} == {8}


def test_the_multiplier_watches_what_evaluation_sees_open() -> None:
    model = salora(steer="achieved", ramp=0.5, multiplier_rate=2.0, density=0.2)
    state = state_of(model)
    with torch.no_grad():
        for site in state.sites:
            site["lora_gate"].copy_(torch.tensor([-4.0, -1.0, 0.0, 4.0]))  # three of four are open
        model.clock.fill_(1)  # of ten steps; at the first, 0.84 would have to be open
    multiplier = 0.0
    for allowed in (0.68, 0.52, 0.36, 0.2, 0.2):
        model.after_step()
        multiplier = max(0.0, multiplier + 2.0 * (0.75 - allowed))
        assert float(state.shared["multiplier"]) == pytest.approx(multiplier, rel=1e-5)


def test_the_ranks_that_closed_last_stay_open_when_too_many_did() -> None:
    model = salora(steer="achieved", ramp=0.5, density=0.2)
    gates = [site["lora_gate"] for site in state_of(model).sites]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for gate in gates:
            gate.copy_(-1.7 - 2 * torch.rand(gate.shape, generator=generator))  # all closed
    before = torch.cat([gate.detach().clone() for gate in gates])
    model.after_step()  # of ten steps the first, which is to keep 0.84
    after = torch.cat([gate.detach() for gate in gates])
    opened = HardConcrete.median(after) > 0
    assert int(opened.sum()) == math.ceil(0.84 * len(after))
    assert before[opened].min() >= before[~opened].max(), "those of highest log alpha"
    assert float(HardConcrete.median(after[opened]).max()) < 0.01, "barely"


def test_closing_gates_does_not_move_the_scale() -> None:
    model = salora()
    program = stirred(model.program)
    site = state_of(model).sites[0]
    closed = HardConcrete.median(site["lora_gate"]) == 0
    assert 0 < int(closed.sum()) < 4, "else nothing is shown"
    before = model.eval()(**batch(4, 5))
    with torch.no_grad():  # removing what is closed leaves the function as it is
        site["lora_A"][closed] = 0.0
        site["lora_B"][:, closed] = 0.0
    assert torch.equal(build_module(program).eval()(**batch(4, 5)), before)
