"""One adapter a weight: what weights are called, that each has tensors of its own, and how targets name them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

import lorafx
from lorafx.base import Pass
from lorafx.errors import NoSitesError
from lorafx.passes.finegates import Finegates
from lorafx.passes.lora import Lora
from lorafx.passes.prilora import Prilora
from lorafx.passes.rose_lora import RoseLora
from lorafx.passes.salora import Salora
from lorafx.passes.tied_lora import TiedLora
from lorafx.public import Program
from tests.captures import shared
from tests.methods import state_of
from tests.small import captured, gpt2


class Several(nn.Module):
    """Three weights of one shape in one module: its own, another of its own, and a child's that it applies itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.inner = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight) + torch.tanh(functional.linear(x, self.other))
        return y * functional.linear(x, self.inner.weight)


class BothWays(nn.Module):
    """One matrix, (out, in) of one product and (in, out) of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, torch.relu(functional.linear(x, self.w)), self.w)


class Bare(nn.Module):
    """Matrices that the outermost module owns itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.relu(functional.linear(x, self.w)), self.v)


class Attention(nn.Module):
    """A fused projection for one tensor, three for two of different widths."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self.width = width
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=width, vdim=width)

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.width is None else x[..., : self.width]
        return self.attention(x, other, other, need_weights=False)[0]


class Blocks(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


BUILDS: dict[str, tuple[Any, tuple[int, ...], list[str]]] = {
    "several": (
        lambda: Blocks(Several(), Several()),
        (2, 5, 8),
        [f"layers.{n}{name}" for n in (0, 1) for name in ("", ".other", ".inner")],
    ),
    "both ways": (BothWays, (5, 8), ["w", "w_transposed"]),
    "bare": (Bare, (5, 8), ["w", "v"]),
    "attention": (Attention, (2, 5, 8), ["attention", "attention.out_proj"]),
    "attention over 6": (
        lambda: Attention(6),
        (2, 5, 8),
        [f"attention.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj")],
    ),
}


@shared
def captured_module(build: Any, shape: tuple[int, ...]) -> Program:
    torch.manual_seed(0)
    model = build().double().eval()
    return lorafx.capture(model, inputs={"x": torch.randn(*shape, dtype=torch.float64)}, dynamic=False)


def capture(build: Any, shape: tuple[int, ...]) -> Program:
    """The captured module; what is drawn next is the same at each call."""
    program = captured_module(build, shape)
    torch.manual_seed(0)
    return program


def shaken(program: Program) -> Program:
    """Trained values: adapters that do something, gates open, half open and closed."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in program.trainable().items():
            if program.roles[name] == "gate":
                value.uniform_(-0.4, 0.5)
            elif program.roles[name] == "adapter":
                value.normal_()
    return program


def difference(a: Program, b: Program) -> float:
    x = a.example["x"]
    with torch.no_grad():
        want, got = a.module().eval()(x=x), b.module().eval()(x=x)
    return float((want - got).abs().max() / want.abs().max())


@pytest.mark.parametrize("name", BUILDS)
def test_each_weight_has_a_name_and_an_adapter_of_its_own(name: str) -> None:
    build, shape, names = BUILDS[name]
    program = lorafx.rewrite(capture(build, shape), [Lora(rank=2)])
    (applied,) = program.history
    assert [entry.module for entry in applied.inserted] == names
    tensors = [tensor for entry in applied.inserted for tensor in entry.tensors.values()]
    assert len(set(tensors)) == 2 * len(names)
    program.module().train()(x=program.example["x"]).square().sum().backward()
    assert all(program.tensor(tensor).grad is not None for tensor in tensors)


@pytest.mark.parametrize(
    "steps",
    [
        [Lora(rank=2)],
        [Salora(rank=2)],
        [Prilora(rank_first=1, rank_last=2)],
        [RoseLora(rank=2), Finegates(couple=False, allow_empty=True)],
        [Finegates(couple=False, allow_empty=True), Lora(rank=2)],
    ],
    ids=lambda steps: "+".join(step.pass_name() for step in steps),
)
@pytest.mark.parametrize("name", BUILDS)
def test_what_each_weight_learned_folds_into_it(name: str, steps: list[Pass]) -> None:
    build, shape, _ = BUILDS[name]
    program = shaken(lorafx.rewrite(capture(build, shape), steps))
    folded = lorafx.fold(program)
    assert difference(program, folded) < 1e-12
    assert not [node for node in folded.graph.find_nodes(op="get_attr") if folded.roles[node.target] == "adapter"]


def test_merged_by_hand() -> None:
    build, shape, _ = BUILDS["attention"]
    program = shaken(lorafx.rewrite(capture(build, shape), [Lora(rank=2, alpha=6.0)]))
    hand = copy.deepcopy(program.source.model)
    state = dict(hand.named_parameters())
    for entry, weight in zip(program.history[-1].inserted, ("in_proj_weight", "out_proj.weight"), strict=True):
        a, b = (program.tensor(entry.tensors[short]) for short in ("lora_A", "lora_B"))
        state[f"attention.{weight}"].data += 3.0 * b @ a
    x = program.example["x"]
    with torch.no_grad():
        torch.testing.assert_close(lorafx.fold(program).module().eval()(x=x), hand(x), rtol=0, atol=1e-12)


def test_gates_and_statistics_are_a_weights_own() -> None:
    program = capture(*BUILDS["several"][:2])
    gated = state_of(lorafx.rewrite(program, [Finegates(couple=False)]).module())
    assert len({id(site[short]) for site in gated.sites for short in ("gate_in", "gate_out")}) == 12
    pruned = lorafx.rewrite(program, [Prilora(rank_first=1, rank_last=2)]).module()
    pruned.train()(x=program.example["x"])
    power = program.example["x"].float().square().sum((0, 1))
    for site in state_of(pruned).sites[:3]:
        torch.testing.assert_close(site["square_sum"], power)  # seen once, not once for each weight of the module
        assert float(site["token_count"]) == 10


def test_tied_lora_tells_weights_of_one_module_apart() -> None:
    program = lorafx.rewrite(capture(*BUILDS["several"][:2]), [TiedLora(rank=2)])
    sites = {site.module: id(site["lora_A"]) for site in state_of(program.module()).sites}
    assert list(sites) == ["layers.0.other", "layers.0.inner", "layers.1.other", "layers.1.inner"]
    assert sites["layers.0.other"] == sites["layers.1.other"] != sites["layers.0.inner"] == sites["layers.1.inner"]


@pytest.mark.parametrize(
    ("name", "targets", "taken"),
    [
        ("several", "layers.0", ["layers.0", "layers.0.other", "layers.0.inner"]),
        ("several", "other", ["layers.0.other", "layers.1.other"]),
        ("several", "inner", ["layers.0.inner", "layers.1.inner"]),
        ("several", "layers.1.weight", ["layers.1"]),
        ("several", "glob:layers.0", ["layers.0"]),
        ("bare", "v", ["v"]),
        ("attention", "attention", ["attention", "attention.out_proj"]),
        ("attention", "out_proj", ["attention.out_proj"]),
        ("attention", "in_proj_weight", ["attention"]),
        ("attention over 6", "k_proj_weight", ["attention.k_proj_weight"]),
    ],
)
def test_a_weight_answers_to_its_name(name: str, targets: str, taken: list[str]) -> None:
    build, shape, _ = BUILDS[name]
    program = capture(build, shape)
    assert [site.module for site in Lora(targets=targets).sites(program).taken] == taken


def test_ordinary_layers_keep_their_names() -> None:
    """Run folders, recipes and PEFT know them: a layer's path, and for a tied weight each layer's own."""
    model = captured(gpt2)
    sites = model.sites()
    assert all(not site.names for site in sites)
    assert sites[0].module == "transformer.wte"
    assert sites[-1].module == "lm_head"
    assert Lora(targets="wte").sites(model).taken == tuple(s for s in sites if s.module == "transformer.wte")
    one = capture(lambda: Blocks(nn.Linear(8, 8)), (2, 8))
    assert lorafx.rewrite(one, [Lora(rank=2)]).names("adapter") == ["layers.0.lora_A.weight", "layers.0.lora_B.weight"]


def test_a_weight_that_another_module_applies_is_nothing_peft_could_adapt() -> None:
    """PEFT wraps the module that owns it, which never runs."""
    from lorafx.formats.peft import adapter_config

    build, shape, _ = BUILDS["attention"]
    config, reason = adapter_config(lorafx.rewrite(capture(build, shape), [Lora(rank=2, targets="out_proj")]))
    assert config is None
    assert "attention.out_proj" in reason


def test_blocks_are_counted_in_their_own_stack() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    model = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, num_layers=2, num_decoder_layers=4))
    program = lorafx.capture(model)
    last = {site.module.partition(".layer.")[0] for site in Lora(blocks=-1).sites(program).taken}
    assert last == {"encoder.block.1", "decoder.block.3"}
    lasts = {site.module.partition(".layer.")[0] for site in Lora(blocks="-2..-1").sites(program).taken}
    assert lasts == {"encoder.block.0", "encoder.block.1", "decoder.block.2", "decoder.block.3"}


def test_a_module_that_never_runs_is_told_by_what_its_weight_is_used_as() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 1}
    program = lorafx.capture(hf.T5ForConditionalGeneration(hf.T5Config(**sizes)))
    with pytest.raises(NoSitesError) as refused:
        lorafx.rewrite(program, [Lora(targets="shared")])
    said = "target 'shared' matched 0 of "
    assert said in str(refused.value)
    assert "does not run it; its weight is that of encoder.embed_tokens, decoder.embed_tokens" in str(refused.value)
    with pytest.raises(NoSitesError, match="did you mean 'embed_tokens'"):
        lorafx.rewrite(program, [Lora(targets="embed_token")])
