"""Every adapter as plain LoRA, and its folder in PEFT's hands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
import zoo

import lorafx
from lorafx.adapters import as_lora, factors
from lorafx.errors import UsageError
from lorafx.passes.finegates import Finegates
from lorafx.passes.lora import Lora
from lorafx.passes.prilora import Prilora
from lorafx.passes.rose_lora import RoseLora
from lorafx.passes.salora import Salora
from lorafx.passes.tied_lora import TiedLora
from lorafx.program import Program

RECIPES: dict[str, list[Any]] = {
    "lora": [Lora(rank=3, alpha=5.0)],
    "prilora": [Prilora(rank_first=2, rank_last=4)],
    "salora": [Salora(rank=4)],
    "tied-lora": [TiedLora(rank=3)],
    "rose-lora": [RoseLora(rank=4)],
    "prilora and rose-lora": [Prilora(rank_first=2, rank_last=4, fraction=0.0), RoseLora(adapters="existing")],
    "lora twice": [Lora(rank=2), Lora(rank=3, blocks=0)],
}


def learned(program: Program) -> Program:
    """Random values for everything inserted; a gate in three is closed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in program.names("adapter"):
            program.tensor(name).normal_(std=0.3, generator=generator)
        for name in program.names("gate"):
            program.tensor(name).normal_(0.0, 3.0, generator=generator)
    return program


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_plain_lora_computes_the_same_function(recipe: str, model: str) -> None:
    program = learned(lorafx.rewrite(zoo.captured(model), RECIPES[recipe]))
    before = {name: program.tensor(name).detach().clone() for name in program.roles}
    plain = as_lora(program)
    assert isinstance(plain.history[-1].step, Lora)
    # fp32 factors composed in fp64 and rounded once: rounding alone, amplified by random adapters.
    assert lorafx.verify(program, plain, dtype=torch.float64).max_rel < 1e-6
    assert all(torch.equal(program.tensor(name), value) for name, value in before.items()), "the program is left alone"


def test_closed_ranks_are_left_out() -> None:
    program = lorafx.rewrite(zoo.captured("bert"), [Salora(rank=4)])
    learned(program)
    first, second = (program.tensor(name) for name in program.names("gate")[:2])
    with torch.no_grad():
        first.copy_(torch.tensor([2.0, -1.7, 2.0, -5.0]))  # closed at or below -1.599
        second.fill_(-3.0)
    found = factors(program)
    assert [update.rank for update in found[:2]] == [2, 0]
    modules = [update.module for update in found if update.rank]
    assert found[1].module not in modules
    assert [entry.module for entry in as_lora(program).history[-1].inserted] == modules


def test_gates_on_the_weight_are_refused() -> None:
    program = learned(lorafx.rewrite(zoo.captured("bert"), [Lora(), Finegates()]))
    with pytest.raises(UsageError, match=r"gate belongs to no low-rank update"):
        as_lora(program)


def test_adapters_that_compute_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="computes nothing"):
        as_lora(lorafx.rewrite(zoo.captured("bert"), [Lora()]))


def test_a_folded_program_is_refused() -> None:
    with pytest.raises(UsageError, match="folded"):
        as_lora(lorafx.fold(learned(lorafx.rewrite(zoo.captured("bert"), [Lora()]))))


@pytest.mark.parametrize("recipe", ["prilora", "salora", "tied-lora"])
def test_peft_opens_what_was_exported(recipe: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    base = lorafx.capture(tiny_checkpoint, task="text-classification", num_labels=3)
    program = learned(lorafx.rewrite(base, RECIPES[recipe]))
    result = lorafx.export(program, tmp_path / "adapter", "peft")
    assert result is not None
    assert result.ok
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    model = hf.AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint, num_labels=3)
    opened = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    assert lorafx.verify(program, opened).ok
