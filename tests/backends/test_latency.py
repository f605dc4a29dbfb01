"""The table of latencies: what each unit's removal takes off the model that is exported, and nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

import lorafx
from lorafx.backends import latency
from lorafx.backends.latency import latency_table
from lorafx.errors import UsageError
from lorafx.parity.runner import Runner
from tests import zoo

#: The first of two blocks, and the last, which goes over the one token that the head reads.
PLACES = ("", " of one token")


def numbers(runner: Runner) -> float:
    """How many numbers the weights of an exported model have."""
    assert runner.folder is not None
    made = onnx.load(Path(runner.folder) / "model.onnx", load_external_data=False)
    weights = [value.dims for value in made.graph.initializer if value.data_type == TensorProto.FLOAT]
    return float(sum(math.prod(dims) for dims in weights))


@pytest.mark.slow
def test_prices_are_what_goes_with_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers stand for seconds, so that what a table is to say can be counted."""
    asked: list[Any] = []

    def counted(*runners: Runner, **options: Any) -> SimpleNamespace:
        asked.append((options, {runner.threads for runner in runners}))
        before, after = map(numbers, runners)
        return SimpleNamespace(timings=[SimpleNamespace(median=before), SimpleNamespace(ratio=before / after)])

    monkeypatch.setattr(latency, "bench", counted)
    table = latency_table(zoo.captured("bert"), batch=3, length=5, threads=1, repeats=7)
    neuron = 32 + 1 + 32  # a row, its bias, a column
    head = 3 * 8 * (32 + 1) + 32 * 8  # eight channels of query, key and value, and what reads them
    kinds = {
        f"{name}{where}": price for name, price in (("48 of 48x32", neuron), ("4 of 32x32", head)) for where in PLACES
    }
    assert {name: table[name] for name in kinds} == pytest.approx(kinds, rel=1e-9)
    assert set(table) == {"whole", *kinds, *(f"{name}-call" for name in kinds)}
    assert asked == [({"shapes": ((3, 5),), "repeats": 7, "memory": False}, {1})] * 9


def test_a_model_without_units_is_refused() -> None:
    program = lorafx.capture(nn.Linear(4, 4), inputs={"input": torch.randn(2, 4)})
    with pytest.raises(UsageError, match="nothing in its blocks can be removed"):
        latency_table(program)
