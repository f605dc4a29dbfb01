"""What a capture keeps of a model's own say over gradients, and of ways to write linear layers and rows of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorafx
from lorafx.errors import CaptureError, LorafxError
from lorafx.models.examples import example_inputs
from lorafx.passes.lora import Lora
from tests import zoo


class TinyConfig(hf.PreTrainedConfig):
    model_type = "tiny-of-this-test"


class Pretrained(hf.PreTrainedModel):
    """A model of transformers around a module of one input: that is how transformers' own exporter comes in."""

    config_class = TinyConfig
    main_input_name = "x"

    def __init__(self, inner: nn.Module):
        super().__init__(TinyConfig())
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.inner(x),)


def rows(seed: int = 0, batch: int = 3) -> Tensor:
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, *outputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    sum(value.square().sum() for value in outputs).backward()  # type: ignore[union-attr]
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


class PartlyFrozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen, self.hidden, self.out = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.frozen(x)
        return self.out(self.hidden(x).relu())


def test_what_a_model_of_transformers_does_not_train_does_not_train():
    torch.manual_seed(0)
    model = Pretrained(PartlyFrozen())
    program = lorafx.capture(model, inputs={"x": rows(batch=2)})
    expected = gradients(model.train(), *model(rows(1)))
    graph = program.module().train()
    found = gradients(graph, *graph(x=rows(1)))
    assert found.keys() == expected.keys() == {f"inner.{n}.{k}" for n in ("hidden", "out") for k in ("weight", "bias")}
    assert all(torch.equal(found[key], expected[key]) for key in found)


class Apart(nn.Module):
    """A part of it runs in its own way."""

    def __init__(self, way: Any):
        super().__init__()
        self.part, self.out, self.way = nn.Linear(4, 4), nn.Linear(4, 2), way

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.way(self.part, x) + x)


def inferred(part: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return part(x)


def inferred_in_part(part: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        fixed = part(x)
        with torch.inference_mode(False):
            return part(x.clone()) + fixed.clone()


def again(part: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(part, x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("way", [inferred, torch.inference_mode()(inferred), inferred_in_part, again])
def test_gradients_flow_where_the_model_has_them(way: Any):
    torch.manual_seed(0)
    model = Apart(lambda part, x: way(part, x).clone())
    x = rows().requires_grad_()  # a reentrant checkpoint has gradients where its input has them
    program = lorafx.capture(model.eval(), inputs={"x": rows()})
    expected = {name: value.clone() for name, value in gradients(model.train(), model(x=x)).items()}
    found = gradients(program.root, program.module().train()(x=x))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    lora = lorafx.rewrite(program, [Lora(targets="out", rank=1)])
    assert lora.names("adapter")


def test_a_model_that_computes_its_layers_again_is_captured_as_without():
    model = zoo.build("bert")
    model.activation_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
    program = lorafx.capture(model, inputs=zoo.text(2, 5))
    assert len(lorafx.rewrite(program, [Lora(rank=1)]).history[0].taken) > 12


def test_channels_are_removed_beside_a_region_without_gradients():
    torch.manual_seed(0)
    model = Pretrained(PartlyFrozen()).double()
    with torch.no_grad():
        model.inner.hidden.weight[2] = 0.0  # type: ignore[index, union-attr]
    program = lorafx.capture(model, inputs={"x": rows(batch=2).double()})
    folded = lorafx.fold(program)
    assert folded.tensor("inner.hidden.weight").shape == (5, 4)
    inputs = {"x": rows(1).double()}
    # fp64: five products in another order.
    assert zoo.distance(zoo.run(program, inputs), zoo.run(folded, inputs)) < 1e-14


class Square(torch.autograd.Function):
    """x², with the gradient it has."""

    factor = 2.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @classmethod
    def backward(cls, ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return cls.factor * ctx.saved_tensors[0] * gradient


class Steeper(Square):
    """x², with a gradient it does not have."""

    factor = 3.0


class Squared(nn.Module):
    def __init__(self, function: type[Square]):
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(self.layer(x))  # type: ignore[return-value]


def test_a_backward_that_is_the_forwards_own_trains():
    model = Squared(Square)
    program = lorafx.capture(model, inputs={"x": rows(batch=2)})
    assert not program.untrainable
    graph = program.module().train()
    expected, found = gradients(model, model(rows(1))), gradients(graph, graph(x=rows(1)))
    assert found.keys() == expected.keys() == {"layer.weight", "layer.bias"}
    assert all(torch.allclose(found[key], expected[key], rtol=1e-6, atol=0.0) for key in found)


def test_a_backward_of_the_models_own_evaluates_and_does_not_train():
    model = Squared(Steeper)
    program = lorafx.capture(model, inputs={"x": rows(batch=2)})
    graph = program.module()
    assert torch.equal(graph.eval()(x=rows(1)), model(rows(1)))
    why = r"Squared has gradients of its own \(Steeper\), which a graph cannot hold"
    with pytest.raises(LorafxError, match=why):
        graph.train()(x=rows(1))
    with pytest.raises(LorafxError, match=f"lora: {why}"):
        lorafx.rewrite(program, [Lora(rank=1)])
    assert torch.equal(lorafx.fold(program).module().eval()(x=rows(1)), model(rows(1)))


def tripled(gradient: Tensor) -> Tensor:
    return 3 * gradient


class Hooked(nn.Module):
    """Two linear layers, and a hook on the gradient of what is between them."""

    def __init__(self, hook: Any):
        super().__init__()
        self.first, self.second, self.hook = nn.Linear(4, 4), nn.Linear(4, 2), hook

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.hook is not None and hidden.requires_grad:
            hidden.register_hook(self.hook)
        return self.second(hidden)


def test_a_hook_that_changes_the_gradient_of_a_value_does_not_train():
    model = Hooked(tripled)
    program = lorafx.capture(model, inputs={"x": rows(batch=2)})
    assert torch.equal(program.module().eval()(x=rows(1)), model(rows(1)))
    with pytest.raises(LorafxError, match=r"Hooked has gradients of its own \(a hook on a value\)"):
        lorafx.rewrite(program, [Lora(rank=1)])
    assert "register_hook" in vars(Tensor)
    assert Tensor.register_hook.__module__ == "torch._tensor", "torch is as it was"


def test_a_hook_that_changes_the_gradients_of_a_module_does_not_train():
    model = Hooked(None)
    model.second.register_full_backward_hook(lambda module, ins, outs: tuple(3 * value for value in ins))
    program = lorafx.capture(model, inputs={"x": rows(batch=2)})
    with pytest.raises(LorafxError, match=r"Hooked has gradients of its own \(a hook on second\)"):
        lorafx.rewrite(program, [Lora(rank=1)])


def test_hooks_that_only_look_train():
    seen: list[Tensor] = []
    model = Hooked(seen.append)
    model.second.register_full_backward_hook(lambda module, ins, outs: None)
    program = lorafx.capture(model, inputs={"x": rows(batch=2)})
    assert not program.untrainable
    graph = lorafx.rewrite(program, [Lora(rank=1, trainable=("first",))]).module().train()
    expected, found = gradients(model, model(rows(1))), gradients(graph, graph(x=rows(1)))
    assert torch.allclose(found["first.weight"], expected["first.weight"], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_weight_whose_gradient_is_hooked_is_not_trained_in_full(register: str):
    """As in training some rows of an embedding by masking its gradient."""
    model = Hooked(None)
    getattr(model.first.weight, register)(lambda gradient: None)
    program = lorafx.capture(model, inputs={"x": rows(batch=2)})
    with pytest.raises(LorafxError, match=r"lora: the model has a hook on the gradient of first\.weight"):
        lorafx.rewrite(program, [Lora(rank=1, targets="second", trainable=("first",))])
    lorafx.rewrite(program, [Lora(rank=1)])  # an adapter has a gradient of its own


class WrittenOut(nn.Module):
    """A linear layer as some write it, ``x @ W.T + b``."""

    def __init__(self, turn: str):
        super().__init__()
        self.dense, self.turn = nn.Linear(4, 3), turn

    def forward(self, x: Tensor) -> Tensor:
        weight = self.dense.weight
        turned = {"T": lambda: weight.T, "t": weight.t, "transpose": lambda: weight.transpose(-1, -2)}
        turned |= {"permute": lambda: weight.permute(1, 0)}
        return x @ turned[self.turn]() + self.dense.bias


@pytest.mark.parametrize("turn", ["T", "t", "transpose", "permute"])
def test_a_product_with_a_transposed_weight_is_a_linear_layer(turn: str):
    model, x = WrittenOut(turn), torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    program = lorafx.capture(model, inputs={"x": x[:2]})
    assert [(site.parameter, site.kind) for site in program.sites()] == [("dense.weight", "linear")]
    adapted = zoo.randomised(lorafx.rewrite(program, [Lora(rank=2, alpha=2.0)]))
    a, b = (adapted.tensor(f"dense.lora_{side}.weight") for side in "AB")
    with torch.no_grad():
        assert torch.equal(zoo.run(program, {"x": x})[""], model(x))
        expected = model(x) + x @ a.T @ b.T
    # fp32 rounding: one product more, in another order.
    assert torch.allclose(zoo.run(adapted, {"x": x})[""], expected, rtol=0.0, atol=1e-6)


def test_a_product_with_a_weight_as_it_stands_is_no_linear_layer():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4) + 1.0)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T.transpose(0, 1)

    program = lorafx.capture(Product(), inputs={"x": rows(batch=2)})
    assert {site.kind for site in program.sites()} <= {"transpose.int", "numpy_T", "t", "permute"}


# ---- rows of texts


def test_texts_side_by_side_have_a_free_number_and_a_free_length():
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = hf.BertForMultipleChoice(hf.BertConfig(**sizes, intermediate_size=24)).eval()

    def inputs(batch: int, choices: int, length: int) -> dict[str, Tensor]:
        ids = torch.randint(5, 50, (batch, choices, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[-1, :, length // 2 + 1 :] = 0
        return {"input_ids": ids, "attention_mask": mask}

    program = lorafx.capture(model, inputs=inputs(2, 3, 7))
    for shape in ((2, 3, 7), (1, 2, 9), (4, 5, 3)):
        given = inputs(*shape)
        expected, found = zoo.eager(model, given), zoo.run(program, given)
        assert all(torch.equal(found[key], expected[key]) for key in expected), shape


def test_what_stands_beside_each_token_has_the_texts_length():
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.LayoutLMConfig(**sizes, intermediate_size=24, max_2d_position_embeddings=64)
    model = hf.LayoutLMForTokenClassification(config).eval()

    def inputs(batch: int, length: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(5, 50, (batch, length), generator=generator)
        corner = torch.randint(0, 30, (batch, length, 2), generator=generator)
        return {"input_ids": ids, "bbox": torch.cat([corner, corner + 20], -1)}

    program = lorafx.capture(model, inputs=inputs(2, 7))
    for shape in ((2, 7), (1, 9), (4, 3)):
        given = inputs(*shape)
        expected, found = zoo.eager(model, given), zoo.run(program, given)
        assert all(torch.equal(found[key], expected[key]) for key in expected), shape


def test_a_number_of_positions_below_zero_is_no_limit():
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24, "vocab_size": 50}
    model = hf.XLNetForSequenceClassification(hf.XLNetConfig(**sizes)).eval()
    assert model.config.max_position_embeddings == -1
    program = lorafx.capture(model)
    ids = torch.randint(5, 50, (3, 11), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected, found = zoo.eager(model, given), zoo.run(program, given)
    assert all(torch.equal(found[key], expected[key]) for key in found if key in expected)


def test_characters_of_any_number_are_texts_too():
    """A model of characters has no vocabulary to draw example inputs from."""
    torch.manual_seed(0)

    class Characters(nn.Module):
        main_input_name = "input_ids"

        def __init__(self):
            super().__init__()
            self.config = hf.CanineConfig(hidden_size=8, pad_token_id=0)
            self.layer = nn.Linear(1, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
            return (self.layer((input_ids * attention_mask).unsqueeze(-1).float()),)

    example = example_inputs(Characters())
    assert example["input_ids"].shape == (2, 7)
    assert (example["input_ids"][1, 4:] == 0).all(), "padded"


# ---- what a trace trips over


class Moving(nn.Module):
    """Sends its layer where it is."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.layer, self.dtype = nn.Linear(4, 2), dtype

    def forward(self, x: Tensor) -> Tensor:
        self.layer = self.layer.to(self.dtype)
        return self.layer(x.to(self.dtype))


def test_a_module_told_to_be_what_it_is_stays_so():
    model, move = Moving(torch.float32), nn.Module.to
    program = lorafx.capture(model, inputs={"x": rows(batch=2)})
    assert nn.Module.to is move, "put back"
    assert torch.equal(zoo.run(program, {"x": rows(1)})[""], model(rows(1)))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Looping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row.cumsum(0) for row in x])


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        (Branching(), "a graph cannot branch on values: choose a config or example inputs of your own that do not"),
        (Looping(), "its code computes with that size as a number: dynamic=False captures it for this size alone"),
    ],
)
def test_a_refusal_says_what_helps(model: nn.Module, advice: str):
    with pytest.raises(CaptureError) as refused:
        lorafx.capture(model, inputs={"x": torch.ones(2, 4)})
    assert str(refused.value).endswith(advice)
    assert "\n" not in str(refused.value)
    assert "\x1b" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the converter's own
def test_what_does_not_train_is_left_alone_in_an_export_too(tmp_path: Path):
    hf.AutoConfig.register(TinyConfig.model_type, TinyConfig)
    torch.manual_seed(0)
    program = lorafx.capture(Pretrained(PartlyFrozen()), inputs={"x": rows(batch=2)})
    adapted = zoo.randomised(lorafx.rewrite(program, [Lora(rank=1)]))
    result = lorafx.export(adapted, tmp_path / "onnx", format="onnx", adapters="separate")
    assert result is not None
    assert result.ok


# ---- masks


class MaskedOrNot(nn.Module):
    """Leaves out a mask that masks nothing; what it computes then is the same, or not."""

    def __init__(self, without: float):
        super().__init__()
        self.layer, self.without = nn.Embedding(9, 4), without

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # As transformers' masks do: a trace takes the branch with the mask.
        skip = not torch.compiler.is_exporting() and bool(attention_mask.all())
        values = self.layer(input_ids)
        return self.without * values.mean(1) if skip else (values * attention_mask[..., None]).mean(1)


@pytest.mark.parametrize("without", [1.0, 2.0])
def test_a_model_that_looks_into_its_mask_is_refused_if_it_matters(without: float):
    ids = torch.arange(8).reshape(2, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    model = MaskedOrNot(without)
    if without != 1.0:
        with pytest.raises(CaptureError, match="MaskedOrNot computes something else for texts without padding"):
            lorafx.capture(model, inputs=inputs)
        return
    program = lorafx.capture(model, inputs=inputs)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.allclose(zoo.run(program, given)[""], model(**given), rtol=0.0, atol=1e-7)
