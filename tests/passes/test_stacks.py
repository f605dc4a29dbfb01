"""Stacks of matrices, the weights of a mixture's experts: as PEFT's ``target_parameters``, trained, folded, written.

Three layouts: (experts, out, in), which products see transposed (Qwen3-MoE); (experts, in, out) of a module that says
so (gpt-oss); and one that PEFT takes for the first, though products see it as the second (Llama 4).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx_ir as ir
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorafx
from lorafx.backends.slots import add_slots
from lorafx.base import Method, Pass
from lorafx.errors import NoSitesError, UsageError
from lorafx.formats.adapter import read_adapter
from lorafx.frontend.adapters import adapted, read_adapters, weighted
from lorafx.graph.site import INSERTED_BY
from lorafx.passes.finegates import Finegates
from lorafx.passes.lora import Lora
from lorafx.passes.prilora import Prilora
from lorafx.passes.rose_lora import RoseLora
from lorafx.passes.salora import Salora
from lorafx.passes.tied_lora import TiedLora
from lorafx.public import Program
from tests import foreign, zoo

OWNERS = {"qwen3-moe": "mlp.experts", "gpt-oss": "mlp.experts", "llama4": "feed_forward.experts"}
#: The first is in the quick tests of adapters, and Mixtral below is stored as it is.
layouts = pytest.mark.parametrize(
    "model", [model if model == "gpt-oss" else pytest.param(model, marks=pytest.mark.slow) for model in OWNERS]
)


def parameters(model: str) -> list[str]:
    return [f"{OWNERS[model]}.gate_up_proj", f"{OWNERS[model]}.down_proj"]


def lora(model: str, **options: Any) -> Lora:
    patterns: dict[str, Any] = {
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {"experts.gate_up_proj": 9.0},
    }
    return Lora(targets=("q_proj", *parameters(model)), rank=4, alpha=6.0, **{**patterns, **options})


def trained(model: str, step: Pass) -> Program:
    """As training may leave it: no adapter is zero."""
    torch.manual_seed(2)
    return zoo.randomised(lorafx.rewrite(zoo.captured(model), [step]))


def theirs(model: str, **options: Any) -> Any:
    """PEFT's adapter for the same weights."""
    patterns = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 9}}
    return foreign.adapted(
        zoo.build(model),
        {**foreign.R, **patterns, "target_modules": ["q_proj"], "target_parameters": parameters(model), **options},
    )


# ---- as PEFT computes it


# It looks for the names of patterns among modules only, and takes them for parameters all the same.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning")
@layouts
def test_equals_peft_and_opens_in_it(model: str, tmp_path: Path) -> None:
    base = zoo.build(model)
    base.save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    program = lorafx.capture(tmp_path / "base")
    torch.manual_seed(2)
    program = zoo.randomised(lorafx.rewrite(program, [lora(model)]))
    program.save(tmp_path / "run")
    assert lorafx.export(program, tmp_path / "adapter", format="peft") is not None, "the written files are compared"
    opened: Any = peft.PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter")  # type: ignore[attr-defined, arg-type]
    inputs = zoo.entry(model).inputs(3, 6)
    found = zoo.run(program, inputs)
    assert zoo.distance(found, zoo.run(lorafx.capture(tmp_path / "base"), inputs)) > 1e-2, "it does something"
    # The same operators in the same order, so the same bits; a fused kernel may sum in another one.
    assert zoo.distance(found, foreign.answers(opened.eval(), inputs)) < 1e-6
    assert torch.equal(found["['logits']"], zoo.run(lorafx.load(tmp_path / "run"), inputs)["['logits']"])
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {key: keys[key].shape for key in keys} == {
        key: value.shape for key, value in load_file(tmp_path / "run" / "adapter_model.safetensors").items()
    }


@layouts
def test_what_peft_trained_is_what_the_pass_makes(model: str, tmp_path: Path) -> None:
    adapter = theirs(model)
    inputs = zoo.entry(model).inputs(3, 6)
    base = zoo.captured(model)
    program = adapted(base, [(read_adapter(foreign.save(adapter, tmp_path / "adapter")), 1.0)])
    assert [applied.step.pass_name() for applied in program.history] == ["lora"], "so that it trains on"
    assert zoo.distance(foreign.answers(adapter, inputs), zoo.run(program, inputs)) < 1e-6
    # It does so with PEFT's gradients.
    adapter.requires_grad_(True)
    adapter.base_model.model(**inputs, use_cache=False).logits.square().sum().backward()
    module = program.module().eval()
    module(**inputs).logits.square().sum().backward()
    # PEFT's two wrappers, by the sizes of their factors.
    for name, expected in {f"{owner}_{short}": value for owner, short, value in _factors(adapter, model)}.items():
        value = program.tensor(f"{name}.weight").grad
        assert value is not None
        assert (value - expected).abs().max() <= 1e-4 * expected.abs().max(), name


def _factors(adapter: Any, model: str) -> list[tuple[str, str, Tensor]]:
    """The gradients of PEFT's stacks: the parameter, which factor, and the gradient."""
    found = []
    for path, module in adapter.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.layer.ParamWrapper):
            owner = path.replace(".base_layer", "") + "." + module.parameter_name
            for short in ("lora_A", "lora_B"):
                found.append((owner, short, getattr(module, short)["default"].weight.grad))
    return found


# ---- folded


@layouts
def test_folds_exactly(model: str) -> None:
    program = zoo.doubled(trained(model, lora(model)))
    folded = lorafx.fold(program)
    inputs = zoo.widened(zoo.entry(model).inputs(3, 6))
    assert zoo.distance(zoo.run(program, inputs), zoo.run(folded, inputs)) < 1e-12
    assert set(folded.roles) == set(zoo.captured(model).roles)
    assert len(folded.graph.nodes) <= len(zoo.captured(model).graph.nodes)
    name = f"model.layers.1.{OWNERS[model]}.gate_up_proj"
    a, b = (program.tensor(f"{name}_lora_{short}.weight").detach() for short in "AB")
    old = program.tensor(name).detach()
    transposed = model == "gpt-oss"
    each = [
        9 / 4 * (b[:, e :: len(old)] @ a[4 * e : 4 * e + 4])  # B's experts are fastest, A's slowest
        for e in range(len(old))
    ]
    expected = old + torch.stack([delta.T if transposed else delta for delta in each])
    assert (folded.tensor(name) - expected).abs().max() < 1e-12


@pytest.mark.slow
def test_written_a_tile_at_a_time(tmp_path: Path) -> None:
    zoo.build("qwen3-moe").save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    torch.manual_seed(2)
    program = zoo.randomised(lorafx.rewrite(lorafx.capture(tmp_path / "base"), [lora("qwen3-moe")]))
    lorafx.export(lorafx.fold(program, stream=True), tmp_path / "out", format="hf")
    merged = type(zoo.build("qwen3-moe")).from_pretrained(tmp_path / "out").eval()  # type: ignore[attr-defined]
    inputs = zoo.entry("qwen3-moe").inputs(3, 6)
    assert zoo.distance(zoo.run(program, inputs), zoo.eager(merged, inputs)) < 1e-5


@pytest.mark.slow
def test_two_adapters_are_rounded_once(tmp_path: Path) -> None:
    """A stack in bf16 plus the sum of two updates, in fp32 and rounded at the end."""
    folders = {
        str(foreign.save(theirs("qwen3-moe", **more), tmp_path / str(number))): weight
        for number, (more, weight) in enumerate([({}, 1.0), ({"r": 2, "rank_pattern": {}}, -0.5)])
    }
    base = zoo.captured("qwen3-moe", dtype=torch.bfloat16)
    adapters = read_adapters(weighted(folders))
    folded = lorafx.fold(adapted(base, adapters))
    name = "model.layers.0.mlp.experts.down_proj"
    exact = base.tensor(name).double()
    for adapter, weight in adapters:
        change = next(change for change in adapter.changes(base.source.model) if change.name == name)
        exact = exact + weight * (change.updated(base.tensor(name)) - base.tensor(name).double())
    place = exact.abs() * torch.finfo(torch.bfloat16).eps
    # Half of a last place, and what fp32 sums round off: that of a number just above a power of two is half as large.
    assert ((folded.tensor(name).double() - exact).abs() <= 0.501 * place + 1e-6).all()
    assert not folded.names("adapter")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3-moe", "gpt-oss"])  # Llama 4's complex numbers have no conversion
def test_onnx(model: str, tmp_path: Path) -> None:
    for adapters in ("merged", "separate"):
        result = lorafx.export(trained(model, lora(model)), tmp_path / adapters, adapters=adapters)
        assert result is not None
        assert result.ok


# ---- where it does not stand


@pytest.mark.parametrize(
    "targets", ["all-linear", "role:attn.*", "q_proj", r".*\.(q_proj|down_proj)", "*_proj", "*.layers.*"]
)
def test_stacks_are_taken_by_name_only(targets: Any) -> None:
    """And by the name of their module: PEFT's ``target_modules`` means modules that end so, never parameters."""
    program = lorafx.rewrite(zoo.captured("mixtral"), [Lora(targets=targets, rank=2)])
    missed = {miss.site.module: miss.reason for miss in program.history[-1].missed}
    for name in ("layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"):
        stack = f"a stack, taken where {name.partition('mlp.')[2]} is named"
        assert missed[f"model.{name}"] in ("stack is not a linear layer", stack)


def test_the_end_of_a_stack_s_path_alone_names_no_module() -> None:
    with pytest.raises(NoSitesError, match=r"'down_proj' matched 0 of .* the stacks experts\.down_proj\?"):
        lorafx.rewrite(zoo.captured("mixtral"), [Lora(targets="down_proj,q_proj")])


@pytest.mark.parametrize("targets", ["experts.down_proj", r".*\.experts\.down_proj", "*.experts.down*", "*.experts.*"])
def test_a_stack_is_named_with_its_module(targets: str) -> None:
    program = lorafx.rewrite(zoo.captured("mixtral"), [Lora(targets=targets)])
    assert "model.layers.0.mlp.experts.down_proj" in {entry.module for entry in program.history[-1].inserted}


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (TiedLora(targets="experts.gate_up_proj"), "tied-lora shares A and B between one matrix a block"),
        (Finegates(targets="experts.gate_up_proj"), "finegates gates the rows and columns of one matrix"),
        (Prilora(targets="experts.gate_up_proj"), "prunes A by the norms of inputs, .* fraction = 0"),
    ],
    ids=["tied-lora", "finegates", "prilora"],
)
def test_methods_of_one_matrix_say_so(step: Method, reason: str) -> None:
    with pytest.raises(NoSitesError, match=reason):
        lorafx.rewrite(zoo.captured("mixtral"), [step])


def test_there_is_no_input_to_drop() -> None:
    with pytest.raises(UsageError, match=r"dropout = 0\.1 at model\.layers\.0\.mlp\.experts\.gate_up_proj, a stack"):
        lorafx.rewrite(zoo.captured("mixtral"), [Lora(targets="experts.gate_up_proj", dropout=0.1)])
    with pytest.raises(UsageError, match=r"rank 33 at .*gate_up_proj, whose weight allows 1 to 32"):
        lorafx.rewrite(zoo.captured("mixtral"), [Lora(targets="experts.gate_up_proj", rank=33)])


def test_what_holds_linear_weights_only_says_so(tmp_path: Path) -> None:
    """Slots, and an adapter of another method's branches beside a stack."""
    with pytest.raises(UsageError, match=r"experts\.gate_up_proj: a stack of matrices, for which there is no slot"):
        add_slots(
            ir.Model(ir.Graph([], [], nodes=[]), ir_version=10),
            zoo.captured("mixtral"),
            "experts.gate_up_proj",
            shared_names=False,
        )
    steps = [Lora(targets="experts.down_proj", rank=2), Salora(targets="q_proj", rank=2)]
    with pytest.raises(UsageError, match=r"down_proj_lora_A\.weight belongs to no low-rank update of a linear weight"):
        lorafx.export(lorafx.rewrite(zoo.captured("mixtral"), steps), tmp_path / "out", format="peft")


# ---- the other methods


@pytest.mark.parametrize(
    "step",
    [
        Prilora(targets="experts.gate_up_proj,experts.down_proj,q_proj", rank_first=2, rank_last=5, fraction=0.0),
        Salora(targets="experts.gate_up_proj,experts.down_proj,q_proj", rank=4),
        RoseLora(targets="experts.gate_up_proj,experts.down_proj,q_proj", rank=3, density=0.25, start=2.0, end=4.0),
    ],
    ids=["prilora", "salora", "rose-lora"],
)
def test_each_matrix_is_one(step: Method) -> None:
    """Six steps of training; each expert has the ranks, the gates and the sparsity of a matrix, and it all folds."""
    torch.manual_seed(3)
    program = lorafx.rewrite(zoo.captured("mixtral"), [step])
    model = program.module().train()
    model.total_steps = 6
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.3))
    inputs = zoo.entry("mixtral").inputs(4, 9)
    for _ in range(6):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        model.before_step()
        optimizer.step()
        model.after_step()
        optimizer.zero_grad()
    entry = next(e for e in program.history[-1].inserted if e.module == "model.layers.1.mlp.experts.down_proj")
    a, b = (program.tensor(entry.tensors[short]).detach() for short in ("lora_A", "lora_B"))
    ranks = len(a) // 4
    assert (a.shape, b.shape, entry.matrices) == ((4 * ranks, 48), (32, 4 * ranks), 4)
    assert b.any(), "it learned"
    if isinstance(step, Prilora):
        assert ranks == 5
    elif isinstance(step, Salora):
        assert program.tensor(entry.tensors["lora_gate"]).shape == (16,)
        program.load({entry.tensors["lora_gate"]: torch.tensor([3.0, -3.0, 1.0, -1.0] * 4)})
    else:
        assert a.count_nonzero(1).eq(12).all(), "a quarter of each row of A"
        assert b.count_nonzero(0).eq(8).all(), "a quarter of each column of B"
    wide = zoo.doubled(program)
    inputs = zoo.widened(inputs)
    assert zoo.distance(zoo.run(wide, inputs), zoo.run(lorafx.fold(wide), inputs)) < 1e-12


def test_orthogonality_is_that_of_each_matrix() -> None:
    torch.manual_seed(3)
    step = Salora(targets="experts.down_proj", rank=3, orthogonality=1.0)
    program = zoo.randomised(lorafx.rewrite(zoo.captured("mixtral"), [step]))
    model = program.module()
    expected = []
    for entry in (e for e in program.history[-1].inserted if e.module):
        a, b = (program.tensor(entry.tensors[short]).detach() for short in ("lora_A", "lora_B"))
        eye = torch.eye(3)
        terms = [
            ((a[3 * e : 3 * e + 3] @ a[3 * e : 3 * e + 3].T - eye) ** 2).sum()
            + ((b[:, e::4].T @ b[:, e::4] - eye) ** 2).sum()
            for e in range(4)
        ]
        expected.append(torch.stack(terms).sum())
    found = model.penalty()
    assert found is not None
    torch.testing.assert_close(found.detach(), torch.stack(expected).mean(), rtol=1e-5, atol=0.0)  # fp32 sums


def test_a_stack_of_a_plain_module() -> None:
    """No transformers, no attribute: (experts, out, in) is what PEFT takes it for; indexed, and turned once
    for two uses."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(3, 6, 6))
            self.out = nn.Linear(6, 2)

        def forward(self, x: Tensor, which: Tensor) -> Tensor:
            chosen = torch.bmm(self.weights[which], x.unsqueeze(2)).squeeze(2)
            turned = self.weights.transpose(1, 2)
            return self.out(torch.matmul(torch.matmul(chosen, turned), turned).sum(0))

    torch.manual_seed(0)
    inputs = {"x": torch.randn(4, 6), "which": torch.tensor([0, 2, 1, 2])}
    program = lorafx.capture(Mixed(), inputs=inputs)
    program = zoo.randomised(lorafx.rewrite(program, [Lora(targets="weights", rank=2, alpha=2.0)]))
    assert len(program.names("adapter")) == 2, "one A and one B for all uses"
    added = [
        node for node in program.graph.nodes if INSERTED_BY in node.meta and node.target is torch.ops.aten.bmm.default
    ]
    assert len(added) == 2, "one update for what indexes it, one for what turns it"
    a, b = (program.tensor(f"weights_lora_{short}.weight").detach() for short in "AB")
    changed = program.tensor("weights") + torch.einsum("ore,eri->eoi", b.view(6, 2, 3), a.view(3, 2, 6))
    eager: Any = copy.deepcopy(program.source.model)
    with torch.no_grad():
        eager.weights.copy_(changed)
    folded = lorafx.fold(program)
    for one in (program, folded):
        # fp32 rounding of four products in a row.
        torch.testing.assert_close(one.module().eval()(**inputs), eager(**inputs), rtol=1e-4, atol=1e-4)
    assert not folded.names("adapter")
