"""Adapters as PEFT makes them, for models of :mod:`tests.zoo`: random in every value, saved in a folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from tests import zoo

R: dict[str, Any] = {"r": 4, "lora_alpha": 6}


@dataclass(frozen=True)
class Case:
    """One adapter: of which model, and the options of its config."""

    model: str
    options: Callable[[], dict[str, Any]]


def _case(model: str, **options: Any) -> Case:
    return Case(model, lambda: {**R, **options})


ATTENTION = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "t5": ["q", "v"]}
_DOWN = ["q_proj", "down_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

CASES: dict[str, Case] = {
    **{f"{name}-plain": _case(name, target_modules=modules) for name, modules in ATTENTION.items()},
    **{f"{name}-dora": _case(name, target_modules=modules, use_dora=True) for name, modules in ATTENTION.items()},
    **{f"{name}-rslora": _case(name, target_modules=modules, use_rslora=True) for name, modules in ATTENTION.items()},
    **{f"{name}-all-linear": _case(name, target_modules="all-linear") for name in ATTENTION},
    "bert-head": _case("bert", target_modules=["query"], task_type="SEQ_CLS"),
    "bert-saved": _case("bert", target_modules=["query"], modules_to_save=["classifier", "pooler"]),
    "bert-bias-all": _case("bert", target_modules=["query"], bias="all"),
    "bert-bias-lora": _case("bert", target_modules=["query"], bias="lora_only"),
    "bert-lora-bias": _case("bert", target_modules=["query", "value"], lora_bias=True),
    "bert-embedding": _case("bert", target_modules=["query", "word_embeddings"]),
    "bert-dora-embedding": _case("bert", target_modules=["query", "word_embeddings"], use_dora=True),
    "bert-patterns": _case(
        "bert", target_modules=["query", "value"], rank_pattern={"query": 2}, alpha_pattern={r"layer\.1\..*": 3}
    ),
    "bert-layers": _case("bert", target_modules=["query"], layers_to_transform=[1], layers_pattern="layer"),
    "bert-excluded": _case("bert", target_modules=["dense"], exclude_modules=["pooler.dense"]),
    "bert-regex": _case("bert", target_modules=r".*layer\.0\..*(query|key)"),
    "bert-large-rank": _case("bert", target_modules=["query", "classifier"], r=40),
    "bert-tokens": _case("bert", target_modules=["query"], trainable_token_indices={"word_embeddings": [7, 3, 100]}),
    "gpt2-embedding": _case("gpt2", target_modules=["wte", "c_fc"]),
    "gpt2-conv1d-flag": _case("gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "gpt2-lora-bias": _case("gpt2", target_modules=["c_attn"], lora_bias=True),
    "gpt2-tokens-tied": _case("gpt2", target_modules=["c_attn"], trainable_token_indices=[3, 9, 50]),
    "gpt2-head-untied": _case("gpt2", target_modules=["c_attn"], modules_to_save=["lm_head"]),
    "gpt2-table-untied": _case("gpt2", target_modules=["c_attn"], modules_to_save=["wte"]),
    "gpt2-head-and-table": _case("gpt2", target_modules=["c_attn"], modules_to_save=["wte", "lm_head"]),
    "llama-lora-bias": _case("llama", target_modules=["q_proj", "o_proj"], lora_bias=True),
    "llama-tokens": _case("llama", target_modules=["q_proj"], trainable_token_indices=[3, 9, 50]),
    "llama-saved": _case("llama", target_modules=_DOWN, modules_to_save=["lm_head", "embed_tokens"]),
    "llama-parameters": _case("llama", target_modules=["q_proj"], target_parameters=["mlp.gate_proj.weight"]),
    "t5-tied-head": _case("t5", target_modules=["q", "lm_head"]),
    "mixtral-attention": _case("mixtral", target_modules=["q_proj", "v_proj"]),
    "mixtral-experts": _case("mixtral", target_modules=[], target_parameters=_EXPERTS),
    "mixtral-one-stack": _case("mixtral", target_modules=["q_proj"], target_parameters=_EXPERTS[1:]),
    "qwen3-moe-attention": _case("qwen3-moe", target_modules=["q_proj", "v_proj"]),
    "qwen3-moe-experts": _case("qwen3-moe", target_modules=["q_proj"], target_parameters=_EXPERTS),
    "qwen3-moe-patterns": _case(
        "qwen3-moe",
        target_modules=[],
        target_parameters=_EXPERTS,
        use_rslora=True,
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={"experts.gate_up_proj": 9},
    ),
    "vit-convolution": _case("vit", target_modules=["projection", "query"]),
    "vit-dora-convolution": _case("vit", target_modules=["projection"], use_dora=True),
}


def adapted(model: nn.Module, options: dict[str, Any]) -> Any:
    """``model`` with PEFT's adapter of these options inside, as if trained: no value is what it was initialised to."""
    with torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice
        torch.manual_seed(1)
        result: Any = peft.get_peft_model(model, peft.LoraConfig(**options))  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in (one for one in result.parameters() if one.requires_grad):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return result.eval()


def save(model: Any, folder: Path) -> Path:
    """The adapter of a PEFT model, written by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def answers(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What PEFT computes with its adapter beside the weights."""
    return zoo.eager(model.base_model.model, inputs)


def base_and_adapter(folder: Path, modules: list[str]) -> Path:
    """``folder`` with a small encoder in ``base``, and in ``adapter`` one for its ``modules`` and its head."""
    model: Any = zoo.build("bert")
    model.save_pretrained(folder / "base")
    save(adapted(model, {**R, "target_modules": modules, "modules_to_save": ["classifier"]}), folder / "adapter")
    return folder
