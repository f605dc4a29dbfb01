"""Budgets: what a coupled gate is said to cost is what the folded model saves, in numbers, operations and time."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import lorafx
from lorafx.channels.costs import shape_name
from lorafx.errors import UsageError
from lorafx.methods.gates import ClampedGaussian, kept_share
from lorafx.passes.finegates import Finegates
from lorafx.proof.latency import latency_table
from lorafx.public import Program
from lorafx.reporting.sizes import TOKENS, flops_by_block
from tests import zoo
from tests.methods import state_of

BLOCKS = "*encoder.layer.*"
#: Seconds, as `lorafx latency` would say them: every shape has another price.
TABLE = {"32x32": 3e-9, "32x48": 2e-9, "48x32": 5e-9, "attention": 7e-7}
#: Beside them what a call costs, of the same size as all numbers of a weight.
CALLS = {"32x32-call": 2e-6, "32x48-call": 5e-6, "48x32-call": 3e-6, "attention-call": 9e-6}


def gated(**options: object) -> tuple[Program, float]:
    """BERT with the first third of every module's gates closed, and the share that its gates say is kept.

    Of gates of sublayers those of the first attention and the last feed-forward are closed.
    """
    program = lorafx.rewrite(zoo.captured("bert"), [Finegates(targets=BLOCKS, **options)])  # type: ignore[arg-type]
    state = state_of(program.module())
    with torch.no_grad():
        for site in state.sites:
            theta = site["gate"]
            theta.fill_(1.0)[: len(theta) // 3] = -1.0
        whole = [site["gate_sublayer"] for site in state.sites if "gate_sublayer" in site.tensors]
        for theta in whole[:1] + whole[-1:]:
            theta.fill_(-1.0)
    return program, float(kept_share(state, lambda theta: ClampedGaussian.median(theta) > 0))


@cache
def sizes_before() -> dict[str, tuple[int, int]]:
    return sizes(zoo.captured("bert"))


def sizes(program: Program) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the weights in blocks, by module."""
    return {s.module: (s.in_features, s.out_features) for s in program.sites() if s.block is not None}


def numbers(program: Program) -> float:
    return float(sum(ins * outs for ins, outs in sizes(program).values()))


def operations(program: Program) -> float:
    return float(sum(count for block, count in flops_by_block(program, TOKENS).items() if block))


def seconds(program: Program) -> float:
    """By the table: every number at the price of its weight's full shape, every channel of attention at its own."""
    return timed(program, {})


def with_calls(program: Program) -> float:
    """The same, and what calls cost: each weight's, and one an attention."""
    return timed(program, CALLS)


def timed(program: Program, calls: dict[str, float]) -> float:
    total = 0.0
    for module, (ins, outs) in sizes(program).items():
        full = "x".join(map(str, sizes_before()[module]))
        total += TABLE[full] * ins * outs
        total += calls.get(f"{full}-call", 0.0)
        mixing = TABLE["attention"] * ins + calls.get("attention-call", 0.0)
        total += mixing * module.endswith("attention.output.dense")
    return total


@pytest.mark.parametrize(
    ("options", "measure"),
    [
        ({}, numbers),
        ({"measure": "flops", "length": TOKENS}, operations),
        ({"measure": "latency", "latency": TABLE}, seconds),
        ({"measure": "latency", "latency": TABLE | CALLS}, seconds),
        ({"sublayers": True}, numbers),
        ({"sublayers": True, "measure": "flops", "length": TOKENS}, operations),
        ({"sublayers": True, "measure": "latency", "latency": TABLE}, seconds),
        ({"sublayers": True, "measure": "latency", "latency": TABLE | CALLS}, with_calls),
    ],
    ids=["parameters", "flops", "latency", "calls stay", "depth", "depth flops", "depth latency", "depth calls"],
)
def test_what_gates_say_is_kept_is_what_folding_leaves(options: dict[str, object], measure: object) -> None:
    program, said = gated(**options)
    folded = lorafx.fold(program)
    left = measure(folded) / measure(zoo.captured("bert"))  # type: ignore[operator]
    assert (0.3 if "sublayers" in options else 0.5) < left < 0.9
    assert said == pytest.approx(left, rel=1e-6)  # fp32 sums of a hundred costs


def test_measures_differ() -> None:
    shares = [gated(**o)[1] for o in ({}, {"measure": "flops"}, {"measure": "latency", "latency": TABLE})]
    assert len({round(share, 4) for share in shares}) == 3


def test_a_shape_without_a_price_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no latency of 32x48 .*lorafx latency"):
        gated(measure="latency", latency={"32x32": 1e-9, "attention": 1e-6})
    with pytest.raises(UsageError, match="lorafx latency CHECKPOINT"):
        gated(measure="latency")


def test_the_table_has_a_price_for_everything_in_the_blocks() -> None:
    program = zoo.captured("bert")
    table = latency_table(program, batch=2, length=8, threads=1, repeats=3)
    names = {*(shape_name(s) for s in program.sites() if s.block is not None), "attention"}
    assert set(table) == {*names, *(f"{name}-call" for name in names)}
    assert all(value >= 0 for value in table.values())


def test_time_grows_with_size() -> None:
    # A hundred times as many tokens: the price of a number must show it, whatever else the machine does.
    program = zoo.captured("bert")
    few, many = (latency_table(program, batch=b, length=64, threads=1, repeats=9)["48x32"] for b in (1, 100))
    assert many > 5 * few
