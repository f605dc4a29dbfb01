"""RoseLoRA: the schedule, importances, exact masks, and weights that keep every bit, against plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lorafx
from lorafx.errors import UsageError
from lorafx.methods.masks import highest, kept
from lorafx.passes.rose_lora import RoseLora
from lorafx.reporting.report import report_of
from tests.methods import RECIPES, batch, fit, optimiser, square, state_of, stirred, tower, training

EDITING = RoseLora(density=0.05, start=3, end=20)


def test_the_schedule_of_knowledge_editing() -> None:
    found = [round(EDITING.kept_at(step, 25), 4) for step in (3, 4, 10, 19, 20, 25)]
    assert found == [1.0, 0.8420, 0.2434, 0.0502, 0.05, 0.05]


def test_moments_below_one_are_shares_of_the_steps() -> None:
    step = RoseLora()
    assert [step.kept_at(at, 100) for at in (1, 10)] == [1.0, 1.0]
    assert step.kept_at(45, 100) == pytest.approx(0.1 + 0.9 * 0.5**3)
    assert [step.kept_at(at, 100) for at in (80, 100)] == [0.1, 0.1]
    assert RoseLora(end=1.0).kept_at(100, 100) == 0.1
    assert RoseLora(start=0.0, end=4).kept_at(2, 10) == 1.0, "the first gradients of A are 0: nothing to choose by"
    with pytest.raises(UsageError, match="sparsity begins at step 3 and is reached at 2 of 2"):
        EDITING_SHORT.kept_at(1, 2)


def test_a_start_of_one_is_the_first_step_and_an_end_of_one_the_last() -> None:
    step = RoseLora(start=1, end=1)
    assert step.kept_at(2, 10) == 1.0
    assert step.kept_at(3, 10) == pytest.approx(0.1 + 0.9 * (7 / 8) ** 3)
    assert step.kept_at(10, 10) == 0.1


EDITING_SHORT = RoseLora(start=3, end=2)

SIZES = st.integers(1, 24)


@settings(max_examples=1000, deadline=None)
@given(
    rank=st.integers(1, 6),
    rows=SIZES,
    columns=SIZES,
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**31),
    exact=st.booleans(),
)
def test_the_density_of_the_update_is_bounded(
    rank: int, rows: int, columns: int, share: float, seed: int, exact: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(rank, columns, generator=generator), torch.rand(rows, rank, generator=generator)
    if exact:  # as the method makes them
        in_a, in_b = highest(a, kept(share, columns)), highest(b.T, kept(share, rows)).T
    else:
        in_a, in_b = a < share, b < share
    product = (in_b.double() @ in_a.double()) > 0
    bound = sum(in_a[i].double().mean() * in_b[:, i].double().mean() for i in range(rank))
    assert product.double().mean() <= bound + 1e-12  # rounding of the sum
    if exact:
        tau_a, tau_b = kept(share, columns) / columns, kept(share, rows) / rows
        assert bound <= rank * tau_a * tau_b + 1e-12
        assert tau_a <= share + 1 / columns


ROSE = RoseLora(rank=3, alpha=6.0, density=0.3, start=2, end=5)


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 7])
def test_exact_counts_are_kept_of_rows_of_a_and_columns_of_b(steps: int) -> None:
    model = training(ROSE, total_steps=8)
    fit(model, [batch(4, 5, seed) for seed in range(steps)])
    share = {2: 1.0, 3: 0.3 + 0.7 * (2 / 3) ** 3, 4: 0.3 + 0.7 / 27}.get(steps, 0.3)
    for site in state_of(model).sites:
        a, b = site["lora_A"], site["lora_B"]
        assert (a != 0).sum(1).tolist() == [math.ceil(share * a.shape[1])] * 3
        assert (b != 0).sum(0).tolist() == [math.ceil(share * b.shape[0])] * 3
    rows = report_of(model.program).sections["rose-lora: Sparse factors"]
    for row, site in zip(rows, state_of(model).sites, strict=True):
        a, b = site["lora_A"].detach(), site["lora_B"].detach()
        assert (row["A"], row["B"]) == (int(a.count_nonzero()) / a.numel(), int(b.count_nonzero()) / b.numel())
        union = (b != 0).float() @ (a != 0).float() > 0
        assert row["weights changed"] == int(union.sum()) / union.numel()


def test_ties_keep_the_lower_index() -> None:
    model = training(ROSE, total_steps=8)
    stirred(model.program)
    for site in state_of(model).sites:
        with torch.no_grad():
            site["lora_A"].fill_(1.0)
            site["lora_B"].fill_(1.0)
        site["importance_A"].fill_(2.0)
        site["importance_B"].fill_(2.0)
    model.clock.fill_(6)
    model.after_step()
    for site in state_of(model).sites:
        rows, columns = site["lora_B"].shape[0], site["lora_A"].shape[1]
        expected = torch.arange(columns) < math.ceil(0.3 * columns)
        assert torch.equal(site["lora_A"].bool(), expected.expand(3, columns))
        expected = torch.arange(rows) < math.ceil(0.3 * rows)
        assert torch.equal(site["lora_B"].bool(), expected[:, None].expand(rows, 3))


def test_importance_is_of_parameters_and_gradients_before_the_step() -> None:
    model = training(RoseLora(rank=3, alpha=6.0, beta=0.6), total_steps=10)
    for name in model.program.names("adapter"):
        nn.init.normal_(model.program.tensor(name), std=0.1)
    expected: dict[str, Tensor] = {}

    def note() -> None:
        for site in state_of(model).sites:
            for short in ("A", "B"):
                value, key = site[f"lora_{short}"], f"{site.module}.{short}"
                assert value.grad is not None
                now = (value.detach() * value.grad).abs()
                expected[key] = 0.6 * expected[key] + 0.4 * now if key in expected else now

    optimizer = optimiser(model, lr=0.1)
    for seed in range(3):
        fit(model, [batch(4, 5, seed)], optimizer, note)
        importances = {
            f"{site.module}.{short}": site[f"importance_{short}"] for site in state_of(model).sites for short in "AB"
        }
        torch.testing.assert_close(importances, expected, rtol=1e-5, atol=1e-12)  # fp32: lerp rounds otherwise


def test_accumulated_gradients_give_the_importance_of_the_whole_batch() -> None:
    whole = batch(6, 5)
    found = []
    for parts in ([slice(0, 6)], [slice(0, 2), slice(2, 4), slice(4, 6)]):
        model = training(ROSE, total_steps=8)
        for name in model.program.names("adapter"):
            nn.init.normal_(model.program.tensor(name), std=0.1, generator=torch.Generator().manual_seed(5))
        for rows in parts:
            output = model.train()(**{name: value[rows] for name, value in whole.items()})
            (square(output) / len(parts)).backward()
        model.before_step()
        found.append(
            {s.module + n: s[n].clone() for s in state_of(model).sites for n in ("importance_A", "importance_B")}
        )
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-9)  # fp32: products of small sums


@pytest.mark.parametrize("name", ["rose-lora", "prilora + rose-lora"])
def test_merged_weights_keep_every_bit_outside_the_union_of_supports(name: str) -> None:
    model = training(*RECIPES[name], total_steps=6)
    fit(model, [batch(4, 5, seed) for seed in range(6)])
    folded = lorafx.fold(model.program)
    for site in state_of(model).sites:
        base, merged = (program.tensor(f"{site.module}.weight") for program in (tower(), folded))
        union = (site["lora_B"] != 0).float() @ (site["lora_A"] != 0).float() > 0
        assert 0 < int(union.sum()) < union.numel()
        assert torch.equal(base[~union], merged[~union])
        assert not torch.equal(base[union], merged[union])


def test_entries_are_held_within_the_clamp() -> None:
    model = training(RoseLora(rank=3, density=0.5, start=2, end=4, clamp=3e-3), total_steps=5)
    fit(model, [batch(4, 5, seed) for seed in range(5)])
    for site in state_of(model).sites:
        for short in ("lora_A", "lora_B"):
            assert site[short].abs().max().item() == pytest.approx(3e-3)


def test_masks_need_the_number_of_steps() -> None:
    with pytest.raises(UsageError, match=r"set model\.total_steps"):
        fit(training(ROSE, total_steps=None), [batch(4, 5)])
