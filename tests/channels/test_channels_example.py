"""The example at the head of ``lorafx.channels`` says what the analyses say."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

import lorafx
from lorafx.channels.axes import Axes
from lorafx.channels.constant import ConstantChannels
from lorafx.channels.needed import needed_channels
from lorafx.channels.table import RULES
from lorafx.pipeline import to_eval


class Example(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)
        with torch.no_grad():
            self.first.weight[1] = 0.0
            self.first.bias[1] = 0.5
            self.second.weight[:, 2] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_the_example_is_right() -> None:
    torch.manual_seed(0)
    model = Example().double().eval()
    program = to_eval(lorafx.capture(model, inputs={"x": torch.randn(5, 4).double()}))
    axes = Axes(program, RULES)
    labels = [axes.channel[axes.members[name][dim]] for name, dim in (("first.weight", 0), ("second.weight", 1))]
    assert np.array_equal(labels[0], labels[1])
    assert np.array_equal(labels[0], axes.channel[axes.members["first.bias"][0]])
    assert len(set(labels[0].tolist())) == 3
    assert set(axes.channel[axes.members["first.weight"][1]]) <= {axes.channel[label] for label in axes.pins}
    facts = ConstantChannels(axes)
    relu: Any = next(node for node in program.graph.nodes if "relu" in str(node.target))
    assert isinstance(relu, fx.Node)
    (known,) = facts.of(relu)
    assert np.array_equal(known.data, [np.nan, 0.5, np.nan], equal_nan=True)
    assert needed_channels(axes, facts)[labels[0]].tolist() == [True, False, False]

    folded = lorafx.fold(program)
    shapes = {name: tuple(folded.tensor(name).shape) for name in ("first.weight", "first.bias", "second.weight")}
    assert shapes == {"first.weight": (1, 4), "first.bias": (1,), "second.weight": (2, 1)}
    shift = model.second.bias + 0.5 * model.second.weight[:, 1]
    assert any(torch.equal(value, shift) for _, value in folded.root.named_parameters() if value.shape == shift.shape)
