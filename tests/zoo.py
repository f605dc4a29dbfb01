"""Tiny random models of every family the capture matrix covers: two layers, all parameters away from 0 and 1."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lorafx.frontend.capture import capture
from lorafx.graph.tree import named_tensors, persistent, put_tensor
from lorafx.public import Program
from lorafx.testing.models import (
    DROPOUT,
    FAMILIES,
    IMAGE_SIZES,
    LABELS,
    TEXT_SIZES,
    VOCABULARY,
    Entry,
    built,
    generator,
    hidden_dropout,
    image,
    tensors,
    text,
)
from lorafx.testing.models import captured as laws_have
from lorafx.testing.models import randomised as randomised
from tests.captures import shared

# ---- inputs


def two_texts(batch: int, length: int) -> dict[str, Any]:
    """Encoder and decoder inputs; the decoder's sequence is one longer, so that no dimension is shared by accident."""
    target = torch.randint(5, VOCABULARY, (batch, length + 1), generator=generator(batch, length))
    return {**text(batch, length), "decoder_input_ids": target}


def sound(batch: int, length: int) -> dict[str, Any]:
    """Mel features, 8 bins × 32 frames."""
    return {"input_features": torch.randn(batch, 8, 32, generator=generator(batch, length))}


# ---- builders

DECODER: dict[str, Any] = {**TEXT_SIZES, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 2, "eos_token_id": 3}


def _roberta(p: float) -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT_SIZES, **hidden_dropout(p)))


def _distilbert(p: float) -> nn.Module:
    sizes: dict[str, Any] = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 80}
    dropouts: dict[str, Any] = {"dropout": p, "attention_dropout": p, "seq_classif_dropout": p}
    tokens: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 1, "num_labels": LABELS}
    config = hf.DistilBertConfig(**tokens, **sizes, **dropouts)
    return hf.DistilBertForSequenceClassification(config)


def _deberta(p: float) -> nn.Module:
    relative: dict[str, Any] = {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
    }
    buckets: dict[str, Any] = {
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "max_relative_positions": -1,
    }
    config = hf.DebertaV2Config(**TEXT_SIZES, **hidden_dropout(p), **relative, **buckets, pooler_dropout=p)
    return hf.DebertaV2ForSequenceClassification(config)


def _albert(p: float) -> nn.Module:
    config = hf.AlbertConfig(**TEXT_SIZES, **hidden_dropout(p), embedding_size=16, classifier_dropout_prob=p)
    return hf.AlbertForSequenceClassification(config)


def _modernbert(p: float) -> nn.Module:
    dropouts: dict[str, Any] = {
        "embedding_dropout": p,
        "mlp_dropout": p,
        "attention_dropout": p,
        "classifier_dropout": p,
    }
    window: dict[str, Any] = {"local_attention": 8, "layer_types": ["full_attention", "sliding_attention"]}
    config = hf.ModernBertConfig(
        **TEXT_SIZES, **dropouts, **window, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3
    )
    return hf.ModernBertForSequenceClassification(config)


def _llama(p: float) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, attention_dropout=p))


def _qwen3(p: float) -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, attention_dropout=p, tie_word_embeddings=True))


def _gemma(p: float) -> nn.Module:
    return hf.GemmaForCausalLM(hf.GemmaConfig(**DECODER, attention_dropout=p))


def _mistral(p: float) -> nn.Module:
    return hf.MistralForCausalLM(hf.MistralConfig(**DECODER, attention_dropout=p, sliding_window=8))


def _mixtral(p: float) -> nn.Module:
    experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, attention_dropout=p, **experts))


def _qwen3_moe(p: float) -> nn.Module:
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**DECODER, **experts, attention_dropout=p))


def _gpt_oss(p: float) -> nn.Module:
    experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return hf.GptOssForCausalLM(hf.GptOssConfig(**DECODER, **experts, attention_dropout=p))


def _llama4(p: float) -> nn.Module:
    experts: dict[str, Any] = {"num_local_experts": 3, "num_experts_per_tok": 1, "intermediate_size_mlp": 40}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**DECODER, **experts, attention_dropout=p))


def _t5(p: float) -> nn.Module:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    tokens: dict[str, Any] = {"pad_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 3}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCABULARY, **sizes, **tokens, dropout_rate=p))


def _clip(p: float) -> nn.Module:
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(**IMAGE_SIZES, attention_dropout=p))


def _whisper(p: float) -> nn.Module:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    sizes: dict[str, Any] = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    dropouts: dict[str, Any] = {"dropout": p, "attention_dropout": p, "activation_dropout": p}
    tokens: dict[str, Any] = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 4}
    return WhisperEncoder(
        hf.WhisperConfig(**sizes, **dropouts, **tokens, num_mel_bins=8, max_source_positions=16, vocab_size=VOCABULARY)
    )


ZOO: dict[str, Entry] = {
    "bert": FAMILIES["bert"],
    "roberta": Entry(_roberta, text),
    "distilbert": Entry(_distilbert, text),
    "deberta-v2": Entry(_deberta, text),
    "albert": Entry(_albert, text),
    "modernbert": Entry(_modernbert, text),
    "gpt2": FAMILIES["gpt2"],
    "llama": Entry(_llama, text),
    "qwen3": Entry(_qwen3, text),
    "gemma": Entry(_gemma, text),
    "mistral": Entry(_mistral, text),
    "mixtral": Entry(_mixtral, text),
    "t5": Entry(_t5, two_texts),
    "vit": FAMILIES["vit"],
    "clip-vision": Entry(_clip, image, free_length=False),
    "whisper-encoder": Entry(_whisper, sound, free_length=False),
}

#: Families that single tests are about, beside those of the matrix.
MORE: dict[str, Entry] = {
    "qwen3-moe": Entry(_qwen3_moe, text),
    "gpt-oss": Entry(_gpt_oss, text),
    "llama4": Entry(_llama4, text),
}


def entry(name: str) -> Entry:
    """A family by name."""
    return (ZOO | MORE)[name]


def build(name: str, dropout: float = DROPOUT, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh model, the same at each call, in evaluation mode (:func:`lorafx.testing.models.built`)."""
    return built(entry(name), dropout, dtype)


def captured(name: str, dropout: float = DROPOUT, dtype: torch.dtype = torch.float32) -> Program:
    """The captured model, made once (:mod:`lorafx.testing.captures`), whoever asks."""
    return (laws_have if name in FAMILIES else _captured)(name, dropout, dtype)


@shared
def _captured(name: str, dropout: float, dtype: torch.dtype) -> Program:
    return capture(build(name, dropout, dtype))


def eager(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What the eager model gives for ``inputs``, without a cache of keys and values."""
    cacheless = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        return tensors(model(**inputs, **cacheless))


def doubled(program: Program) -> Program:
    """The program in fp64, casts to fp32 inside it included, so that 1e-12 can be asked of algebra."""
    result = program.copy()
    wide: dict[int, Tensor] = {}
    for name, value in list(named_tensors(result.root)):
        if value.is_floating_point():
            kind = nn.Parameter if isinstance(value, nn.Parameter) else Tensor.double
            wide.setdefault(id(value), kind(value.detach().double()))
            put_tensor(result.root, name, wide[id(value)], persistent(result.root, name))

    def widen(argument: Any) -> Any:
        return torch.float64 if argument is torch.float32 else argument

    result.example = widened(result.example)
    for node in result.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(widen, (node.args, node.kwargs))
    return result


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs for a program in fp64."""
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def run(program: Program, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The outputs of the evaluation graph."""
    with torch.no_grad():
        return tensors(program.module().eval()(**inputs))


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of two outputs, relative to the largest value of each tensor of the first."""
    assert a.keys() == b.keys()
    assert all(value.isfinite().all() for value in a.values())
    return max(float((a[key] - b[key]).abs().max() / a[key].abs().max()) for key in a)
