"""Dead sublayers: what gives one vector whatever the input is leaves the graph, and the function is the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx.base import Pass
from lorafx.graph.precision import recast
from lorafx.graph.tree import put_tensor
from lorafx.passes.dead_channels import DeadChannels
from lorafx.passes.dead_sublayers import DeadSublayers
from lorafx.passes.tidy import Tidy
from lorafx.pipeline import run, to_eval
from lorafx.public import Program
from tests import zoo
from tests.passes.test_dead_channels import SEEDS, evaluating

#: What a sublayer ends with, and what it is made of.
SUBLAYERS = {"attn.out": ("attn.query", "attn.key", "attn.value", "attn.qkv"), "ffn.down": ("ffn.up", "ffn.gate")}


def operators(program: Program) -> int:
    return sum(node.op == "call_function" for node in program.graph.nodes)


def ends(program: Program) -> list[Any]:
    """The weights that sublayers end with, one site each."""
    sites = {site.parameter: site for site in program.sites() if site.role in SUBLAYERS}
    return list(sites.values())


def closed(program: Program, seed: int) -> tuple[Program, list[Any]]:
    """A copy with some sublayers closed where they end, and which; with all of a layer's now and then."""
    r = random.Random(seed)
    result, found = program.copy(), ends(program)
    chosen = [site for site in found if r.random() < 0.5] or [r.choice(found)]
    blocks = {site.block for site in chosen if r.random() < 0.3}
    chosen = [site for site in found if site in chosen or site.block in blocks]
    for site in chosen:
        zero = torch.zeros_like(result.tensor(site.parameter))
        put_tensor(result.root, site.parameter, nn.Parameter(zero, requires_grad=False))
    return result, chosen


def taken_out(program: Program, *before: Pass) -> Program:
    sliced = run(program, [*before, DeadSublayers(), Tidy()])
    assert lorafx.verify(program, sliced, dtype=torch.float64).max_rel < 1e-12
    return sliced


def read(program: Program) -> set[str]:
    return {str(node.target) for node in program.graph.find_nodes(op="get_attr") if node.users}


@pytest.mark.parametrize("model", list(zoo.ZOO))
def test_without_a_sublayer_equals_with_a_closed_one(model: str) -> None:
    for seed in range(SEEDS):
        masked, chosen = closed(evaluating(model), seed)
        sliced = taken_out(masked, DeadChannels())
        alive = read(sliced)
        for site in chosen:
            assert site.parameter not in alive
            inner = SUBLAYERS[site.role]
            owner = site.module.rpartition(".")[0].rpartition(".")[0]
            own = {s.parameter for s in masked.sites() if s.role in inner and s.module.startswith(f"{owner}.")}
            beside = {s.parameter for s in ends(masked) if s not in chosen and s.module.startswith(f"{owner}.")}
            assert not own & alive or beside, "nothing is left of it"
        assert operators(sliced) <= operators(masked) - 3 * len(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert", "gpt2", "llama", "t5", "vit"])  # of each kind one; the others take minutes
@pytest.mark.filterwarnings("default")  # the converter's own
def test_onnx_is_without_them_too(model: str, tmp_path: Path) -> None:
    from transformers.exporters.base import ExportedModel

    masked, chosen = closed(recast(evaluating(model), torch.float32), 1)
    counts = {}
    for name, program in (("masked", evaluating(model)), ("sliced", lorafx.fold(masked))):
        lorafx.export(recast(program, torch.float32), tmp_path / name, format="onnx", provider="cpu")
        graphs = [onnx.load(file, load_external_data=False) for file in (tmp_path / name).glob("*.onnx")]
        counts[name] = sum(len(graph.graph.node) for graph in graphs)
    assert counts["sliced"] <= counts["masked"] - len(chosen)
    exported = ExportedModel.from_pretrained(tmp_path / "sliced")
    inputs = zoo.ZOO[model].inputs(2, 7)
    # fp32 rounding through other kernels, relative to the outputs' scale.
    assert zoo.distance(zoo.run(masked, inputs), zoo.tensors(exported(**inputs))) < 1e-5


# ---- by hand


class Block(nn.Module):
    """A residual sublayer, in one of its spellings."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], bias: bool = True, inner: int = 7):
        super().__init__()
        self.norm, self.join = nn.LayerNorm(6), join
        self.up, self.down = nn.Linear(6, inner), nn.Linear(inner, 6, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.down(torch.relu(self.up(self.norm(x)))))


class Stack(nn.Module):
    """Blocks between a linear layer and a norm."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.first, self.layers, self.last = nn.Linear(4, 6), nn.Sequential(*blocks), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.layers(self.first(x)))


def captured(model: nn.Module, *shape: int) -> Program:
    return to_eval(lorafx.capture(model.double().eval(), inputs={"x": torch.randn(*(shape or (3, 5, 4))).double()}))


JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x + f": lambda x, f: x + f,
    "f + x": lambda x, f: f + x,
    "x - f": lambda x, f: x - f,
    "half of f": lambda x, f: torch.add(x, f, alpha=0.5),
    "in place": lambda x, f: x.add_(f),
    "scaled f": lambda x, f: x + 0.5 * f,
    "moved f": lambda x, f: x + f.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("join", JOINS)
def test_a_closed_branch_leaves_a_vector_or_nothing(join: str, bias: bool) -> None:
    torch.manual_seed(0)
    model = Stack(Block(JOINS[join]), Block(JOINS[join], bias))
    nn.init.zeros_(model.layers[1].down.weight)  # type: ignore[union-attr, arg-type]
    masked = captured(model)
    sliced = taken_out(masked, DeadChannels())
    (fact,) = sliced.facts("Taken out")
    assert fact["left"] == ("a vector" if bias else "nothing")
    left = [name.rpartition(".")[2] for name in read(sliced) if name.startswith("layers.1.")]
    assert left == (["constant"] if bias else [])
    assert not [name for name, _ in sliced.root.named_parameters() if name.startswith("layers.1.")]


@pytest.mark.parametrize("before", [(), (DeadChannels(),)], ids=["whole", "narrow"])
@pytest.mark.parametrize("how", ["rows", "neurons", "zero neurons", "scale", "sandwich"])
def test_whatever_closed_it(how: str, before: tuple[Pass, ...]) -> None:
    class Scaled(Block):
        def __init__(self) -> None:
            super().__init__(lambda x, f: x + f)
            self.scale, self.after = nn.Parameter(torch.ones(6)), nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.down(torch.relu(self.up(self.norm(x))))
            return x + self.scale * (self.after(h) if how == "sandwich" else h)

    torch.manual_seed(0)
    model = Stack(Scaled(), Scaled())
    block: Any = model.layers[0]
    with torch.no_grad():
        if how in ("rows", "sandwich"):
            block.down.weight.zero_()
        elif "neurons" in how:
            block.up.weight.zero_()
            if how == "zero neurons":
                block.up.bias.fill_(-1)
        else:
            block.scale.zero_()
    sliced = taken_out(captured(model), *before)
    assert [fact["left"] for fact in sliced.facts("Taken out")] == ["nothing" if how == "scale" else "a vector"]
    assert not [name for name in read(sliced) if name.startswith("layers.0.") and not name.endswith("constant")]


def test_a_whole_layer_goes_one_branch_inside_another() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = Block(JOINS["x + f"]), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.out(self.inner(x))

    torch.manual_seed(0)
    model = Stack(Nested(), Block(JOINS["x + f"]))
    for part in (model.layers[0].out, model.layers[0].inner.down):  # type: ignore[union-attr]
        nn.init.zeros_(part.weight)  # type: ignore[union-attr, arg-type]
    sliced = taken_out(captured(model))
    assert [fact["module"] for fact in sliced.facts("Taken out")] == ["layers.0.out"]


def test_what_something_else_reads_stays() -> None:
    class Weights(nn.Module):
        """Attention whose weights are an output."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            weights = (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1)
            return x + self.out(weights @ self.v(x)), weights

    torch.manual_seed(0)
    model = Weights()
    nn.init.zeros_(model.out.weight)
    sliced = taken_out(captured(model, 3, 5, 6), DeadChannels())
    assert {name for name in read(sliced) if name.endswith("weight")} == {"q.weight", "k.weight"}


def test_an_output_is_no_input_in_disguise() -> None:
    torch.manual_seed(0)
    block = Block(JOINS["x + f"], bias=False)
    nn.init.zeros_(block.down.weight)
    sliced = taken_out(captured(block, 3, 5, 6), DeadChannels())
    x = torch.randn(3, 5, 6).double()
    result = sliced.module().eval()(x=x)
    assert torch.equal(result, x)
    assert result.data_ptr() != x.data_ptr()


class Refused(nn.Module):
    """Sums of which no addend may be left out."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.line = kind, nn.Linear(6, 6, bias=False)
        self.place = nn.Parameter(torch.randn(5, 6))
        nn.init.zeros_(self.line.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "the sum has its shape":
            return torch.tanh(self.place + self.line(x))
        return torch.tanh(x * self.line(x).exp() + x)


@pytest.mark.parametrize("kind", ["the sum has its shape", "no sum of it"])
def test_it_fails_closed(kind: str) -> None:
    torch.manual_seed(0)
    sliced = taken_out(captured(Refused(kind), 3, 5, 6), DeadChannels())
    assert not sliced.facts("Taken out")
    assert "line.weight" in read(sliced)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_keeps_its_dtype(dtype: torch.dtype) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.line = nn.Linear(6, 6, dtype=dtype), nn.Linear(6, 6, bias=False)
            nn.init.zeros_(self.line.weight)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x.to(dtype))
            return torch.tanh(h + self.line(h.float()))

    torch.manual_seed(0)
    program = to_eval(lorafx.capture(Mixed().eval(), inputs={"x": torch.randn(3, 5, 6)}))
    sliced = run(program, [DeadSublayers()])
    assert sliced.facts("Taken out")
    x = torch.randn(4, 5, 6)
    before, after = program.module().eval()(x=x), sliced.module().eval()(x=x)
    assert before.dtype == after.dtype == torch.float32
    assert torch.equal(before, after)


def test_a_rule_that_is_wrong_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafx.channels import branches

    torch.manual_seed(0)
    program = captured(Stack(Block(JOINS["x + f"]), Block(JOINS["x + f"])))
    monkeypatch.setattr(branches, "_may_have", lambda program: True)
    right = branches.ConstantChannels.vector

    def wrong(self: Any, node: Any) -> Any:
        return torch.zeros(1, 1, 6).numpy() if "layers_0_down_weight" in str(node.args) else right(self, node)

    monkeypatch.setattr(branches.ConstantChannels, "vector", wrong)
    found = DeadSublayers().sites(program)
    assert not found.taken
    assert ["please report this model" in miss.reason for miss in found.missed] == [True]


def test_a_training_graph_is_left_alone() -> None:
    assert DeadSublayers().sites(closed(zoo.captured("bert"), 0)[0]).taken == ()
