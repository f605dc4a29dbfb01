"""Budgets: what a coupled gate is said to cost is what the folded model saves, in numbers, operations and time."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch

import lorafx
from lorafx.channels.costs import Measure
from lorafx.errors import RecipeError, UsageError
from lorafx.methods.gates import ClampedGaussian, kept_share
from lorafx.passes.finegates import Finegates
from lorafx.public import Program
from lorafx.reporting.sizes import TOKENS, flops_by_block
from tests import zoo
from tests.methods import state_of

BLOCKS = "*encoder.layer.*"
#: Seconds, as `lorafx latency` would say them: of the model, of a head and a neuron, and of what goes with the last.
TABLE = {"whole": 9e-4, "4 of 32x32": 5e-5, "4 of 32x32-call": 2e-5, "48 of 48x32": 3e-6, "48 of 48x32-call": 4e-5}
#: The last of BERT's two blocks goes over the one token that its head reads.
ALONE = " of one token"
TABLE |= {f"4 of 32x32{ALONE}": 2e-5, f"4 of 32x32{ALONE}-call": 1e-5}
TABLE |= {f"48 of 48x32{ALONE}": 2e-7, f"48 of 48x32{ALONE}-call": 3e-6}
#: What the weights that read heads and neurons are called.
READERS = {"attention.output.dense": "4 of 32x32", ".output.dense": "48 of 48x32"}


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
    """By the table: the model's, less each head's and neuron's that is gone, less what goes with a sublayer's last."""
    total = TABLE["whole"]
    left = sizes(program)
    for module, (full, _) in sizes_before().items():
        kind = next((kind for name, kind in READERS.items() if module.endswith(name)), None)
        if kind is not None:
            of = int(kind.split(" ")[0])
            still = left[module][0] if module in left else 0
            kind += ALONE if ".layer.1." in module else ""
            total -= TABLE[kind] * (full - still) * of / full
            total -= TABLE[f"{kind}-call"] * (module not in left)
    return total


@pytest.mark.parametrize(
    ("options", "measure"),
    [
        ({}, numbers),
        ({"measure": "flops", "length": TOKENS}, operations),
        ({"measure": "latency", "latency": TABLE}, seconds),
        ({"sublayers": True}, numbers),
        ({"sublayers": True, "measure": "flops", "length": TOKENS}, operations),
        ({"sublayers": True, "measure": "latency", "latency": TABLE}, seconds),
    ],
    ids=["parameters", "flops", "latency", "depth", "depth flops", "depth latency"],
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


def test_a_kind_without_a_price_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no latency of 48 of 48x32 \(known: 4 of 32x32, .*lorafx latency"):
        gated(measure="latency", latency={name: value for name, value in TABLE.items() if "48" not in name})
    with pytest.raises(UsageError, match="lorafx latency CHECKPOINT"):
        gated(measure="latency")


def test_a_table_of_operators_is_refused() -> None:
    """As earlier versions measured them: seconds of a number of a weight, by its shape."""
    with pytest.raises(UsageError, match=r"no 'whole'.*prices operators.*version 0\.1"):
        gated(measure="latency", latency={"32x32": 3e-9, "32x48": 2e-9, "48x32": 5e-9, "attention": 7e-7})


def test_a_budget_that_gates_cannot_meet_is_refused() -> None:
    """The other seconds are in no unit, or in the last one of a sublayer."""
    for options, least in (({}, 0.6), ({"sublayers": True}, 0.437)):
        with pytest.raises(RecipeError, match=rf"budget = {least - 0.01:g} cannot be met: {least} is left"):
            gated(measure="latency", latency=TABLE, budget=least - 0.01, **options)
        gated(measure="latency", latency=TABLE, budget=least + 0.001, **options)


@pytest.mark.parametrize("measure", ["parameters", "flops"])
def test_a_budget_below_what_may_close_is_said_with_the_least(
    measure: Measure, caplog: pytest.LogCaptureFixture
) -> None:
    """T5's heads share a bias by position, so none of them may close."""
    program = zoo.captured("t5")
    lorafx.rewrite(program, [Finegates(budget=0.1, measure=measure)])
    said = re.search(r"budget = 0\.1 cannot be met: ([0-9.]+) is left", caplog.text)
    assert said is not None
    caplog.clear()
    lorafx.rewrite(program, [Finegates(budget=float(said[1]) + 1e-3, measure=measure)])
    assert not caplog.text
    lorafx.rewrite(program, [Finegates(budget=float(said[1]) - 1e-2, measure=measure)])
    assert "cannot be met" in caplog.text
