"""Folding: the algebra of affine regions, what folds and what stays, names, ties and rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lorafx
from lorafx.base import Method, Promise
from lorafx.graph.edit import Edit
from lorafx.graph.site import Site
from lorafx.passes.lora import Lora
from lorafx.pipeline import to_eval
from lorafx.public import Program
from tests import zoo

aten = torch.ops.aten


def program_of(module: nn.Module, *shape: int, dtype: torch.dtype = torch.float64, **inputs: Tensor) -> Program:
    """A plain module as a program; its input ``x`` is normal random numbers of ``shape`` unless given."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return lorafx.capture(module.to(dtype), inputs=inputs or {"x": x.to(dtype)})


def assert_same(a: Program, b: Program, tolerance: float = 1e-12):
    """Equal outputs on the example and on a batch of another size."""
    for repeat in (1, 2):
        inputs = {name: value.repeat(repeat, *[1] * (value.dim() - 1)) for name, value in a.example.items()}
        # fp64 by default, where composing a few factors costs some units in the sixteenth place.
        assert zoo.distance(zoo.run(a, inputs), zoo.run(b, inputs)) < tolerance


def operators(program: Program) -> list[str]:
    """The operators of the graph, by name."""
    return [str(node.target).removeprefix("aten.") for node in program.graph.nodes if node.op == "call_function"]


def lora(program: Program, **options: Any) -> Program:
    """With LoRA of rank 2 that does something."""
    return zoo.randomised(lorafx.rewrite(program, [Lora(**{"rank": 2, "alpha": 3.0, **options})]))


@dataclass(frozen=True)
class Gates(Method):
    """Multiply each linear's input and output by trainable gates, as third-party passes may do.

    Before: ``y = W x + b``
    After: ``y = tanh(r) ⊙ (W (tanh(c) ⊙ x) + b)``
    """

    promise: ClassVar[Promise] = Promise.SHAPES

    def rewrite(self, edit: Edit, site: Site) -> None:
        columns = edit.parameter(site, "columns", (site.in_features,), nn.init.normal_, role="gate")
        rows = edit.parameter(site, "rows", (site.out_features,), nn.init.normal_, role="gate")
        before = site.node.prev
        with edit.after(before):
            opened = edit.call(aten.mul.Tensor, site.input, edit.call(aten.tanh.default, columns))
            site.node.update_arg(site.op.input, opened)
        with edit.after(site.node):
            edit.replace(site.node, edit.call(aten.mul.Tensor, edit.call(aten.tanh.default, rows), site.node))

    def finish(self, edit: Edit) -> None:
        edit.freeze()


# ---- what folds


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.wide = nn.Conv2d(8, 6, 3, padding=1, dilation=1, bias=False)
        self.point = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.point(self.wide(self.patches(x).relu()).relu())


def test_convolutions():
    base = program_of(Convolutions(), 2, 3, 16, 16)
    program = lora(base, targets=("patches", "wide", "point"))
    folded = lorafx.fold(program)
    assert_same(program, folded)
    assert operators(folded) == ["conv2d.default", "relu.default", "conv2d.default", "relu.default", "conv2d.default"]
    assert folded.roles == base.roles


class Adapted(nn.Module):
    """A convolution between factors a channel, with a low-rank update in as many groups."""

    def __init__(self, dims: int, groups: int, ungrouped: bool = False):
        super().__init__()
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        options: dict[str, Any] = {"padding": 1, "stride": 2, "bias": False}
        self.base = layer(4, 6, 3, padding=1, stride=2, groups=groups)
        self.lora_down = layer(4, 2, 3, groups=groups, **options)
        self.lora_up = layer(2, 6, 1, groups=1 if ungrouped else groups, bias=False)
        shape = [1] * dims
        self.lora_in = nn.Parameter(torch.ones(1, 4, *shape))
        self.lora_out = nn.Parameter(torch.ones(1, 6, *shape))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.lora_in
        return (self.base(x) + 0.5 * self.lora_up(self.lora_down(x))) * self.lora_out


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_any_kind(dims: int, groups: int):
    program = program_of(Adapted(dims, groups), 3, 4, *[5] * dims)
    program.roles.update({name: "adapter" for name in program.roles if name.startswith("lora")})
    folded = lorafx.fold(program)
    assert_same(program, folded, tolerance=1e-10)
    assert operators(folded) == [f"conv{dims}d.default"]
    assert set(folded.roles) == {"base.weight", "base.bias"}
    assert folded.tensor("base.weight").shape == program.tensor("base.weight").shape


def test_a_grouped_convolution_takes_no_update_across_its_groups():
    program = program_of(Adapted(2, 2, ungrouped=True), 3, 4, 5, 5)
    program.roles.update({name: "adapter" for name in program.roles if name.startswith("lora_")})
    folded = lorafx.fold(program)
    assert_same(program, folded, tolerance=1e-10)
    assert operators(folded).count("conv2d.default") > 1


def test_an_image_without_a_batch_has_its_channels_first():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.lora = nn.Conv2d(4, 4, 1), nn.Parameter(torch.ones(4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x * self.lora)  # a factor a row, not a channel

    program = lorafx.capture(Single().double(), inputs={"x": torch.randn(4, 4, 4).double()}, dynamic=False)
    program.roles["lora"] = "adapter"
    with torch.no_grad():
        program.tensor("lora").copy_(torch.arange(4.0)[:, None])
    folded = lorafx.fold(program)
    assert zoo.distance(zoo.run(program, program.example), zoo.run(folded, program.example)) < 1e-12
    assert operators(folded)[-1] == "conv2d.default"
    assert len(operators(folded)) == 2


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=0)
        self.out = nn.Linear(6, 11, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table(x).tanh())


def test_embedding():
    ids = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))
    program = lora(program_of(Embedding(), x=ids), targets=("table", "out"))
    folded = lorafx.fold(program)
    assert_same(program, folded)
    assert operators(folded) == ["embedding.default", "tanh.default", "linear.default"]


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is stored (in, out), the bias always there."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6, 4))
        self.bias = nn.Parameter(torch.empty(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, 6), self.weight).view(*x.shape[:-1], 4)


class Holder(nn.Module):
    """A model with one layer, called ``layer``."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_addmm():
    program = lora(program_of(Holder(Conv1D()), 2, 5, 6))
    folded = lorafx.fold(program)
    assert_same(program, folded)
    assert "linear.default" not in operators(folded)
    assert set(folded.roles) == {"layer.weight", "layer.bias"}


def test_gates_on_both_sides():
    program = lorafx.rewrite(program_of(Holder(nn.Linear(6, 4)), 2, 6), [Gates()])
    folded = lorafx.fold(program)
    assert_same(program, folded)
    assert operators(folded) == ["linear.default"]
    rows, columns = (program.tensor(f"layer.{name}").tanh() for name in ("rows", "columns"))
    weight, bias = program.tensor("layer.weight"), program.tensor("layer.bias")
    torch.testing.assert_close(folded.tensor("layer.weight"), rows[:, None] * weight * columns, rtol=1e-14, atol=0)
    torch.testing.assert_close(folded.tensor("layer.bias"), rows * bias, rtol=1e-14, atol=0)


@pytest.mark.parametrize("first", ["lora", "gates"])
def test_methods_fold_together(first: str):
    steps = [Lora(rank=2), Gates()] if first == "lora" else [Gates(), Lora(rank=2)]
    base = program_of(Holder(nn.Linear(6, 4, bias=False)), 2, 5, 6)
    for step in steps:
        base = lorafx.rewrite(base, [step])
    program = zoo.randomised(base)
    folded = lorafx.fold(program)
    assert_same(program, folded)
    assert operators(folded) == ["linear.default"]
    assert set(folded.roles) == {"layer.weight"}


def test_two_adapters_on_one_weight():
    once = lora(program_of(Holder(nn.Linear(6, 4)), 2, 6))
    program = zoo.randomised(lorafx.rewrite(once, [Lora(rank=3)]))
    assert set(program.names("adapter")) >= {"layer.lora_A.weight", "layer.lora_A_2.weight"}
    folded = lorafx.fold(program)
    assert_same(program, folded)
    assert operators(folded) == ["linear.default"]


@dataclass(frozen=True)
class Lengths(Method):
    """Rescale what a weight gives without its bias, as a method does whose formula says it so (DoRA)."""

    promise: ClassVar[Promise] = Promise.SHAPES

    def rewrite(self, edit: Edit, site: Site) -> None:
        assert site.bias is not None
        with edit.after(site.node):
            lengths = edit.parameter(site, "lengths", (site.out_features,), nn.init.normal_)
            bare = edit.call(aten.sub.Tensor, site.node, site.bias)
            scaled = edit.call(aten.mul.Tensor, bare, lengths)
            edit.replace(site.node, edit.call(aten.add.Tensor, scaled, site.bias))


@pytest.mark.parametrize("layer", ["linear", "addmm"])
def test_a_bias_that_is_taken_off_and_put_back_stays_one(layer: str):
    base = program_of(Holder(nn.Linear(6, 4) if layer == "linear" else Conv1D()), 2, 5, 6)
    program = zoo.randomised(lorafx.rewrite(base, [Lengths()]))
    folded = lorafx.fold(program)
    assert_same(program, folded)
    assert "add.Tensor" not in operators(folded)
    assert set(folded.roles) == {"layer.weight", "layer.bias"}


def test_a_rank_as_large_as_the_layer():
    """Then B folds into A as well as both into W, and scaling must count once."""
    program = lora(program_of(Holder(nn.Linear(6, 2)), 2, 6))
    folded = lorafx.fold(program)
    assert_same(program, folded)
    assert set(folded.roles) == {"layer.weight", "layer.bias"}


def test_a_bias_appears_where_an_offset_needs_one():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Linear(6, 2), nn.Linear(2, 6)
            self.base = nn.Linear(6, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    program = program_of(Shifted(), 2, 6)
    folded = lorafx.fold(program)
    assert_same(program, folded)
    assert set(folded.roles) == {"base.weight", "base.bias"}


def test_a_mask_on_a_weight():
    @dataclass(frozen=True)
    class Mask(Method):
        promise: ClassVar[Promise] = Promise.SHAPES

        def rewrite(self, edit: Edit, site: Site) -> None:
            weight = edit.tensor(site.parameter)
            mask = edit.parameter(site, "mask", tuple(edit.program.tensor(site.parameter).shape), nn.init.normal_)
            with edit.after(site.node.prev):
                masked = edit.call(aten.mul.Tensor, weight, edit.call(aten.sigmoid.default, mask))
                site.node.update_arg(site.op.weight, masked)

    program = lorafx.rewrite(program_of(Holder(nn.Linear(6, 4)), 2, 6), [Mask()])
    folded = lorafx.fold(program)
    # Constant folding runs the graph's own operators: bit by bit.
    assert_same(program, folded, tolerance=1e-300)
    assert set(folded.roles) == {"layer.weight", "layer.bias"}
    assert operators(folded) == ["linear.default"]


# ---- what stays


def test_an_adapter_of_one_factor_leaves_the_weight_to_the_base():
    """Both sides of the sum apply a weight of the result's size; the base's takes it, wherever it stands."""

    class Full(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.lora = nn.Linear(6, 4), nn.Linear(6, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.lora(x) + self.base(x).clone()

    program = program_of(Full(), 2, 6)
    program.roles["lora.weight"] = "adapter"
    program = dataclasses.replace(
        program, source=dataclasses.replace(program.source, adapters=frozenset(["lora.weight"]))
    )
    folded = lorafx.fold(program)
    assert_same(program, folded)
    assert set(folded.roles) == {"base.weight", "base.bias"}


def test_an_adapter_whose_inner_value_is_read_elsewhere_stays():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.down, self.up = nn.Linear(6, 6), nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            inner = self.down(x)
            return self.base(x) + self.up(inner), inner

    program = program_of(Read(), 2, 6)
    folded = lorafx.fold(program)
    assert_same(program, folded, tolerance=1e-300)
    assert operators(folded) == operators(program)


class Factorised(nn.Module):
    """A small table and a projection, as ALBERT has; and a chain of two linears through a narrow one."""

    def __init__(self):
        super().__init__()
        self.table, self.wide = nn.Embedding(20, 3), nn.Linear(3, 6)
        self.down, self.up = nn.Linear(6, 2), nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(self.wide(self.table(x))))


def test_factorised_layers_stay():
    ids = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    program = program_of(Factorised(), x=ids)
    folded = lorafx.fold(program)
    assert operators(folded) == operators(program)
    adapted = lora(program, targets=("table", "wide", "down", "up"))
    refolded = lorafx.fold(adapted)
    assert_same(adapted, refolded)
    assert operators(refolded) == operators(program)
    assert refolded.roles == program.roles


class Scaled(nn.Module):
    """A query scaled by a number, a layer scale by a vector, and a bias of its own: the base model's business."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.out = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.scale, self.shift = nn.Parameter(torch.empty(6)), nn.Parameter(torch.empty(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (self.out((self.q_proj(x) * 0.125).tanh()) + self.shift)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_base_model_keeps_its_own_scales(adapted: bool):
    base = program_of(Scaled(), 2, 6)
    program = lora(base, targets=("q_proj", "out")) if adapted else base
    folded = lorafx.fold(program)
    assert_same(program, folded)
    assert operators(folded) == operators(base)
    unchanged = ["scale", "shift", "q_proj.bias"] + ([] if adapted else ["q_proj.weight", "out.weight"])
    assert all(torch.equal(folded.tensor(name), base.tensor(name)) for name in unchanged)
    assert folded.roles == base.roles


def test_values_written_in_place_meanwhile_are_not_folded():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.down, self.up = nn.Linear(6, 6), nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = x.tanh()
            first = self.base(x)
            x[:, :2].add_(1.0)
            return first + self.up(self.down(x))

    program = program_of(Written(), 2, 6)
    assert_same(program, lorafx.fold(program), tolerance=1e-300)


def test_one_of_two_uses_adapted_breaks_the_tie_by_name():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh())

    base = program_of(Twice(), 2, 6)
    for target in ("first", "second"):
        program = lora(base, targets=target)
        folded = lorafx.fold(program)
        assert_same(program, folded)
        assert folded.roles == base.roles
        other = "second" if target == "first" else "first"
        assert torch.equal(folded.tensor(f"{other}.weight"), base.tensor("first.weight"))
        assert not torch.equal(folded.tensor(f"{target}.weight"), base.tensor("first.weight"))
    both = lora(base, targets=("first", "second"))
    assert_same(both, lorafx.fold(both))


def test_a_module_used_twice_folds_once():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())

    program = lora(program_of(Again(), 2, 6))
    folded = lorafx.fold(program)
    assert_same(program, folded)
    assert operators(folded) == ["linear.default", "tanh.default", "linear.default"]
    assert set(folded.roles) == {"layer.weight", "layer.bias"}


# ---- rounding and purity


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype):
    program = lora(program_of(Holder(nn.Linear(24, 16)), 2, 24, dtype=dtype))
    assert {program.tensor(name).dtype for name in program.names("adapter")} == {torch.float32}
    folded = lorafx.fold(program)
    exact = [program.tensor(f"layer.{name}.weight").detach().double() for name in ("lora_B", "lora_A")]
    wanted = program.tensor("layer.weight").double() + 1.5 * exact[0] @ exact[1]
    assert folded.tensor("layer.weight").dtype == dtype
    assert torch.equal(folded.tensor("layer.weight"), wanted.to(dtype))


def test_two_adapters_in_half_precision_round_once():
    once = lora(program_of(Holder(nn.Linear(24, 16)), 2, 24, dtype=torch.bfloat16))
    program = zoo.randomised(lorafx.rewrite(once, [Lora(rank=3, alpha=3.0)]))
    wanted = program.tensor("layer.weight").double()
    for suffix, scale in (("", 1.5), ("_2", 1.0)):
        b, a = (program.tensor(f"layer.lora_{side}{suffix}.weight").detach().double() for side in "BA")
        wanted = wanted + scale * b @ a
    assert torch.equal(lorafx.fold(program).tensor("layer.weight"), wanted.bfloat16())


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "qwen3"])
def test_folding_again_changes_nothing(name: str):
    folded = lorafx.fold(zoo.randomised(lorafx.rewrite(zoo.captured(name), [Lora(rank=4)])))
    again = lorafx.fold(folded)
    assert operators(again) == operators(folded)
    assert again.roles == folded.roles
    assert all(again.tensor(key).data_ptr() == folded.tensor(key).data_ptr() for key in folded.roles)


@pytest.mark.parametrize("name", ["bert", "albert", "gpt2", "llama", "deberta-v2", "clip-vision"])
def test_a_base_without_adapters_is_left_alone(name: str):
    base = zoo.captured(name)
    folded = lorafx.fold(base)
    assert folded.roles == base.roles
    assert all(folded.tensor(key).data_ptr() == base.tensor(key).data_ptr() for key in base.roles)


def test_the_program_before_is_unchanged():
    program = zoo.randomised(lorafx.rewrite(zoo.captured("bert"), [Lora(rank=4)]))
    before = str(program.graph), dict(program.roles)
    values = {name: program.tensor(name).detach().clone() for name in program.roles}
    lorafx.fold(program)
    assert (str(program.graph), program.roles) == before
    assert all(torch.equal(program.tensor(name), value) for name, value in values.items())
    assert not zoo.captured("bert").names("adapter")


# ---- models with another library's adapters inside

PEFT: dict[str, tuple[str, Callable[[], peft.PeftConfig]]] = {
    "lora": ("bert", lambda: peft.LoraConfig(r=4, target_modules=["query", "dense", "word_embeddings"])),
    "lora-conv1d": ("gpt2", lambda: peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "lora-conv2d": ("clip-vision", lambda: peft.LoraConfig(r=4, target_modules=["patch_embedding", "q_proj"])),
    "lora-positions": ("deberta-v2", lambda: peft.LoraConfig(r=4, target_modules=["query_proj", "key_proj"])),
    "rslora-shared": ("albert", lambda: peft.LoraConfig(r=4, target_modules=["query", "ffn"], use_rslora=True)),
    "dora": ("bert", lambda: peft.LoraConfig(r=4, target_modules=["query", "value"], use_dora=True)),
    "dora-shared": ("albert", lambda: peft.LoraConfig(r=4, target_modules=["query"], use_dora=True)),
    "adalora": ("bert", lambda: peft.AdaLoraConfig(init_r=4, target_modules=["query"], total_step=10)),
    "ia3": (
        "bert",
        lambda: peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]),
    ),
    "loha": ("bert", lambda: peft.LoHaConfig(r=4, target_modules=["query"])),
    "lokr": ("bert", lambda: peft.LoKrConfig(r=4, target_modules=["query"])),
    "vera": ("bert", lambda: peft.VeraConfig(r=4, target_modules=["query"])),
}


@pytest.mark.parametrize("method", PEFT)
def test_captured_adapters_of_peft_fold_to_its_merged_weights(method: str):
    name, config = PEFT[method]
    model = peft.get_peft_model(zoo.build(name), config()).eval()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    inner = model.base_model.model  # type: ignore[union-attr]
    folded = lorafx.fold(lorafx.capture(inner, inputs=zoo.ZOO[name].inputs(2, 7)))  # type: ignore[arg-type]
    inputs = zoo.ZOO[name].inputs(5, 33)
    # fp32: the adapter's branch is gone, and with it the rounding of its operators.
    assert zoo.distance(zoo.eager(inner, inputs), zoo.run(folded, inputs)) < 1e-5  # type: ignore[arg-type]
    assert sum(map(operators(folded).count, ("linear.default", "addmm.default"))) == sum(
        map(operators(to_eval(zoo.captured(name))).count, ("linear.default", "addmm.default"))
    )
    merged = model.merge_and_unload().state_dict()  # type: ignore[operator]
    values = {key.replace(".base_layer", ""): folded.tensor(key) for key in folded.roles}
    for key in merged.keys() & values.keys():
        # PEFT merges in fp32, we in fp64 and round: two roundings of the update apart.
        torch.testing.assert_close(values[key], merged[key], rtol=1e-5, atol=1e-6)
    assert merged.keys() - values.keys() <= {key for key, role in zoo.captured(name).roles.items() if role == "unread"}


# ---- any composition

D = 4


@dataclass(frozen=True)
class Node:
    """One operator of a random affine expression in ``x``."""

    op: str
    children: tuple[Node, ...] = ()
    bias: bool = False


LEAF = Node("x")
expressions = st.recursive(
    st.just(LEAF),
    lambda inner: st.one_of(
        st.builds(Node, st.just("linear"), st.tuples(inner), st.booleans()),
        st.builds(Node, st.just("low-rank"), st.tuples(inner)),
        st.builds(
            Node, st.sampled_from(["gate", "shift", "minus", "over", "half", "view", "matmul"]), st.tuples(inner)
        ),
        st.builds(Node, st.sampled_from(["add", "sub"]), st.tuples(inner, inner)),
    ),
    max_leaves=5,
)


class Expression(nn.Module):
    """The module of a random expression; every operator has parameters of its own."""

    def __init__(self, node: Node):
        super().__init__()
        self.op, self.node = node.op, node
        self.children_ = nn.ModuleList([Expression(child) for child in node.children])
        if node.op == "linear":
            self.linear = nn.Linear(D, D, bias=node.bias)
        elif node.op == "low-rank":
            self.down, self.up = nn.Linear(D, 1, bias=False), nn.Linear(1, D, bias=False)
        elif node.op in ("gate", "shift", "minus", "over"):
            self.vector = nn.Parameter(torch.empty(D))
        elif node.op == "matmul":
            self.matrix = nn.Parameter(torch.empty(D, D))

    def forward(self, x: Tensor) -> Tensor:
        if self.op == "x":
            return x
        values = [child(x) for child in self.children_]
        first = values[0]
        return {
            "linear": lambda: self.linear(first),
            "low-rank": lambda: self.up(self.down(first)),
            "gate": lambda: self.vector * first,
            "shift": lambda: first + self.vector,
            "minus": lambda: first - self.vector,
            "over": lambda: first / (2.0 + self.vector.tanh()),
            "half": lambda: first * 0.5,
            "view": lambda: first.reshape(-1, D).view(x.shape),
            "matmul": lambda: first @ self.matrix,
            "add": lambda: first + values[1],
            "sub": lambda: first - values[1],
        }[self.op]()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(expressions)
def test_any_affine_expression(node: Node):
    module = Expression(Node("add", (Node("linear", (LEAF,), bias=True), node)))
    program = program_of(module, 2, 3, D)
    folded = lorafx.fold(program)
    assert_same(program, folded)
    assert operators(lorafx.fold(folded)) == operators(folded)
    size = sum(program.tensor(name).numel() for name in program.roles)
    assert sum(folded.tensor(name).numel() for name in folded.roles) <= size
