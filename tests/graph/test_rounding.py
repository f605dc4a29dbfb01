"""What rounding alone moves is no mistake, and no excuse for one."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx.base import Pass, Promise
from lorafx.errors import ParityError
from lorafx.graph import program as data
from lorafx.graph.edit import Edit
from lorafx.graph.rounding import MARGIN, jittered, slack
from lorafx.graph.selection import Selection
from lorafx.passes.lora import Lora
from lorafx.pipeline import run, to_eval
from lorafx.public import Program
from tests.small import own

EPS = torch.finfo(torch.float64).eps


class Amplifies(nn.Module):
    """Rounding of equal rows, which a deviation without an epsilon and a norm blow up, beside a healthy output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.second(torch.tanh(self.first(x)))
        rows = torch.stack([h * 0.3, h * 0.1 + h * 0.2], 1)  # equal but for rounding
        spread = rows.std(1, unbiased=False)
        return h, spread, spread / (spread.amax(-1, keepdim=True) + 1e-16)


@dataclasses.dataclass(frozen=True)
class Shift(Pass):
    """Move one bias."""

    promise: ClassVar[Promise] = Promise.CLOSE
    by: float = 0.0

    def sites(self, program: data.Program) -> Selection:
        return Selection(("second.bias",))  # type: ignore[arg-type]

    def rewrite(self, edit: Edit, site: Any) -> None:
        with torch.no_grad():
            own(edit.program.root, site).add_(self.by)


def adapted(dtype: torch.dtype = torch.float64) -> Program:
    torch.manual_seed(0)
    model = Amplifies().to(dtype).eval()
    program = lorafx.capture(model, inputs={"x": torch.randn(5, 8, dtype=dtype)})
    program = lorafx.rewrite(program, [Lora(targets="*", rank=2)])
    for name in program.names("adapter"):
        program.tensor(name).data.normal_(std=0.5)
    return program


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_amplifies_rounding_folds(dtype: torch.dtype) -> None:
    program = adapted(dtype)
    folded = lorafx.fold(program)
    x = program.example["x"]
    with torch.no_grad():
        want, got = (list(one.module().eval()(x=x)) for one in (program, folded))
    healthy, noise = (float((a - b).abs().max() / a.abs().max()) for a, b in list(zip(want, got, strict=True))[:2])
    assert healthy < 1e4 * torch.finfo(dtype).eps
    assert noise > 1e-3  # nobody can say more of it: the reason why it must not count


@pytest.mark.parametrize("by", [1e-6, 1e-10])
def test_a_mistake_beside_it_is_found(by: float) -> None:
    with pytest.raises(ParityError, match=r"0\[0, \d\] for inputs the example inputs"):
        run(adapted(), (Shift(by=by),), check=True)


def test_every_rounded_value_moves_within_its_last_bit() -> None:
    program = to_eval(adapted())
    moved = jittered(program, 0)
    before, after = (dict(values(one)) for one in (program, moved))
    first = next(name for name in before if name.startswith("linear"))
    gap = (after[first] - before[first]).abs() / before[first].abs()
    assert 0 < float(gap.max()) < 1e3 * EPS
    again = dict(values(jittered(program, 0)))
    assert all(torch.equal(after[name], again[name]) for name in before)
    assert any(not torch.equal(after[name], other) for name, other in values(jittered(program, 1)) if name in before)


def test_whole_numbers_masks_and_what_is_written_in_place_stay() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            ruled_out = (1.0 - mask) * torch.finfo(mask.dtype).min
            kept = torch.zeros_like(x)
            kept.add_(1.0)
            return (x + ruled_out).softmax(-1) * (mask == 1.0) * kept

    x, mask = torch.randn(2, 4).double(), torch.tensor([[1.0, 1, 1, 0], [1, 0, 1, 0]]).double()
    program = to_eval(lorafx.capture(Masked(), inputs={"x": x, "mask": mask}))
    for seed in range(4):
        got = jittered(program, seed).module().eval()(x=x, mask=mask)
        want = Masked()(x, mask)
        assert float((got - want).abs().max()) < 1e2 * EPS
        assert torch.equal(got == 0, want == 0)


def test_slack_is_the_largest_move() -> None:
    value = torch.tensor([1.0, 2.0, 3.0])
    others = [torch.tensor([1.0, 2.5, 3.0]), torch.tensor([0.75, 2.0, float("nan")]), torch.zeros(7), None]
    assert slack(value, others).tolist() == [0.25 * MARGIN, 0.5 * MARGIN, 0.0]


def values(program: Program) -> list[tuple[str, Tensor]]:
    """What the operators of a program give, by name."""
    from lorafx.channels.trial import _values

    return [(name, value) for name, value in _values(program).items() if isinstance(value, Tensor)]
