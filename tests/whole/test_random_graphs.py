"""Random graphs as the standing judge: capture, fold, adapters, gates and removal keep the function of any graph."""

from __future__ import annotations

import os
import random
import sys

import pytest
import torch

from lorafx.pipeline import to_eval
from lorafx.public import Program
from tests.judge import judge as court
from tests.judge.judge import build, draw, judge
from tests.judge.minimise import described, minimise
from tests.random_graphs import FAILURES, failure

#: Parts of the slow tier and graphs in each. They are new ones each time, unless LORAFX_JUDGE_SEED says the first seed:
#: a failure prints its seed and the graph made small, which then becomes a test by name.
_PARTS, _EACH = 10, 50


def check(seed: int) -> None:
    verdict = judge(draw(seed))
    if verdict.kind in FAILURES:
        pytest.fail(f"seed {seed}: {failure(seed)}", pytrace=False)


@pytest.mark.parametrize("seed", range(36))
def test_fixed_seeds(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(_PARTS))
def test_many_seeds(part: int) -> None:
    given = os.environ.get("LORAFX_JUDGE_SEED")
    start = int(given) if given else random.SystemRandom().randrange(10**6, 10**9)
    print(f"LORAFX_JUDGE_SEED={start} (part {part})", file=sys.stderr)
    for seed in range(start + part * _EACH, start + (part + 1) * _EACH):
        check(seed)


def test_a_graph_is_determined_by_its_seed() -> None:
    plan = draw(5)
    (model, used), (twin, _) = build(plan), build(plan)
    assert model.source == twin.source
    x = court.example(plan, 2, 5)
    for a, b in zip(court.pytree.tree_leaves(model(x)), court.pytree.tree_leaves(twin(x)), strict=True):
        assert torch.equal(a, b)
    assert build(used)[0].source == model.source


def test_the_judge_finds_a_wrong_fold_and_makes_it_small(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(program: Program) -> Program:
        folded = to_eval(program).copy()
        for node in folded.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
            node.target = torch.ops.aten.tanh.default
        return folded

    monkeypatch.setattr(court, "_fold", wrong)
    plan = next(plan for plan in map(draw, range(500)) if len(plan.layers) == 3 and "F.relu(" in described(plan))
    verdict = judge(plan)
    assert (verdict.kind, verdict.stage) == ("mismatch", "folded = eager")
    small = minimise(plan, verdict)
    assert len(small.layers) <= 1
    assert "F.relu(" in described(small)
