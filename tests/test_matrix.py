"""Every family of the matrix: captured, trained, adapted, folded and exported, each compared with the eager model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo
from torch import Tensor, nn

import lorafx
from lorafx.passes.lora import Lora
from lorafx.program import Program

SHAPES = [(batch, length) for batch in (1, 2, 5) for length in (1, 2, 33)]
FEW = [(2, 7), (1, 1), (5, 33)]
#: alpha / rank is a power of two: scaling by it commutes with rounding, so the branch may be scaled anywhere.
LORA = Lora(rank=4, alpha=8.0)

families = pytest.mark.parametrize("name", zoo.ZOO)


def shapes(name: str, wanted: list[tuple[int, int]] = SHAPES) -> list[tuple[int, int]]:
    """The shapes to try: images and sound have one length."""
    return wanted if zoo.ZOO[name].free_length else [(batch, 7) for batch in dict(wanted)]


@families
def test_evaluation_graph_equals_eager_model(name: str):
    model, graph = zoo.build(name), zoo.captured(name).module().eval()
    for batch, length in shapes(name):
        inputs = zoo.ZOO[name].inputs(batch, length)
        with torch.no_grad():
            actual = zoo.tensors(graph(**inputs))
        expected = zoo.eager(model, inputs)
        # Bit by bit: the graph is made of the very operators the eager model runs.
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in expected), (batch, length)


def backward(model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of a training forward, noise drawn from one seed."""
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        cacheless = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        outputs = zoo.tensors(model(**inputs, **cacheless))
    torch.stack([(value * torch.linspace(-1, 1, value.numel()).view(value.shape)).sum() for value in outputs.values()]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {key: value.detach() for key, value in outputs.items()}, gradients


@families
@pytest.mark.parametrize("dropout", [0.0, zoo.DROPOUT])
def test_training_graph_equals_eager_model_in_training(name: str, dropout: float):
    model, graph = zoo.build(name, dropout).train(), zoo.captured(name, dropout).module().train()
    for batch, length in shapes(name, FEW):
        inputs = zoo.ZOO[name].inputs(batch, length)
        (expected, expected_gradients), (actual, gradients) = backward(model, inputs), backward(graph, inputs)
        # Bit by bit, dropout included: same operators in the same order draw the same numbers.
        assert all(torch.equal(actual[key], expected[key]) for key in expected), (batch, length)
        assert gradients.keys() == expected_gradients.keys()
        assert all(torch.equal(gradients[key], expected_gradients[key]) for key in gradients), (batch, length)


# ---- LoRA


def peft_twin(name: str, program: Program) -> nn.Module:
    """PEFT's LoRA on the same model. PEFT is told of the head where it does not know it by itself."""
    model = zoo.build(name)
    options: dict[str, Any] = {"target_modules": "all-linear", "fan_in_fan_out": name == "gpt2"}
    if name == "distilbert":
        # PEFT takes `pre_classifier` for a part of the head it saves whole, and fails to adapt it.
        options["target_modules"] = [item.module for item in program.history[-1].inserted]
    elif name == "vit":
        options["modules_to_save"] = ["classifier"]
    elif "Sequence" in type(model).__name__:
        options["task_type"] = "SEQ_CLS"
    elif name == "mixtral":
        options["exclude_modules"] = r".*\.experts"  # 3-D stacks of weights: lorafx shows them as misses
    return peft.get_peft_model(model, peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, **options)).eval()  # type: ignore


def peft_values(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's A and B under lorafx's names, after giving every B normal random values."""
    generator = torch.Generator().manual_seed(1)
    values = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            if "lora_B" in name:
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            values[name.removeprefix("base_model.model.").replace(".default", "")] = parameter.detach()
    return values


@families
def test_lora_equals_peft(name: str):
    program = lorafx.rewrite(zoo.captured(name), [LORA])
    twin = peft_twin(name, program)
    adapted = {path for path, module in twin.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert {item.module for item in program.history[-1].inserted} == {
        path.removeprefix("base_model.model.") for path in adapted
    }
    program.load(peft_values(twin))
    for batch, length in shapes(name, FEW):
        inputs = zoo.ZOO[name].inputs(batch, length)
        expected = zoo.eager(twin.base_model.model, inputs)  # type: ignore[arg-type, union-attr]
        # fp32 rounding: both add the same branch, but to different views of the activation.
        assert zoo.distance(expected, zoo.run(program, inputs)) < 1e-6


# ---- fold


@families
def test_folded_equals_unfolded(name: str):
    program = zoo.doubled(zoo.randomised(lorafx.rewrite(zoo.captured(name), [LORA])))
    folded = lorafx.fold(program)
    base = zoo.captured(name)
    assert set(folded.roles) == set(base.roles)
    assert len(list(folded.graph.nodes)) <= len(list(base.graph.nodes))
    for batch, length in shapes(name, FEW):
        inputs = zoo.widened(zoo.ZOO[name].inputs(batch, length))
        unfolded = zoo.run(program, inputs)
        assert zoo.distance(unfolded, zoo.run(folded, inputs)) < 1e-12
        assert zoo.distance(unfolded, zoo.run(zoo.doubled(base), inputs)) > 1e-3, "the adapters do nothing"
