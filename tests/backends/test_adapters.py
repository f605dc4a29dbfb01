"""Every adapter as plain LoRA, and its folder in PEFT's hands."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
import transformers as hf
from torch import fx

import lorafx
from lorafx.backends.plain_lora import as_lora, factors
from lorafx.base import Pass, Promise
from lorafx.errors import ParityError, UsageError
from lorafx.formats.peft import adapter_config
from lorafx.formats.peft_reader import apply_adapter
from lorafx.graph import program as data
from lorafx.graph.edit import Edit
from lorafx.graph.selection import Selection
from lorafx.graph.site import Site
from lorafx.passes.finegates import Finegates
from lorafx.passes.lora import Lora
from lorafx.passes.prilora import Prilora
from lorafx.passes.rose_lora import RoseLora
from lorafx.passes.salora import Salora
from lorafx.passes.tidy import Tidy
from lorafx.passes.tied_lora import TiedLora
from lorafx.public import Program
from tests import zoo
from tests.captures import of_folder
from tests.small import own

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
    torch.manual_seed(0)  # the checkpoint has no head: of random ones, a few put rounding beyond the tolerance
    base = of_folder(tiny_checkpoint, task="text-classification", num_labels=3)
    program = learned(lorafx.rewrite(base, RECIPES[recipe]))
    result = lorafx.export(program, tmp_path / "adapter", "peft")
    assert result is not None
    assert result.ok
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    model = hf.AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint, num_labels=3)
    opened = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    assert lorafx.verify(program, opened).ok


# ---- what is written is what PEFT reads


@pytest.mark.parametrize("model", ["bert", "gpt2", "vit"])
def test_lorafx_reads_an_adapter_as_peft_does(model: str, tmp_path: Path) -> None:
    targets = {"gpt2": ("c_attn", "wte"), "bert": ("query", "word_embeddings"), "vit": ("q_proj", "projection")}
    full = {"gpt2": ("ln_f",), "bert": ("auto", "LayerNorm"), "vit": ("auto",)}
    step = Lora(rank=3, alpha=5.0, targets=targets[model], alpha_pattern={".*1.*": 2.0}, trainable=full[model])
    program = learned(lorafx.rewrite(zoo.captured(model), [step]))
    lorafx.export(program, tmp_path / "adapter", "peft")
    ours = copy.deepcopy(program.source.model).eval()
    apply_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(program.source.model), tmp_path / "adapter").eval()
    assert lorafx.verify(theirs, ours).ok
    assert not lorafx.verify(program.source.model, ours).ok


@pytest.mark.parametrize(("model", "embedding"), [("gpt2", "wte"), ("qwen3", "embed_tokens")])
def test_a_tied_weight_stays_one(model: str, embedding: str, tmp_path: Path) -> None:
    """Trained in full under one of its names, and gates beside it, so that the adapter is made anew as plain LoRA."""
    program = lorafx.rewrite(zoo.captured(model), [Salora(rank=2, targets="*.0.*", trainable=(embedding,))])
    learned(program)
    with torch.no_grad():
        for value in program.trainable().values():
            value.add_(0.1)
    plain = as_lora(program)
    assert plain.learned().keys() - program.learned().keys() <= set(plain.names("adapter"))
    result = lorafx.export(program, tmp_path / "adapter", "peft")
    assert result is not None
    assert result.ok
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(program.source.model), tmp_path / "adapter").eval()
    assert lorafx.verify(program, opened).ok


def test_what_is_written_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = learned(lorafx.rewrite(zoo.captured("bert"), [Lora(rank=2)]))
    writing = import_module("lorafx.backends.writing")
    monkeypatch.setattr(writing, "plain_tensor", lambda value: value.detach().clone() * 1.01)
    with pytest.raises(ParityError, match="peft export differs from the program: logits"):
        lorafx.export(program, tmp_path / "adapter", "peft")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("installed", [True, False])
def test_without_peft_the_adapter_is_compared_too(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not installed:
        monkeypatch.setattr("lorafx.formats.peft_reader.find_spec", lambda name: None)
    program = zoo.randomised(lorafx.rewrite(zoo.captured("gpt2"), [Lora(rank=2, targets=("c_attn", "wte"))]), 0.02)
    result = lorafx.export(program, tmp_path / "adapter", "peft", dtype=torch.float16)
    assert result is not None
    assert result.dtype == torch.float16
    assert result.ok


# ---- what no adapter holds has no adapter_config.json


@dataclass(frozen=True)
class ChangesWeights(Pass):
    """Scale a weight of the base, and insert nothing."""

    promise: ClassVar[Promise] = Promise.SHAPES

    def sites(self, program: data.Program) -> Selection:
        return Selection(("bert.pooler.dense.weight",))  # type: ignore[arg-type]

    def rewrite(self, edit: Edit, site: Any) -> None:
        with torch.no_grad():
            own(edit.program.root, site).mul_(1.5)


@dataclass(frozen=True)
class ChangesTheGraph(ChangesWeights):
    """Scale the logits, and insert no tensor."""

    def sites(self, program: data.Program) -> Selection:
        return Selection(tuple(program.graph.output_node().all_input_nodes))  # type: ignore[arg-type]

    def rewrite(self, edit: Edit, site: Any) -> None:
        with edit.after(site):
            edit.replace(site, edit.call(torch.ops.aten.mul.Tensor, site, 1.5))


@dataclass(frozen=True)
class BendsTheBranch(Lora):
    """LoRA whose result goes through tanh: the tensors are LoRA's, the function is not."""

    def leave(self, edit: Edit, site: Site, delta: fx.Node) -> fx.Node:
        return edit.call(torch.ops.aten.tanh.default, delta)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ([ChangesWeights(), Lora()], "bert.pooler.dense.weight is not as in the base"),
        ([Lora(), ChangesWeights()], "bert.pooler.dense.weight is not as in the base"),
        ([Lora(), ChangesTheGraph()], "computes more than its base with LoRA"),
        ([BendsTheBranch()], "computes more than its base with LoRA"),
        ([Lora()], ""),
        ([Lora(trainable=("pooler",)), Tidy()], ""),
    ],
)
def test_only_plain_lora_gets_an_adapter_config(recipe: list[Any], reason: str) -> None:
    config, said = adapter_config(lorafx.rewrite(zoo.captured("bert"), recipe))
    assert (config is None) == bool(reason)
    assert reason in said
