"""PRILoRA: ranks by depth, exact pruning, and the statistic of the inputs, against plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx.errors import UsageError
from lorafx.graph import program as data
from lorafx.passes.prilora import Prilora
from lorafx.public import Program
from lorafx.reporting.report import report_of
from lorafx.training.module import RewrittenModel
from tests.methods import (
    assert_equal,
    batch,
    fit,
    inputs_of,
    optimiser,
    refused,
    rewritten,
    square,
    state_of,
    tower,
    training,
)

#: Rounding of fp32 sums taken in another order.
ROUNDING = 1e-6


def ranks(program: Program) -> list[int]:
    entries = (entry for applied in program.history for entry in applied.inserted)
    return [program.tensor(entry.tensors["lora_A"]).shape[0] for entry in entries if "lora_A" in entry.tensors]


PAPER_RANKS = [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]


def test_ranks_grow_linearly_with_depth() -> None:
    program = rewritten(Prilora(targets="query"), base=tower(12))
    assert ranks(program) == PAPER_RANKS
    assert sum(PAPER_RANKS) == 96
    table = program.report.sections["prilora: Ranks by block"]
    assert [row["sum"] for row in table] == PAPER_RANKS
    assert [row["block"] for row in table] == list(range(12))


def test_the_block_is_read_from_the_path_not_counted() -> None:
    assert ranks(rewritten(Prilora(targets="query", blocks="3..5"), base=tower(12))) == PAPER_RANKS[3:6]


def test_a_single_block_has_the_last_rank() -> None:
    assert ranks(rewritten(Prilora(targets="query"), base=tower(1))) == [12]


def test_a_rank_the_weight_cannot_hold_is_refused_by_name() -> None:
    message = refused(UsageError, (Prilora(targets="query"),), base=tower(12, 8, 8))
    assert message == "prilora: rank 9 at layers.7.query, whose weight allows 1 to 8"


def test_the_scale_is_constant_unless_asked() -> None:
    program = tower(12)
    sites = [site for site in program.sites() if site.module.endswith("query")]
    assert {Prilora(alpha=16.0).scale_of(site) for site in sites} == {2.0}
    per_rank = [Prilora(alpha=16.0, scale="per_rank").scale_of(site) for site in sites]
    assert per_rank == [16.0 / rank for rank in PAPER_RANKS]


PRUNING = Prilora(rank_first=4, rank_last=4, interval=2)


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({"fraction": 0.3}, lambda a: (a, math.floor(0.3 * a.shape[1]))),
        ({"group": "matrix", "fraction": 0.3}, lambda a: (a.reshape(1, -1), math.floor(0.3 * a.numel()))),
        ({"group": "2:4"}, lambda a: (a.reshape(-1, 4), 2)),
        ({"group": "1:4", "fraction": 0.9}, lambda a: (a.reshape(-1, 4), 1)),
    ],
)
def test_exactly_the_stated_share_of_every_group_is_zero(
    options: dict[str, Any], groups: Callable[[Tensor], tuple[Tensor, int]]
) -> None:
    step = Prilora(**{**vars(PRUNING), **options})
    model = training(step, total_steps=2)
    fit(model, [batch(4, 5, seed) for seed in range(2)])
    for site in state_of(model).sites:
        rows, count = groups(site["lora_A"])
        assert (rows == 0).sum(1).tolist() == [count] * len(rows)


def test_what_is_pruned_is_lowest_by_magnitude_times_input() -> None:
    model = training(PRUNING, total_steps=9)
    fit(model, [batch(4, 5)])
    site = state_of(model).sites[0]
    with torch.no_grad():
        site["lora_A"].copy_(torch.tensor([3.0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]).expand(4, 12))
        site["input_norm"].copy_(torch.tensor([0.1, 5, 4, 5, 4, 5, 4, 5, 4, 5, 4, 5]))
    # A large entry on a silent input goes first; of the equal scores 4 all five; nothing of the six equal scores 5.
    assert PRUNING.to_prune(site["lora_A"], site["input_norm"]).int().tolist() == [[1, *[0, 1] * 5, 0]] * 4


@pytest.mark.parametrize(
    ("group", "message"),
    [("2:5", "not a multiple of 5"), ("columns", "write row, matrix or n:m"), ("4:2", "with n below m")],
)
def test_a_group_that_cannot_be_is_refused_before_training(group: str, message: str) -> None:
    found = refused(UsageError, (Prilora(rank_first=2, rank_last=2, group=group),))
    assert message in found
    assert "prilora" in found


def by_hand(program: data.Program, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """‖X_j‖₂ / √tokens of what enters each module, over the tokens the mask lets through."""
    mask = inputs["attention_mask"].bool()
    seen = inputs_of(program, lambda model: model(**inputs))
    return {
        name: (x[mask].square().sum(0) / mask.sum()).sqrt() for name, x in seen.items() if x.shape[:2] == mask.shape
    }


def norms(model: RewrittenModel) -> dict[str, Tensor]:
    return {site.module: site["input_norm"].clone() for site in state_of(model).sites}


def sums(model: RewrittenModel) -> dict[str, Tensor]:
    found = {f"{site.module}.sum": site["square_sum"].clone() for site in state_of(model).sites}
    return {**found, **{f"{site.module}.count": site["token_count"].clone() for site in state_of(model).sites}}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = ROUNDING) -> None:
    assert a.keys() <= b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=0.0)


def test_the_statistic_is_the_norm_of_the_inputs_averaged_over_steps() -> None:
    # B is 0 and the optimiser is given a rate of 0: every forward is the base model's.
    model = training(Prilora(rank_first=2, rank_last=2, beta=0.75, interval=100))
    first, second = batch(4, 7, seed=1), batch(3, 5, seed=2)
    expected, then = by_hand(model.program, first), by_hand(model.program, second)
    fit(model, [first], optimiser(model, lr=0.0))
    assert_close(norms(model), expected)
    fit(model, [second], optimiser(model, lr=0.0))
    assert_close(norms(model), {name: 0.75 * expected[name] + 0.25 * then[name] for name in expected})
    assert len(norms(model)) == 10


def test_the_statistic_sees_no_padding() -> None:
    found = []
    for padding in (0, 1):
        model = training(PRUNING)
        fit(model, [batch(4, 7, padding=padding)], optimiser(model, lr=0.0))
        found.append(norms(model))
    assert_equal(*found)


def test_the_statistic_is_of_training_forwards_alone() -> None:
    model = training(PRUNING)
    model.train()(**batch(4, 5))
    counted = sums(model)
    assert all(bool(value.any()) for value in counted.values())
    model.eval()(**batch(4, 5, seed=2))
    assert_equal(sums(model), counted)


def test_recomputing_activations_counts_nothing_twice() -> None:
    found = []
    for checkpointing in (False, True):
        model = training(PRUNING)
        model.checkpointing = checkpointing
        square(model.train()(**batch(4, 5))).backward()
        found.append(sums(model))
    assert_equal(*found)


def test_micro_batches_count_as_their_batch() -> None:
    whole = batch(4, 5)
    model, parts = training(PRUNING), training(PRUNING)
    fit(model, [whole], optimiser(model, lr=0.0))
    for rows in (slice(0, 1), slice(1, 4)):
        square(parts.train()(**{name: value[rows] for name, value in whole.items()})).backward()
    parts.before_step()
    assert_close(norms(model), norms(parts))


class Unmasked(nn.Module):
    """Two blocks of one linear, and no mask: nothing but the statistic itself can widen what is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


def test_the_statistic_is_fp32_under_autocast() -> None:
    base = lorafx.capture(Unmasked(), inputs={"x": torch.randn(3, 5, 16)})
    model = training(PRUNING, base=base)
    inputs = {"x": torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))}
    with torch.autocast("cpu", torch.bfloat16):
        seen = inputs_of(model.program, lambda eager: eager(**inputs))
        model.train()(**inputs)
    assert seen["layers.1"].dtype == torch.bfloat16, "else nothing is shown"
    for site in state_of(model).sites:
        expected = seen[site.module].float().square().sum((0, 1))
        torch.testing.assert_close(site["square_sum"], expected, rtol=ROUNDING, atol=0.0)
        assert float(site["token_count"]) == 20


def test_pruned_entries_grow_again_unless_told_not_to() -> None:
    for regrow in (True, False):
        model = training(Prilora(**{**vars(PRUNING), "regrow": regrow}), total_steps=9)
        optimizer = optimiser(model)
        fit(model, [batch(4, 5, seed) for seed in range(2)], optimizer)
        pruned = {site.module: site["lora_A"] == 0 for site in state_of(model).sites}
        fit(model, [batch(4, 5, seed=3)], optimizer)
        for site in state_of(model).sites:
            assert bool((site["lora_A"] == 0)[pruned[site.module]].all()) == (not regrow)
            assert bool((site["lora_A"] != 0)[~pruned[site.module]].all())


@pytest.mark.parametrize("final_prune", [True, False])
def test_a_last_pruning_closes_training(final_prune: bool) -> None:
    model = training(Prilora(**{**vars(PRUNING), "interval": 2, "final_prune": final_prune}), total_steps=3)
    fit(model, [batch(4, 5, seed) for seed in range(3)])
    for site in state_of(model).sites:
        half = site["lora_A"].shape[1] // 2
        assert ((site["lora_A"] == 0).sum(1) == half).all() == final_prune
    rows = report_of(model.program).sections["prilora: Density of A"]
    assert ({row["density"] for row in rows} == {0.5}) == final_prune


def test_a_last_pruning_needs_to_know_the_last_step() -> None:
    model = training(PRUNING, total_steps=None)
    with pytest.raises(UsageError, match=r"set model\.total_steps"):
        fit(model, [batch(4, 5)])


def test_without_pruning_nothing_is_counted() -> None:
    program = rewritten(Prilora(rank_first=2, rank_last=2, fraction=0.0))
    assert not program.names("statistic")
