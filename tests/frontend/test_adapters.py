"""Adapters that PEFT made, put on a base without PEFT: the function PEFT computes, unfolded and folded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorafx
from lorafx.formats.adapter import read_adapter
from lorafx.frontend.adapters import adapted
from tests import foreign, zoo

#: Grouped products of experts exist in fp32 at most.
_SINGLE = ("mixtral", "qwen3-moe")


@pytest.mark.parametrize("name", foreign.CASES)
def test_what_peft_computes(name: str, tmp_path: Path) -> None:
    case = foreign.CASES[name]
    dtype = torch.float32 if case.model in _SINGLE else torch.float64
    theirs = foreign.adapted(zoo.build(case.model, dtype=dtype), case.options())
    inputs = zoo.ZOO[case.model].inputs(3, 6)
    inputs = zoo.widened(inputs) if dtype == torch.float64 else inputs
    expected = foreign.answers(theirs, inputs)
    adapter = read_adapter(foreign.save(theirs, tmp_path / "adapter"))
    base = zoo.captured(case.model, dtype=dtype)
    assert zoo.distance(expected, zoo.run(base, inputs)) > 1e-3, "the adapter does something"
    changes = adapter.changes(base.source.model)
    assert sorted(key for change in changes for key in change.keys) == sorted(adapter.tensors)
    program = adapted(base, [(adapter, 1.0)])
    bound = 1e-5 if dtype == torch.float32 else 1e-10
    assert zoo.distance(expected, zoo.run(program, inputs)) < bound
    folded = lorafx.fold(program)
    assert zoo.distance(expected, zoo.run(folded, inputs)) < bound
    assert not folded.names("adapter")
