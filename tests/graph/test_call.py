"""A call gives what the eager model gives for the same call, or names the input in an error; nothing is dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lorafx
from lorafx.errors import UsageError
from lorafx.passes.lora import Lora
from lorafx.training.trainer import Trainer
from tests import small, zoo
from tests.captures import shared

IDS = torch.randint(5, small.VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
TYPES = torch.tensor([[0] * 4 + [1] * 4] * 2)
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def t5() -> nn.Module:
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    tokens: dict[str, Any] = {"vocab_size": small.VOCABULARY, "pad_token_id": 0, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **tokens, eos_token_id=3, dropout_rate=0.0))


def xlm() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": small.VOCABULARY, "emb_dim": 16, "n_layers": 1, "n_heads": 2, "pad_index": 2}
    return hf.XLMForSequenceClassification(hf.XLMConfig(**sizes, dropout=0.0, attention_dropout=0.0, pad_token_id=2))


def built(build: Any) -> nn.Module:
    """The same model at each call, in evaluation mode, its parameters large enough for every input to matter."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return model


@shared
def captured(build: Any) -> lorafx.Program:
    """That model captured with inputs as they are made up."""
    return lorafx.capture(built(build))


def same(model: nn.Module, program: lorafx.Program, call: dict[str, Any]) -> None:
    expected, found = zoo.eager(model, call), zoo.run(program, call)
    assert expected.keys() == found.keys()
    assert zoo.distance(expected, found) < 1e-5


# ---- inputs beyond those captured


@pytest.mark.parametrize(
    ("build", "name", "value"),
    [
        (small.llama, "position_ids", PACKED),
        (small.gpt2, "position_ids", PACKED),
        (small.bert, "token_type_ids", TYPES),
        (small.bert, "position_ids", torch.arange(8).flip(0).expand(2, 8)),
        (small.llama, "inputs_embeds", torch.randn(2, 8, 32)),
        (t5, "decoder_attention_mask", MASK),
        (small.bert, "output_hidden_states", True),
        (small.bert, "output_attentions", True),
        (small.bert, "return_dict", False),
        (small.llama, "use_cache", True),
        (small.bert, "attention_masks", MASK),
    ],
)
def test_what_a_program_was_captured_without_is_refused_by_name(build: Any, name: str, value: Any):
    program = captured(build)
    targets = {"decoder_input_ids": IDS} if build is t5 else {}
    for module in (program.module(), lorafx.rewrite(program, [Lora(rank=2)]).module().eval()):
        with pytest.raises(UsageError, match=f"{name}'"):
            module(**TEXT, **targets, **{name: value})


def test_a_misspelt_input_is_told_from_one_that_was_not_captured():
    with pytest.raises(UsageError, match=r"takes no input 'attention_masks' \(did you mean 'attention_mask'\?\)"):
        captured(small.bert).module()(input_ids=IDS, attention_masks=MASK)


@pytest.mark.parametrize(
    ("build", "extra"),
    [
        (small.bert, {"token_type_ids": torch.zeros_like(IDS)}),
        (small.bert, {"position_ids": torch.arange(8).expand(2, 8)}),
        (small.llama, {"position_ids": torch.arange(8).expand(2, 8)}),
        (small.bert, {"output_hidden_states": False, "return_dict": True, "token_type_ids": None}),
        (small.llama, {"use_cache": False}),
    ],
)
def test_what_the_model_computes_with_anyway_may_be_said(build: Any, extra: dict[str, Any]):
    model = built(build)
    program = lorafx.capture(model)
    expected = zoo.run(program, TEXT)
    found = zoo.run(program, {**TEXT, **extra})
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    same(model, program, TEXT)


@pytest.mark.parametrize(
    ("build", "extra"),
    [
        (small.llama, {"position_ids": PACKED}),
        (small.bert, {"token_type_ids": TYPES}),
        (small.bert, {"output_hidden_states": True}),
        (t5, {"decoder_input_ids": IDS.flip(1), "decoder_attention_mask": MASK.flip(1)}),
        (lambda: hf.BertModel(small.bert_config()), {"token_type_ids": TYPES, "position_ids": PACKED}),
    ],
)
def test_what_was_captured_is_computed_with(build: Any, extra: dict[str, Any]):
    model = built(build)
    program = lorafx.capture(model, inputs={**TEXT, **extra})
    other = {name: value.flip(1).repeat(2, 1) if isinstance(value, Tensor) else value for name, value in extra.items()}
    text = {name: value.repeat(2, 1) for name, value in TEXT.items()}
    same(model, program, {**TEXT, **extra})
    same(model, program, {**text, **other})


# ---- inputs left out


def test_a_mask_left_out_is_what_the_model_makes_of_it():
    for build in (small.bert, small.llama):
        model = built(build)
        program = lorafx.capture(model)
        same(model, program, {"input_ids": IDS[:, :5]})


def test_a_default_has_the_length_of_its_own_text():
    model = built(t5)
    inputs = {**TEXT, "decoder_input_ids": IDS.flip(1), "decoder_attention_mask": torch.ones_like(IDS)}
    program = lorafx.capture(model, inputs=inputs)
    same(model, program, {**TEXT, "decoder_input_ids": IDS[:, :3]})


@pytest.mark.parametrize(
    ("build", "captured", "given", "missing"),
    [
        # Zeros for token types would add the embedding of token 0.
        (small.gpt2, {**TEXT, "token_type_ids": TYPES}, TEXT, "token_type_ids"),
        # Without a mask the padding tokens say how long texts are.
        (xlm, TEXT, {"input_ids": IDS}, "attention_mask"),
        # Without a mask positions say which texts are packed into one row.
        (small.llama, {**TEXT, "position_ids": PACKED}, {"input_ids": IDS, "position_ids": PACKED}, "attention_mask"),
        (small.bert, TEXT, {"attention_mask": MASK}, "input_ids"),
    ],
)
def test_what_has_no_constant_default_is_missing(build: Any, captured: Any, given: dict[str, Any], missing: str):
    program = lorafx.capture(built(build), inputs=captured)
    with pytest.raises(UsageError, match=f"missing input '{missing}'"):
        program.module().eval()(**given)


# ---- arguments that are no tensors, and positions


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor | None = None, scale: float = 2.0, pair: Any = None) -> Tensor:
        value = self.layer(x) * scale
        value = value if y is None else value - y
        return value if pair is None else value + pair[0] * pair[1]


def test_settings_are_those_of_the_capture():
    model, x, y = Scaled().eval(), torch.randn(2, 8), torch.randn(2, 8)
    inputs = {"y": y, "x": x, "scale": 3.0, "pair": (torch.randn(2, 8), torch.randn(2, 8))}
    module = lorafx.capture(model, inputs=inputs).module().eval()
    assert torch.equal(module(**inputs), model(**inputs))
    assert torch.equal(module(x, y, 3.0, inputs["pair"]), model(**inputs)), "positions are the eager model's"
    for changed in ({**inputs, "scale": 2.0}, {"x": x, "y": y, "pair": inputs["pair"]}):
        with pytest.raises(UsageError, match=r"input 'scale' is 3\.0 in its graph, not 2\.0"):
            module(**changed)
    with pytest.raises(UsageError, match=r"dimension 0 of input 'pair\[0\]' is 3"):
        module(**{**inputs, "pair": (torch.randn(3, 8), torch.randn(3, 8))})
    with pytest.raises(UsageError, match="'x' is given twice"):
        module(x, x=x)
    with pytest.raises(UsageError, match="takes 4 arguments, not 5"):
        module(x, y, 3.0, None, 1)
    default = lorafx.capture(model, inputs={"x": x, "scale": 2.0}).module().eval()
    assert torch.equal(default(x=x), model(x))


def test_targets_that_the_loss_does_not_take_are_refused():
    with pytest.raises(UsageError, match=r"its loss takes \['labels'\], not 'start_positions'"):
        captured(small.bert).module()(**TEXT, labels=torch.tensor([0, 1]), start_positions=IDS[:, 0])


# ---- under a Trainer


def packed_loss(cls: Any, model: nn.Module, folder: Path) -> float:
    rows = [{"input_ids": IDS[0, : 4 + length].tolist()} for length in range(3)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    arguments = hf.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=3, max_steps=1, learning_rate=0.0, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    return (
        cls(model, arguments, train_dataset=rows, data_collator=hf.DataCollatorWithFlattening()).train().training_loss
    )


def test_texts_packed_by_a_collator_do_not_see_each_other(tmp_path: Path):
    expected = packed_loss(hf.Trainer, built(small.llama), tmp_path)
    unaware = lorafx.rewrite(captured(small.llama), [Lora(rank=2)])
    with pytest.raises(UsageError, match="captured without 'position_ids'"):
        packed_loss(Trainer, unaware.module(), tmp_path)
    one = {"input_ids": IDS[:1], "position_ids": PACKED[:1]}
    program = lorafx.rewrite(lorafx.capture(built(small.llama), inputs=one), [Lora(rank=2)])
    assert packed_loss(Trainer, program.module(), tmp_path) == pytest.approx(expected, abs=1e-5)


def test_a_column_of_a_dataset_that_the_model_would_use_is_not_dropped(tmp_path: Path):
    program = lorafx.rewrite(captured(small.llama), [Lora(rank=2)])
    rows = [{"input_ids": IDS[0], "position_ids": PACKED[0], "labels": IDS[0]}] * 2
    with pytest.raises(UsageError, match="captured without 'position_ids'"):
        lorafx.train(program, rows, epochs=1, progress=False)
