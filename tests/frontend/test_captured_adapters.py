"""Models captured with another library's adapters inside: what folds, under which names, and what stays the base's."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

import lorafx
from lorafx.frontend.tuners import adapter_tensors
from lorafx.graph.tree import named_tensors
from lorafx.passes.fold_constants import FoldConstants
from lorafx.passes.lora import Lora
from lorafx.pipeline import run, to_eval
from lorafx.public import Program
from tests import zoo


def adapted(model: nn.Module, config: peft.PeftConfig) -> nn.Module:
    """``model`` with adapters inside, as if trained."""
    torch.manual_seed(1)
    result: Any = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in (p for p in result.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return result.eval()


def folded(model: nn.Module, inputs: dict[str, Any]) -> Program:
    """The model without PEFT's wrapper, captured and folded; still the same function."""
    inner: Any = model.base_model.model  # type: ignore[union-attr]
    program = lorafx.capture(inner, inputs=inputs)
    assert not program.names("adapter"), "what a model came with keeps its roles"
    result = lorafx.fold(program)
    assert zoo.distance(zoo.eager(inner, inputs), zoo.run(result, inputs)) < 1e-5
    return result


def read(program: Program) -> set[str]:
    return {str(node.target) for node in program.graph.find_nodes(op="get_attr")}


LAYERS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
KINDS: dict[str, Callable[[], peft.PeftConfig]] = {
    "oft": lambda: peft.OFTConfig(oft_block_size=8, init_weights=False, **LAYERS),
    "oft-cayley": lambda: peft.OFTConfig(oft_block_size=8, use_cayley_neumann=False, init_weights=False, **LAYERS),
    "oft-shared": lambda: peft.OFTConfig(oft_block_size=8, block_share=True, init_weights=False, **LAYERS),
    "road": lambda: peft.RoadConfig(variant="road_1", group_size=8, init_weights=False, **LAYERS),
    "miss": lambda: peft.MissConfig(r=4, init_weights=False, **LAYERS),
    "gralora": lambda: peft.GraloraConfig(r=4, gralora_k=2, init_weights=False, **LAYERS),
    "c3a": lambda: peft.C3AConfig(block_size=8, init_weights=False, **LAYERS),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=20, init_weights=False, **LAYERS),
    "delora": lambda: peft.DeloraConfig(r=4, init_weights=False, **LAYERS),
    "glora": lambda: peft.GloraConfig(r=4, **LAYERS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_an_adapter_is_read_after_the_fold(kind: str) -> None:
    model: Any = adapted(zoo.build("llama"), KINDS[kind]())
    result = folded(model, zoo.ZOO["llama"].inputs(2, 7))
    assert not read(result) & result.source.adapters
    assert not result.names("adapter")
    merged = model.merge_and_unload().state_dict()
    for name in read(result) & {name.replace(".weight", ".base_layer.weight") for name in merged}:
        torch.testing.assert_close(result.tensor(name), merged[name.replace(".base_layer", "")], rtol=1e-4, atol=1e-5)


class Words(nn.Module):
    """An embedding and an output layer, tied or not."""

    def __init__(self, tied: bool):
        super().__init__()
        self.table, self.out = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table(x).tanh())


class Rows(nn.Module):
    """Some rows of a layer's weight replaced, as trainable tokens are."""

    def __init__(self, layer: nn.Module, rows: nn.Parameter) -> None:
        super().__init__()
        self.layer, self.rows = layer, rows

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.layer.weight
        weight = weight.index_copy(0, torch.tensor([3, 7]), self.rows.to(weight.device, weight.dtype))
        return functional.embedding(x, weight) if isinstance(self.layer, nn.Embedding) else functional.linear(x, weight)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_trained_rows_of_a_table(tied: bool) -> None:
    torch.manual_seed(0)
    model = Words(tied)
    rows = nn.Parameter(torch.randn(2, 6))
    model.table = Rows(model.table, rows)  # type: ignore[assignment]
    if tied:
        model.out = Rows(model.out, rows)  # type: ignore[assignment]
    theirs = frozenset(name for name, _ in named_tensors(model) if name.endswith("rows"))
    ids = torch.randint(0, 11, (2, 5))
    program = lorafx.capture(model.eval(), inputs={"x": ids})
    program = dataclasses.replace(program, source=dataclasses.replace(program.source, adapters=theirs))
    result = lorafx.fold(program)
    assert zoo.distance(zoo.run(program, {"x": ids}), zoo.run(result, {"x": ids})) == 0
    kept = {"table.layer.weight", "out.layer.weight" if tied else "out.weight"}
    assert set(result.roles) == kept
    assert len({id(result.tensor(name)) for name in kept}) == (1 if tied else 2)
    assert torch.equal(result.tensor("table.layer.weight")[[3, 7]], rows)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_trainable_tokens(tied: bool) -> None:
    config = hf.LlamaConfig(
        vocab_size=zoo.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=1,
    )  # fmt: skip
    tokens = {"embed_tokens": [3, 7]} if tied else {"embed_tokens": [3, 7], "lm_head": [2]}
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=tokens, init_lora_weights=False)
    result = folded(adapted(hf.LlamaForCausalLM(config), lora), zoo.text(2, 7))
    assert not read(result) & result.source.adapters
    tables = [name for name in result.roles if name.endswith("token_adapter.base_layer.weight")]
    assert len(tables) == 2
    assert len({id(result.tensor(name)) for name in tables}) == (1 if tied else 2)
    assert "tie_word_embeddings" not in result.config_changes


# ---- what is the base's


class Parametrised(nn.Module):
    """A weight of a direction and a length, a norm around one, factorised layers: the base model's own affairs."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.gain = nn.Parameter(torch.randn(8))
        self.down, self.up, self.out = nn.Linear(8, 2), nn.Linear(2, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.layer_norm(self.normed(x), (8,)) * (1 + self.gain)
        return self.out(self.up(self.down(x)).tanh()).tanh()


@pytest.mark.parametrize("target", ["out", "normed", "down"])
@pytest.mark.parametrize("method", ["lora", "oft"])
def test_the_base_model_keeps_its_parametrisation(method: str, target: str) -> None:
    torch.manual_seed(0)
    base, x = Parametrised(), {"x": torch.randn(2, 5, 8)}
    before = to_eval(lorafx.capture(base, inputs=x))
    values = {name: value.clone() for name, value in base.state_dict().items()}
    configs = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=[target], init_weights=False),
    }
    result = folded(adapted(base, configs[method]()), x)
    at = {name: name.replace(f"{target}.", f"{target}.base_layer.", 1) for name in values}
    changed = {name for name, value in values.items() if not torch.equal(result.tensor(at[name]), value)}
    if target == "normed":  # no weight of one tensor is there to take the adapter
        assert not changed
    else:
        assert changed == {f"{target}.weight"}
        graphs = [[node.target for node in p.graph.nodes if node.op == "call_function"] for p in (result, before)]
        assert [op for op in graphs[0] if op != torch.ops.aten.to.dtype] == graphs[1]


class Held(nn.Module):
    """Constants that no module registers: one scales what a layer reads, one goes through the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.held = nn.Linear(8, 8), [torch.rand(8), torch.randn(3, 8)]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.held[0]) @ self.layer(self.held[1]).t()


def test_constants_of_the_base_are_not_its_adapter_s() -> None:
    """The layer's own code reads both first, in part."""
    torch.manual_seed(0)
    config = peft.OFTConfig(oft_block_size=4, target_modules=["layer"], init_weights=False)
    result = folded(adapted(Held(), config), {"x": torch.randn(2, 8)})
    assert not any("lifted" in name for name in result.source.adapters)
    targets = [node.target for node in result.graph.nodes]
    assert torch.ops.aten.mul.Tensor in targets
    assert targets.count(torch.ops.aten.linear.default) == 2


def test_a_weight_of_several_tensors_is_kept_under_none_of_their_names() -> None:
    """A mask on a weight norm's product: it is neither the direction nor the length."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.length, self.direction = nn.Parameter(torch.rand(8, 1)), nn.Parameter(torch.randn(8, 8))
            self.lora = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.length * functional.normalize(self.direction) + self.lora)

    program = lorafx.capture(Masked(), inputs={"x": torch.randn(2, 8)})
    program.roles["lora"] = "adapter"
    assert set(lorafx.fold(program).roles) == {"lora"}


def test_a_constant_made_of_what_is_read_on_keeps_it() -> None:
    """An inner value that something else reads, too: what it is made of must keep its name and its value."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            opened = self.theta.sigmoid()
            return x * (2 * opened) + x.tanh() * opened.sum()

    program = lorafx.capture(Twice(), inputs={"x": torch.randn(2, 8)})
    program.roles["theta"] = "gate"
    result = run(to_eval(program), [FoldConstants()])
    assert zoo.distance(zoo.run(program, program.example), zoo.run(result, program.example)) == 0
    assert all(node.target != torch.ops.aten.sigmoid.default for node in result.graph.nodes)


def test_the_names_of_adapters() -> None:
    base = zoo.build("llama")
    assert adapter_tensors(base) == frozenset()
    model = adapted(base, KINDS["oft"]())
    names = adapter_tensors(model)
    assert names == {name for name, _ in named_tensors(model) if ".oft_R." in name}


def test_shared_tensors_count_by_all_their_names() -> None:
    model = adapted(zoo.build("llama"), peft.VeraConfig(r=4, target_modules=["q_proj"], init_weights=False))
    names = adapter_tensors(model)
    assert {"base_model.vera_A.default", "base_model.model.model.layers.0.self_attn.q_proj.vera_A.default"} <= names
    assert not any(".base_layer." in name or "norm" in name for name in names)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(zoo.build("llama"), KINDS["oft"]())
    monkeypatch.delitem(sys.modules, "peft.tuners.tuners_utils")
    assert adapter_tensors(model) == frozenset()


def test_a_method_on_top_of_captured_adapters() -> None:
    model = adapted(zoo.build("llama"), KINDS["oft"]())
    inner: Any = model.base_model.model  # type: ignore[union-attr]
    program = lorafx.capture(inner, inputs=zoo.ZOO["llama"].inputs(2, 7))
    both = zoo.randomised(lorafx.rewrite(program, [Lora(targets=("q_proj.base_layer", "o_proj"), rank=2)]))
    result = lorafx.fold(both)
    assert zoo.distance(zoo.run(both, both.example), zoo.run(result, both.example)) < 1e-5
    assert not read(result) & result.source.adapters
    assert not result.names("adapter")
