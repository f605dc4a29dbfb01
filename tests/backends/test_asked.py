"""What transformers' generation asks of a model, where that is other than what the model computes of whole texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lorafx
from benchmarks.family_models import Family, build, two_texts
from lorafx.backends.asked import check_lengths
from lorafx.backends.cached import decode_inputs
from lorafx.backends.decoder import Decoder, genai_config
from lorafx.backends.halves import halves
from lorafx.backends.late_weights import StandIns
from lorafx.backends.replay import _lay_out
from lorafx.errors import CaptureError
from lorafx.models.examples import example_inputs
from lorafx.proof.open import open_runner
from lorafx.proof.ties import chosen_among_equals
from tests.backends.test_encoder_decoder import TOKENS, moved
from tests.small import POSITIONS, VOCABULARY, llama

SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24}
NAMES: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
TEXT: dict[str, Any] = {**SIZES, **NAMES, "max_position_embeddings": POSITIONS}


def roberta(**changes: Any) -> nn.Module:
    return hf.RobertaForCausalLM(hf.RobertaConfig(**TEXT, **changes))


def bart_decoder() -> nn.Module:
    sizes: dict[str, Any] = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
    return hf.BartForCausalLM(hf.BartConfig(**sizes, **NAMES, max_position_embeddings=POSITIONS))


def gpt() -> nn.Module:
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS}
    return hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(**sizes, vocab_size=VOCABULARY, pad_token_id=0))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (roberta(is_decoder=True), "gives it position_ids from 0, others than those that it counts by itself"),
        (roberta(), r"what follows a token changes what it says of it \(is_decoder = false in its config\)"),
        (bart_decoder(), "it counts padding before a text among the text's positions"),
        (gpt(), "it has no cache, and reads the whole text again for each token"),
    ],
    ids=["positions", "both ways", "padding", "no cache"],
)
def test_what_would_generate_other_than_it_was_trained_is_refused_with_why(model: nn.Module, said: str) -> None:
    moved(model)
    with pytest.raises(CaptureError, match=f"{type(model).__name__}: .*{said}.*; export it without generate"):
        decode_inputs(model, example_inputs(model))


def test_a_model_whose_weights_are_computed_later_is_judged_by_its_values() -> None:
    model = moved(roberta(is_decoder=True))
    hollow = StandIns().hollow(model, torch.float16)
    with pytest.raises(CaptureError, match="gives it position_ids from 0"):
        decode_inputs(hollow, example_inputs(model), model)


def test_a_decoder_that_is_asked_for_what_it_computes_is_taken() -> None:
    model = moved(hf.BertLMHeadModel(hf.BertConfig(**TEXT, is_decoder=True)))
    inputs, _ = decode_inputs(model, example_inputs(model))
    assert {"input_ids", "attention_mask"} < inputs.keys()


class Blocks(nn.Module):
    """Logits of tokens whose places in blocks of four are known: its code branches on how many blocks there are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = llama(num_hidden_layers=1)
        self.config, self.main_input_name = self.inner.config, "input_ids"

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        result: Any = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        return {"logits": result.logits * (1.0 if input_ids.shape[1] <= 4 else 2.0)}


def test_an_encoder_of_texts_of_some_lengths_alone_is_refused() -> None:
    program = lorafx.capture(Blocks().eval(), check=False)
    why = "the graph holds for 5 .*; the graph of an encoder is given texts of every length and can refuse none"
    with pytest.raises(CaptureError, match=why):
        check_lengths(program)


def test_a_config_without_an_end_of_texts_is_told_without() -> None:
    cache = [ir.val(f"past_key_values.0.{part}", shape=ir.Shape(["b", 2, "p", 8])) for part in ("key", "value")]
    graph = ir.Graph(cache, [], nodes=[], opset_imports={"": 20})
    config = hf.RoCBertConfig(**SIZES, vocab_size=VOCABULARY, pad_token_id=0, is_decoder=True)
    said = genai_config(Decoder(ir.Model(graph, ir_version=10), config, 0, 1), None)["model"]
    assert "eos_token_id" not in said
    assert said["pad_token_id"] == 0


def test_states_that_nobody_reads_are_left_out_of_both_graphs() -> None:
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = hf.T5Config(**sizes, **TOKENS, output_hidden_states=True)
    encoder, decoder = halves(lorafx.fold(lorafx.capture(moved(hf.T5ForConditionalGeneration(config)))))
    first, second = (half.module(**half.inputs) for half in (encoder, decoder))
    assert list(first) == ["last_hidden_state"]
    assert [name for name in second if not name.startswith("present")] == ["logits"]


# ---- complex numbers


class Rotation(nn.Module):
    """Pairs of numbers turned by their position, through complex numbers."""

    def forward(self, pairs: Tensor, angles: Tensor) -> Tensor:
        turns = torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(torch.view_as_complex(pairs) * turns[:, None].unsqueeze(-1))


def test_complex_numbers_get_an_axis_by_their_parts() -> None:
    given = torch.randn(2, 3, 5, 2), torch.randn(2)
    exported = torch.export.export(Rotation(), given)
    expected = Rotation()(*given)
    _lay_out(exported)
    axes = exported.graph.find_nodes(op="call_function", target=torch.ops.aten.unsqueeze.default)
    assert len(axes) == 2
    assert not any(node.meta["val"].is_complex() for node in axes)
    torch.testing.assert_close(exported.module()(*given), expected, rtol=0, atol=0)


# ---- equal values


class Picky(nn.Module):
    """The sum of the two largest of some numbers, negative ones as 0 where ``flat``."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat, self.weigh = flat, nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.weigh(x)
        places = (scores.relu() if self.flat else scores).topk(2).indices
        return scores.gather(-1, places).sum(-1)


def test_a_choice_among_equal_values_is_named() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {"x": -torch.rand(4, 6, generator=generator)}
    flat, plain = (lorafx.capture(Picky(flat).eval(), inputs=inputs) for flat in (True, False))
    with torch.no_grad():
        for program in (flat, plain):
            program.root.get_parameter("weigh.bias").sub_(10.0)  # no score is above 0
    assert "picks some of several equal values" in chosen_among_equals(flat)
    assert chosen_among_equals(plain) == ""


# ---- whole models

_SIDE: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 2,
    "head_dim": 8,
    **NAMES,
    "sliding_window": 4,
    "query_pre_attn_scalar": 8,
}
_BOTH: dict[str, Any] = {**TOKENS, "bos_token_id": 2}


def llama4() -> nn.Module:
    sizes: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 24}
    experts: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1, "attention_chunk_size": 4}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**sizes, **experts, **NAMES, max_position_embeddings=POSITIONS))


def t5gemma() -> nn.Module:
    sides: dict[str, Any] = {"encoder": dict(_SIDE), "decoder": dict(_SIDE)}
    return hf.T5GemmaForConditionalGeneration(hf.T5GemmaConfig(**sides, **_BOTH))


def t5gemma2() -> nn.Module:
    family = Family("t5gemma2", "ForSeq2SeqLM", two_texts)
    return build(family)


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama4, t5gemma, t5gemma2])
def test_tokens_are_those_of_transformers(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Of a rotation by complex numbers, of outputs beside those read, of masks made element by element."""
    torch.manual_seed(0)
    model: Any = moved(make())
    result = lorafx.export(lorafx.capture(model), tmp_path / "out", generate=True)
    assert result is not None
    assert result.ok
    decoder, asked = open_runner(tmp_path / "out").decoder, torch.tensor([[9, 11, 20, 8, 30, 12, 7]])
    speaker, ids = decoder.begin(asked, torch.ones_like(asked))[:2]
    ends: dict[str, Any] = {"eos_token_id": None, "decoder_start_token_id": int(ids[0, 0])}
    model.generation_config = hf.GenerationConfig(pad_token_id=0, **(ends if ids.shape[1] == 1 else {}))
    expected = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=16, do_sample=False)
    given, past = ids, speaker.empty(1)
    for _ in range(16):
        logits, past = speaker.step(given, torch.ones_like(ids), past)
        given = logits[:, -1:].argmax(-1)
        ids = torch.cat((ids, given), 1)
    assert ids.tolist() == expected.tolist()
