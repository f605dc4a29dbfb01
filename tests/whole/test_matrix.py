"""Every family of the matrix: captured, trained, adapted, folded and exported, each compared with the eager model."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import onnx
import peft
import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx.graph.tree import named_tensors
from lorafx.passes.lora import Lora
from lorafx.public import Program
from tests import zoo

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
    # Any fixed weighting of all outputs will do for a loss.
    losses = [(value * torch.linspace(-1, 1, value.numel()).view(value.shape)).sum() for value in outputs.values()]
    torch.stack(losses).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {key: value.detach() for key, value in outputs.items()}, gradients


@families
@pytest.mark.parametrize("dropout", [0.0, zoo.DROPOUT])
def test_training_graph_equals_eager_model_in_training(name: str, dropout: float):
    model, graph = zoo.build(name, dropout).train(), zoo.captured(name, dropout).module().train()
    for batch, length in shapes(name, FEW):
        inputs = zoo.ZOO[name].inputs(batch, length)
        (expected, expected_gradients), (actual, gradients) = backward(model, inputs), backward(graph, inputs)
        # Bit by bit, dropout included: same operators in the same order draw the same numbers. Products in the backward
        # pass may sum in another order, as their operands lie in memory: that is rounding.
        assert all(torch.equal(actual[key], expected[key]) for key in expected), (batch, length)
        assert gradients.keys() == expected_gradients.keys()
        for key, gradient in gradients.items():
            largest = expected_gradients[key].abs().max()
            assert (gradient - expected_gradients[key]).abs().max() <= 1e-6 * largest, (key, batch, length)


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
        # Without the 3-D stacks of expert weights, which all-linear leaves out.
        options["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate"]
    return peft.get_peft_model(model, peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, **options)).eval()  # type: ignore[arg-type]


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


@pytest.mark.slow
@families
@pytest.mark.filterwarnings("default")  # the converter's own
def test_onnx_equals_folded(name: str, tmp_path: Path):
    from transformers.exporters.base import ExportedModel

    folded = lorafx.fold(zoo.randomised(lorafx.rewrite(zoo.captured(name), [LORA])))
    lorafx.export(folded, tmp_path / "onnx", format="onnx", provider="cpu")
    for file in (tmp_path / "onnx").glob("*.onnx"):
        onnx.shape_inference.infer_shapes(onnx.load(file), check_type=True, strict_mode=True)  # states what is so
    exported = ExportedModel.from_pretrained(tmp_path / "onnx")
    for batch, length in shapes(name):
        inputs = zoo.ZOO[name].inputs(batch, length)
        # fp32 rounding through other kernels (fused attention, approximated functions), relative to the outputs' scale.
        assert zoo.distance(zoo.run(folded, inputs), zoo.tensors(exported(**inputs))) < 1e-5, (batch, length)


# ---- shared weights


def test_a_shared_block_has_one_adapter_for_all_its_uses():
    program = lorafx.rewrite(zoo.captured("albert"), [LORA])
    modules = [item.module for item in program.history[-1].inserted]
    assert len(modules) == len(set(modules)) == 8
    taken = [site for site in program.history[-1].taken if "ffn " in site]
    assert len(taken) == 2, "the block runs twice"
    (folding,) = (a for a in lorafx.fold(program).history if a.step.pass_name() == "fold-affine")
    assert len(folding.taken) == 8


def names_of_ties(program: Program) -> list[set[str]]:
    groups: dict[int, set[str]] = {}
    for tensor_name, value in named_tensors(program.root):
        groups.setdefault(id(value), set()).add(tensor_name)
    return [names for names in groups.values() if len(names) > 1]


TIES = {
    # Everything tied is read by one adapted module only: the tie has to be broken, whichever side is adapted.
    ("qwen3", "lm_head"): [],
    ("qwen3", "embed_tokens"): [],
    ("qwen3", "embed_tokens,lm_head"): [],
    ("qwen3", "q_proj"): [{"lm_head.weight", "model.embed_tokens.weight"}],
    ("gpt2", "wte"): [],
    ("t5", "lm_head"): [{"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}],
    ("t5", "embed_tokens"): [{"shared.weight", "lm_head.weight"}],
    # Nothing is tied here.
    ("llama", "embed_tokens"): [],
    ("bert", "word_embeddings,position_embeddings"): [],
    ("vit", "projection"): [],
    ("clip-vision", "patch_embedding,position_embedding"): [],
    ("albert", "word_embeddings,embedding_hidden_mapping_in"): [],
}


@pytest.mark.parametrize(("name", "targets"), TIES)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's advice on merging
def test_embeddings_convolutions_and_output_layers(name: str, targets: str):
    base, inputs = zoo.captured(name), zoo.ZOO[name].inputs(5, 33)
    program = zoo.randomised(lorafx.rewrite(base, [Lora(targets=targets, rank=4, alpha=8.0)]))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets.split(","), fan_in_fan_out=name == "gpt2")
    twin = peft.get_peft_model(zoo.build(name), config).eval()  # type: ignore[arg-type]
    for key, value in twin.named_parameters():
        if ".lora_" in key:
            value.data.copy_(program.tensor(key.removeprefix("base_model.model.").replace(".default", "")))
    unfolded = zoo.run(program, inputs)
    # fp32 rounding, as for the linear layers.
    assert zoo.distance(zoo.eager(twin.base_model.model, inputs), unfolded) < 1e-6  # type: ignore[union-attr]

    folded = lorafx.fold(program)
    assert names_of_ties(folded) == TIES[name, targets]
    assert folded.roles.keys() == base.roles.keys()
    tied = bool(names_of_ties(base))
    assert folded.config_changes == ({"tie_word_embeddings": False} if tied and targets != "q_proj" else {})
    wide = zoo.doubled(program)
    wide_inputs = zoo.widened(inputs)
    assert zoo.distance(zoo.run(wide, wide_inputs), zoo.run(lorafx.fold(wide), wide_inputs)) < 1e-12


# ---- activation checkpointing


@pytest.mark.parametrize("name", ["bert", "albert", "llama", "t5", "whisper-encoder"])
def test_checkpointing_changes_no_gradient(name: str):
    program = lorafx.rewrite(zoo.captured(name), [Lora(rank=4, alpha=8.0, dropout=0.1)])
    model = zoo.randomised(program).module().train()
    inputs = zoo.ZOO[name].inputs(2, 7)
    outputs, gradients = backward(model, inputs)
    model.gradient_checkpointing_enable()
    checkpointed_outputs, checkpointed = backward(model, inputs)
    # Bit by bit: the same operators run, and the recomputation draws the same dropout.
    assert all(torch.equal(outputs[key], checkpointed_outputs[key]) for key in outputs)
    assert gradients.keys() == checkpointed.keys()
    assert {"lora_A", "lora_B"} <= {key.split(".")[-2] for key in gradients}
    assert all(torch.equal(gradients[key], checkpointed[key]) for key in gradients)
