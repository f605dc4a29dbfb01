"""Capture beyond the matrix: noise a graph cannot turn off, inner graphs, running statistics, and refusals."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

import lorafx
from lorafx.errors import CaptureError, UsageError
from lorafx.passes.lora import Lora
from tests import small, zoo


def operators(program: lorafx.Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def check(model: nn.Module, inputs: dict[str, Tensor]) -> lorafx.Program:
    """Capture, and compare evaluation with the eager model bit by bit on another batch size."""
    program = lorafx.capture(model, inputs=inputs)
    assert all(not module.training for module in model.modules()), "left as it was"
    larger = {name: torch.cat([value, value.flip(1)]) for name, value in inputs.items()}
    expected = zoo.eager(model, larger)
    actual = zoo.run(program, larger)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    return program


# ---- noise


def test_stochastic_depth_is_left_out_where_it_is(caplog: pytest.LogCaptureFixture):
    config = hf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, drop_path_rate=0.5
    )
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    program = check(hf.SwinForImageClassification(config).eval(), {"pixel_values": pixels})
    assert "captured without them: swin.encoder.layers.1.blocks.0.drop_path" in caplog.text
    assert "aten.rand.default" not in operators(program)
    assert "aten.dropout.default" in operators(program), "dropout elsewhere stays"


def test_router_jitter_is_left_out(caplog: pytest.LogCaptureFixture):
    config = hf.MixtralConfig(**zoo.DECODER, num_local_experts=4, router_jitter_noise=0.1)
    program = check(hf.MixtralForCausalLM(config).eval(), zoo.text(2, 7))
    assert "model.layers.0.mlp, model.layers.1.mlp" in caplog.text
    assert "aten.uniform_.default" not in operators(program)


def test_branches_on_random_numbers_are_left_out(caplog: pytest.LogCaptureFixture):
    model = zoo.build("whisper-encoder")
    model.layerdrop = 0.3  # type: ignore[assignment] - read in training only
    program = check(model, zoo.sound(2, 7))
    assert "decides by random numbers or other values of tensors in training" in caplog.text
    assert "captured without them: (the model itself)" in caplog.text
    dropouts = program.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)
    assert sum(node.args[2] is True for node in dropouts) == 6, "the layers' own dropout stays"


def test_statistics_by_the_count_of_batches_are_said_to_stay_as_they_are(caplog: pytest.LogCaptureFixture):
    """A momentum of None reads how many batches there were, as a number."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2))
    lorafx.capture(model.eval(), inputs={"input": torch.randn(3, 4)})
    assert "values of tensors in training, which a graph cannot; captured without them: 1" in caplog.text
    assert "draws" not in caplog.text


def test_noise_of_another_library_becomes_evaluation_mode(caplog: pytest.LogCaptureFixture):
    """SpecAugment draws its masks with numpy, which a trace takes for constants: only comparing shows it."""
    convolutions: dict[str, Any] = {
        "conv_dim": (8, 8),
        "conv_stride": (5, 2),
        "conv_kernel": (10, 3),
        "num_feat_extract_layers": 2,
    }
    positions: dict[str, Any] = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    masking: dict[str, Any] = {"layerdrop": 0.0, "mask_time_prob": 0.2, "mask_time_length": 2}
    config = hf.Wav2Vec2Config(**convolutions, **positions, **sizes, **masking)
    sound = torch.randn(2, 2000, generator=torch.Generator().manual_seed(0))
    check(hf.Wav2Vec2ForSequenceClassification(config).eval(), {"input_values": sound})
    assert "can be captured in evaluation mode only" in caplog.text


def test_quiet_models_log_nothing(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="lorafx"):
        check(zoo.build("bert"), zoo.text(2, 7))
    assert not [record for record in caplog.records if record.name.startswith("lorafx")]


# ---- heads


def test_what_the_checkpoint_did_not_hold_belongs_to_the_head(tmp_path: Path):
    """A pooler that was trained is adapted, as in PEFT; one that was just made up has to be trained whole."""
    whole = zoo.build("deberta-v2")
    assert zoo.captured("deberta-v2").heads == ("classifier",)
    whole.save_pretrained(tmp_path / "whole")  # type: ignore[operator]
    assert lorafx.capture(tmp_path / "whole").heads == ("classifier",)
    whole.deberta.save_pretrained(tmp_path / "bare")  # type: ignore[operator, union-attr]
    bare = lorafx.capture(tmp_path / "bare", task="text-classification", num_labels=zoo.LABELS)
    assert bare.heads == bare.default_trainable() == ("pooler", "classifier")
    adapted = {item.module for item in lorafx.rewrite(bare, [Lora(rank=2)]).history[-1].inserted}
    assert not {"pooler.dense", "classifier"} & adapted


# ---- inner graphs and state


class Regions(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen, self.precise, self.out, self.dropout = *(nn.Linear(4, 4) for _ in range(3)), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            a = self.dropout(self.frozen(x))
        with torch.autocast("cpu", enabled=False):
            b = self.dropout(self.precise(x))
        return self.out(a + b)


def test_regions_become_inner_graphs_with_an_evaluation_form():
    model = Regions().eval()
    program = check(model, {"x": torch.randn(2, 4, generator=torch.Generator().manual_seed(0))})
    adapted = lorafx.rewrite(program, [Lora(rank=2)])
    assert [item.module for item in adapted.history[-1].inserted] == ["out"]
    reasons = {miss.site.module: miss.reason for miss in adapted.history[-1].missed}
    assert reasons["frozen"] == "wrap_with_set_grad_enabled is not a linear layer"
    assert reasons["precise"] == "wrap_with_autocast is not a linear layer"
    module = program.module()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    noisy = module.train()(x=x)
    torch.manual_seed(2)
    assert torch.equal(noisy, model.train()(x))
    model.eval()
    assert torch.equal(module.eval()(x=x), model(x))


def resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return hf.ResNetForImageClassification(config).eval(), {"pixel_values": pixels}


def test_running_statistics_belong_to_one_program():
    model, inputs = resnet()
    base = check(model, inputs)
    program = lorafx.rewrite(base, [Lora(targets="*.convolution", rank=2)])
    module = program.module()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    module.eval()(**inputs)
    assert not any(program.tensor(key).ne(value).any() for key, value in before.items()), "evaluation changes nothing"
    module.train()(**inputs)
    changed = {key for key, value in before.items() if program.tensor(key).ne(value).any()}
    assert {key.rpartition(".")[2] for key in changed} == {"running_mean", "running_var", "num_batches_tracked"}
    assert changed <= program.learned().keys(), "or a saved run would evaluate otherwise"
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), key
        assert torch.equal(base.tensor(key), value), key
    assert before.keys() <= lorafx.fold(program).roles.keys(), "counters nobody reads stay in the checkpoint"


def test_values_of_the_graph_s_own_that_are_overwritten_are_made_anew():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            y += 1.0
            z = y.tanh()
            y.detach().mul_(2.0)  # under another name
            rows = (y * 1.5).view(-1, 2, 2)  # a view of what nobody else sees
            rows += 3.0
            part = z[:, :2]
            part.mul_(4.0)  # a part stays what it is: the whole has it, too
            return z.add_(y) + rows.flatten(1)

    program = check(InPlace().eval(), {"x": torch.randn(2, 4, generator=torch.Generator().manual_seed(0))})
    assert operators(program) == [
        "aten.linear.default",
        "aten.add.Tensor",
        "aten.tanh.default",
        "aten.detach.default",
        "aten.mul.Tensor",
        "aten.mul.Tensor",
        "aten.view.default",
        "aten.add.Tensor",
        "aten.slice.Tensor",
        "aten.slice.Tensor",
        "aten.mul_.Tensor",
        "aten.add_.Tensor",
        "aten.flatten.using_ints",
        "aten.add.Tensor",
    ]


class Sparse(nn.Module):
    """A sparse update of a weight, and the weight's data."""

    def __init__(self):
        super().__init__()
        self.layer, self.update = nn.Linear(4, 3), nn.Parameter(torch.randn(3))
        self.places = torch.tensor([[0, 1, 1], [3, 2, 2]])  # one place twice: the sum

    def forward(self, x: Tensor) -> Tensor:
        sparse = torch.sparse_coo_tensor(self.places, self.update, (3, 4)).coalesce()
        product = torch.sparse.mm(sparse, x.t()).t()
        return x @ (self.layer.weight.data + sparse.to_dense()).t() + product


def test_sparse_tensors_and_data_are_computed_densely():
    model = Sparse().eval()
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    program = lorafx.capture(model, inputs={"x": x})
    expected = {"": model(torch.cat([x, x])).detach()}
    assert zoo.distance(zoo.run(program, {"x": torch.cat([x, x])}), expected) < 1e-6
    module = program.module().train()
    module(x=x).sum().backward()
    assert program.tensor("update").grad is not None
    assert program.tensor("layer.weight").grad is None, "nothing flows through a parameter's data"


class Building(nn.Module):
    """Constants built in place: of numbers alone, or of a parameter."""

    def __init__(self, trained: bool):
        super().__init__()
        self.layer, self.trained = nn.Linear(4, 4), nn.Parameter(torch.randn(4)) if trained else None
        self.places = {"default": torch.tensor([[0, 3, 9], [1, 2, 9]])}  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        places = self.places["default"].clone()
        places[0] += 1
        places = places[:, places[0] < 9]  # as many as the values say
        mask = torch.zeros(5, 4)
        mask[places[0], places[1]] = 2.0
        if self.trained is not None:
            mask[0] += self.trained
        return self.layer(x) * mask.sum(0)


@pytest.mark.parametrize("trained", [False, True])
def test_constants_built_in_place(trained: bool):
    model = Building(trained).eval()
    program = check(model, {"x": torch.randn(2, 4, generator=torch.Generator().manual_seed(0))})
    built = [name for name in program.roles if "built_tensor" in name]
    assert built
    assert "aten.copy_.default" not in operators(program) or trained
    if trained:  # what trains is none of them
        with torch.no_grad():
            program.tensor("trained").add_(1.0)
            model.trained.add_(1.0)  # type: ignore[union-attr]
        assert zoo.distance(zoo.run(program, program.example), zoo.eager(model, dict(program.example))) == 0


def test_a_constant_that_an_input_is_written_into_is_none():
    class Buffered(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            table = torch.zeros(4)
            table[1:] += 1.0
            table[:1].copy_(x[0, :1])
            return x + table

    check(Buffered().eval(), {"x": torch.randn(2, 4, generator=torch.Generator().manual_seed(0))})


def test_what_a_forward_puts_in_a_parameter_s_place_is_not_captured():
    class Swapping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.update = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.layer.weight
            del self.layer.weight
            self.layer.weight = weight + self.update  # type: ignore[assignment]
            result = self.layer(x)
            del self.layer.weight
            self.layer.register_parameter("weight", nn.Parameter(weight.data))
            return result

    model = Swapping().eval()
    before = model.layer.weight
    program = lorafx.capture(model, inputs={"x": torch.randn(2, 4, generator=torch.Generator().manual_seed(0))})
    assert model.layer.weight is before
    assert torch.equal(program.tensor("layer.weight"), before)
    assert zoo.distance(zoo.run(program, program.example), zoo.eager(model, dict(program.example))) == 0


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


def test_a_branch_on_the_input_is_refused_with_its_line(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(CaptureError, match=r"Branching cannot be captured at .*test_capture.py:\d+: .*data-dependent"):
        lorafx.capture(Branching(), inputs={"x": torch.ones(2, 4)})
    assert "def forward" not in capfd.readouterr().err, "the tracer's own dump stays in the log"


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(row) for row in x])


def test_what_no_capture_was_made_without_is_not_said_to_be_random(caplog: pytest.LogCaptureFixture):
    with pytest.raises(CaptureError, match="a graph cannot branch on values"):
        lorafx.capture(Branching().eval(), inputs={"x": torch.randn(2, 4)})
    assert "random" not in caplog.text


def test_a_fixed_dimension_is_refused_by_name():
    with pytest.raises(CaptureError, match="fixes dimension 0 of input 'x' to 2"):
        lorafx.capture(Counting(), inputs={"x": torch.ones(2, 4)})
    program = lorafx.capture(Counting(), inputs={"x": torch.ones(2, 4)}, dynamic=False)
    assert operators(program).count("aten.linear.default") == 2


def test_a_width_of_whole_numbers_is_no_length():
    """Of a model without a config, what was taken for texts: its code takes one width."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, counts: Tensor) -> Tensor:
            return self.layer(counts.to(torch.float32))

    counts = torch.arange(10).reshape(2, 5)
    program = check(Counts().eval(), {"counts": counts})
    assert all(isinstance(size, int) for size in program.graph.find_nodes(op="placeholder")[0].meta["val"].shape[1:])
    with pytest.raises(UsageError, match="counts"):
        program.module().eval()(counts=counts[:, :4])


# ---- example inputs that a config does not name


def stages(**changes: Any) -> dict[str, Any]:
    return {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3, **changes}


TRANSFORMER: dict[str, Any] = {"num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2]}
IMAGES: dict[str, Any] = {
    "resnet": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=8, **stages())),
    "regnet": lambda: hf.RegNetForImageClassification(hf.RegNetConfig(embedding_size=8, groups_width=8, **stages())),
    "bit": lambda: hf.BitForImageClassification(hf.BitConfig(embedding_size=8, num_groups=4, **stages())),
    "poolformer": lambda: hf.PoolFormerForImageClassification(
        hf.PoolFormerConfig(**TRANSFORMER, **stages(padding=[2, 1]))
    ),
    "segformer": lambda: hf.SegformerForImageClassification(
        hf.SegformerConfig(**TRANSFORMER, **stages(num_attention_heads=[1, 2], sr_ratios=[2, 1], mlp_ratios=[2, 2]))
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_have_the_size_that_their_processor_makes(name: str, tmp_path: Path):
    torch.manual_seed(0)
    IMAGES[name]().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 64}}')
    program = lorafx.capture(tmp_path / "base")
    assert program.example["pixel_values"].shape == (2, 3, 64, 64)
    program.save(tmp_path / "run")
    again = lorafx.load(tmp_path / "run")
    inputs = {"pixel_values": torch.randn(3, 3, 64, 64)}
    assert zoo.distance(zoo.run(program, inputs), zoo.run(again, inputs)) == 0
    with pytest.raises(UsageError, match="dimension 2 of input 'pixel_values' is 96, and the graph holds for 64"):
        program.module()(pixel_values=torch.randn(1, 3, 96, 96))


def test_a_model_without_usual_inputs_is_saved_with_its_own(tmp_path: Path):
    model = hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=8, **stages()))
    model.save_pretrained(tmp_path / "base")
    program = lorafx.capture(tmp_path / "base", inputs={"pixel_values": torch.randn(2, 3, 32, 32)})
    program.save(tmp_path / "run")
    assert lorafx.load(tmp_path / "run").example["pixel_values"].shape == (2, 3, 32, 32)


@pytest.mark.parametrize("changes", [{"pad_token_id": -1}, {"max_position_embeddings": -1}, {"pad_token_id": None}])
def test_negative_numbers_in_a_config_mean_none(changes: dict[str, Any]):
    config = hf.LlamaConfig(**{**zoo.DECODER, **changes})
    check(hf.LlamaForCausalLM(config).eval(), zoo.text(2, 7))
    assert lorafx.capture(hf.LlamaForCausalLM(config)).example["input_ids"].min() >= 0


def encoder_decoder(kind: str) -> nn.Module:
    torch.manual_seed(0)
    tokens: dict[str, Any] = {"vocab_size": 50, "pad_token_id": 0, "eos_token_id": 5, "decoder_start_token_id": 0}
    if kind == "t5":
        return hf.T5ForSequenceClassification(
            hf.T5Config(**tokens, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
        ).eval()
    sizes: dict[str, Any] = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("attention_heads",)}
    layers: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    config = hf.BartConfig(**tokens, **sizes, **layers, d_model=16, max_position_embeddings=40, bos_token_id=1)
    return hf.BartForSequenceClassification(config).eval()


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_classifiers_that_look_for_the_end_of_a_text(kind: str):
    model = encoder_decoder(kind)
    program = lorafx.capture(model)
    ids = torch.randint(6, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[0, 8], ids[1, 5], ids[2, 8] = 5, 5, 5
    ids[1, 6:], mask[1, 6:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert zoo.distance(zoo.eager(model, inputs), zoo.run(program, inputs)) < 1e-5


def test_a_classifier_without_a_padding_token_says_what_to_do():
    with pytest.raises(CaptureError, match=r"if no padding token is defined; set model\.config\.pad_token_id"):
        lorafx.capture(hf.LlamaForSequenceClassification(hf.LlamaConfig(**{**zoo.DECODER, "pad_token_id": None})))


@pytest.mark.parametrize("pad", [None, -1])
def test_a_classifier_of_a_folder_pads_as_its_tokenizer_does(pad: int | None, tmp_path: Path):
    hf.LlamaForCausalLM(hf.LlamaConfig(**{**zoo.DECODER, "pad_token_id": pad})).save_pretrained(tmp_path)
    tokenizer = small.words()
    tokenizer.pad_token, tokenizer.eos_token = None, "w3"
    tokenizer.save_pretrained(tmp_path)
    program = lorafx.capture(tmp_path, task="text-classification", num_labels=3)
    end = tokenizer.convert_tokens_to_ids("w3")
    assert program.config.pad_token_id == end
    text = torch.tensor([[11, 12, 13]])
    both = torch.tensor([[11, 12, 13, end, end], [21, 22, 23, 24, 25]])
    alone = zoo.run(program, {"input_ids": text, "attention_mask": torch.ones_like(text)})["['logits']"]
    beside = zoo.run(program, {"input_ids": both, "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1] * 5])})
    torch.testing.assert_close(beside["['logits']"][:1], alone)


# ---- dropout of recurrent layers


def test_recurrent_layers_have_an_evaluation_form(caplog: pytest.LogCaptureFixture):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = (
                nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True),
                nn.BatchNorm1d(4, track_running_stats=False),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.layer(x)[0].transpose(1, 2))

    check(Recurrent().eval(), {"x": torch.randn(2, 5, 4)})
    assert "captured without" not in caplog.text


class Remembering(nn.Module):
    """Subtracts a running mean, which it updates when it likes."""

    def __init__(self, when: Callable[[nn.Module], bool], decay: float = 0.9):
        super().__init__()
        self.layer, self.when, self.decay = nn.Linear(4, 4), when, decay
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        mean: Any = self.mean
        if self.when(self):
            mean.mul_(self.decay).add_(hidden.detach().mean(0), alpha=1 - self.decay)
        return hidden - mean


def test_what_remembers_while_it_evaluates_is_no_graph():
    model = Remembering(lambda module: True)
    with pytest.raises(CaptureError, match="Remembering changes mean whenever it evaluates") as raised:
        lorafx.capture(model, inputs={"x": torch.randn(2, 4)})
    assert "\n" not in str(raised.value)
    assert not model.mean.any(), "the model is as it was"  # type: ignore[operator, union-attr]


def test_what_remembers_while_it_trains_evaluates_as_the_model(caplog: pytest.LogCaptureFixture):
    model = Remembering(lambda module: module.training)
    model.mean.fill_(2.0)  # type: ignore[operator, union-attr]
    x = torch.randn(2, 4)
    program = lorafx.capture(model, inputs={"x": x})
    assert "it trains as it evaluates" in caplog.text
    graph = program.module().eval()
    assert all(torch.equal(graph(x=x), model.eval()(x)) for _ in range(2))


def test_a_buffer_that_is_written_the_same_each_time_is_captured():
    model = Remembering(lambda module: True, decay=1.0)
    x = torch.randn(2, 4)
    program = lorafx.capture(model, inputs={"x": x})
    for kept in (program, lorafx.fold(program)):
        assert torch.equal(kept.module().eval()(x=x), model.eval()(x))


class CallCounting(nn.Module):
    """Counts its calls, and answers the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        calls: Any = self.calls
        calls.add_(1)
        return self.layer(x)


def test_what_is_only_counted_is_captured_as_it_was():
    model, x = CallCounting(), torch.randn(2, 4)
    program = lorafx.capture(model, inputs={"x": x})
    assert not model.calls.any()  # type: ignore[operator, union-attr]
    assert not program.tensor("calls").any()
    assert torch.equal(lorafx.fold(program).module().eval()(x=x), model.eval()(x))


def test_functions_of_single_elements_are_refused_in_a_line() -> None:
    class Kinds(nn.Module):
        """Looks elements up one by one, as some masks of attention do."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
            with TransformGetItemToIndex():
                found = torch.vmap(lambda place: kinds[place])(torch.arange(kinds.shape[0]))
            return self.layer(x) * found[:, None]

    with pytest.raises(CaptureError, match=r"the model hands a function of its own to each element .*torch\.vmap"):
        lorafx.capture(Kinds().eval(), inputs={"x": torch.randn(3, 4), "kinds": torch.randn(3)})
