"""Regions without gradients: what they change counts as changed, and what they make of tensors alone is a constant."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lorafx
from lorafx.graph.effects import written
from lorafx.pipeline import to_eval
from lorafx.public import Program
from tests import zoo

FLOAT = torch.float64


class Region(nn.Module):
    """A layer whose input is scaled by a tensor, with something that happens to that tensor without gradients."""

    def __init__(self, inside: Callable[[Tensor], Tensor], read: str = "result") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(4, 3, dtype=FLOAT)
        self.scale = nn.Parameter(torch.randn(1, 4, generator=generator, dtype=FLOAT))
        self.inside, self.read = inside, read

    def forward(self, x: Tensor) -> Tensor:
        before = x * self.scale if self.read == "before" else x
        with torch.no_grad():
            result = self.inside(self.scale)
        after = self.scale if self.read == "after" else result
        return self.layer(before * after)


def captured(model: nn.Module) -> Program:
    program = lorafx.capture(model.eval(), inputs={"x": torch.randn(2, 4, dtype=FLOAT)})
    program.roles["scale"] = "gate"
    return to_eval(program)


def project(scale: Tensor) -> Tensor:
    """Onto a ball: what is inside stays."""
    norm = scale.norm()
    return scale.copy_(torch.where(norm <= 0.1, scale, 0.1 * scale / norm))


def built(scale: Tensor) -> Tensor:
    """In place, but in memory of its own."""
    return torch.zeros(5, dtype=FLOAT).index_put_((torch.tensor([0, 1, 2, 4]),), scale[0])[
        None, torch.tensor([0, 1, 2, 4])
    ]


CONSTANT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a projection": (project, "result"),
    "a projection, read after": (project, "after"),
    "values built in place": (built, "result"),
    "a plain value": (lambda scale: scale.exp(), "result"),
}


@pytest.mark.parametrize("case", CONSTANT)
def test_a_region_of_tensors_alone_folds(case: str) -> None:
    model = Region(*CONSTANT[case])
    scale = model.scale.detach().clone()
    program = captured(model)
    assert any("wrap_with_set_grad" in str(node.target) for node in program.graph.nodes)
    result = lorafx.fold(program)
    assert [str(node.target) for node in result.graph.nodes if node.op == "call_function"] == ["aten.linear.default"]
    assert set(result.roles) == {"layer.weight", "layer.bias"}
    assert torch.equal(model.scale, scale), "folding has written into the model"
    x = torch.randn(5, 4, dtype=FLOAT)
    expected = zoo.eager(model, {"x": x})
    for _ in range(2):  # evaluating settles a projection
        with torch.no_grad():
            model(x)
    assert zoo.distance(expected, zoo.run(result, {"x": x})) < 1e-14
    assert zoo.distance(zoo.eager(model, {"x": x}), zoo.run(result, {"x": x})) < 1e-14


STAYS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a step": (lambda scale: scale.copy_(scale * 0.9), "result"),
    "a count": (lambda scale: scale.add_(1e-9), "result"),
    "a draw": (lambda scale: scale * 1.0 + 0 * torch.rand(4, dtype=FLOAT), "result"),
    "a projection, read before": (project, "before"),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_is_not_certain_stays(case: str) -> None:
    model = Region(*STAYS[case])
    program = lorafx.capture(model.eval(), inputs={"x": torch.randn(2, 4, dtype=FLOAT)}, check=False)
    program.roles["scale"] = "gate"
    result = lorafx.fold(to_eval(program), check=False)
    assert "scale" in result.roles
    assert any("wrap_with_set_grad" in str(node.target) for node in result.graph.nodes)


def test_what_a_region_writes_into_is_written() -> None:
    program = captured(Region(project))
    names = {str(node.target) for node in written(program.root, program.graph) if node.op == "get_attr"}
    assert names == {"scale"}
    assert not written((other := captured(Region(built))).root, other.graph)


def test_two_calls_of_one_projection_stay() -> None:
    class Twice(Region):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(functional.pad(super().forward(x).tanh(), (0, 1)))

    result = lorafx.fold(captured(Twice(project)))
    assert "scale" in result.roles
