"""Fake values: they say how the numbers lie in memory in every dtype, and are computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lorafx
from lorafx.graph.fake import FakeValues
from lorafx.graph.precision import recast
from lorafx.passes.dead_channels import DeadChannels
from lorafx.pipeline import run, to_eval
from lorafx.public import Program
from tests.captures import shared
from tests.small import own


class Blocks(nn.Module):
    """Two residual blocks, and a head that reads the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.ModuleList(nn.Linear(a, b) for _ in range(2)) for a, b in ((6, 8), (8, 6)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        return self.head(x[:, 0])


@shared
def blocks() -> Program:
    """The blocks in fp64; the first has two units that nobody reads."""
    torch.manual_seed(0)
    model = Blocks().eval()
    with torch.no_grad():
        own(model, "down.0.weight")[:, [1, 4]] = 0.0
    return recast(to_eval(lorafx.capture(model, inputs={"x": torch.randn(2, 5, 6)}, dynamic=False)), torch.float64)


class Strides(fx.Interpreter):
    """Runs a graph and holds the memory of every value to what its fake says."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op == "call_function":
            fake: Any = n.meta["val"]
            assert (value.shape, value.stride(), value.dtype) == (fake.shape, fake.stride(), fake.dtype), n.name
        return value


def test_values_in_another_dtype_lie_in_memory_as_they_did() -> None:
    program = blocks()
    assert any(not node.meta["val"].is_contiguous() for node in program.graph.nodes if "select" in node.name)
    Strides(fx.GraphModule(program.root, program.graph)).run(program.example["x"])


def test_removing_channels_computes_the_shapes_that_change_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    compute = FakeValues._computed

    def counted(self: FakeValues, node: fx.Node) -> Any:
        computed.append(node.name)
        return compute(self, node)

    monkeypatch.setattr(FakeValues, "_computed", counted)
    program = blocks()
    sliced = run(program, [DeadChannels()], check=False)
    assert sliced.tensor("up.0.weight").shape == (6, 6)
    first = next(node for node in program.graph.nodes if "tanh" in node.name)
    operators = [node.name for node in program.graph.nodes if node.op == "call_function"]
    # What makes, moves and reads the units of the first block, of which the other block and the head have the like.
    assert set(computed) <= {first.all_input_nodes[0].name, first.name, next(iter(first.users)).name}
    assert len(set(computed)) < len(operators) / 2
    Strides(fx.GraphModule(sliced.root, sliced.graph)).run(program.example["x"])
