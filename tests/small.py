"""What training tests share with their two-process worker: tiny models, words, a table, a method that keeps notes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from lorafx.base import Method, option
from lorafx.frontend.capture import capture
from lorafx.graph.edit import Edit
from lorafx.graph.site import Site
from lorafx.graph.state import MethodState
from lorafx.passes.lora import Lora
from lorafx.pipeline import rewrite
from lorafx.public import Program
from lorafx.testing.captures import own as own
from tests.captures import shared

WORDS = [f"w{number}" for number in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = len(WORDS) + len(SPECIAL)
POSITIONS = 32


def words() -> Any:
    """A tokenizer of whole words that brackets a text with [CLS] and [SEP], as BERT's does."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def bert_config(**changes: Any) -> hf.BertConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    plain: dict[str, Any] = {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": 0,
        "num_labels": 2,
    }
    return hf.BertConfig(
        **{"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, **sizes, **plain, **changes}
    )


def bert(**changes: Any) -> nn.Module:
    return hf.BertForSequenceClassification(bert_config(**changes))


def gpt2(**changes: Any) -> nn.Module:
    drops: dict[str, Any] = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    ends: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_positions": POSITIONS,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
    }
    return hf.GPT2LMHeadModel(hf.GPT2Config(**{**sizes, **drops, **ends, **changes}))


def llama(**changes: Any) -> nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    rest: dict[str, Any] = {"num_key_value_heads": 2, "max_position_embeddings": POSITIONS, "pad_token_id": 0}
    ends: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 3}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{"vocab_size": VOCABULARY, **sizes, **rest, **ends, **changes}))


@dataclass(frozen=True)
class Notes(Lora):
    """LoRA that also uses every hook of a method, and notes what it was told.

    ``notes`` of each module: steps seen, the clock after the last one, the steps to come in all, and the sum of
    squares of A's gradient. Each step also shrinks B, so that a hook called once too often or too seldom shows.
    """

    weight: float = option(0.01, "weight of the penalty, the sum of squares of A")

    def rewrite(self, edit: Edit, site: Site) -> None:
        super().rewrite(edit, site)
        node = edit.parameter(site, "notes", (4,), nn.init.zeros_, role="statistic")
        edit.program.tensor(str(node.target)).requires_grad_(False)

    def penalty(self, state: MethodState) -> Tensor | None:
        return self.weight * torch.stack([site["lora_A"].square().sum() for site in state.sites]).sum()

    def before_step(self, state: MethodState) -> None:
        for site in state.sites:
            gradient = site["lora_A"].grad
            assert gradient is not None
            site["notes"][3] = gradient.square().sum()

    def after_step(self, state: MethodState) -> None:
        for site in state.sites:
            site["notes"][:3] += torch.tensor([1.0, 0.0, 0.0])
            site["notes"][1:3] = torch.tensor([float(state.step), float(state.total_steps or -1)])
            site["lora_B"].mul_(0.99)


@shared
def captured(build: Any = bert, seed: int = 0, **changes: Any) -> Program:
    """The captured model of a builder, made once a process. Rewrites of it train storage of their own."""
    torch.manual_seed(seed)
    return capture(build(**changes), inputs=example(build is bert))


def example(types: bool) -> dict[str, Tensor]:
    ids = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": ids.ne(0).long()}
    return {**inputs, "token_type_ids": torch.zeros_like(ids)} if types else inputs


def adapted(program: Program | None = None, method: Method | None = None, seed: int = 1) -> Program:
    """A rewritten program with initial adapters fixed by ``seed``; B is not zero, so that every gradient is one."""
    base = program or captured()
    torch.manual_seed(seed)
    result = rewrite(base, [method or Notes(rank=2)])
    for name, value in result.trainable().items():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.05)
    return result


def table(rows: int = 64, seed: int = 0) -> dict[str, list[Any]]:
    """Sentences of random words, 1 to 9 of them; the label says whether the first is of the second half."""
    chance = random.Random(seed)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(1, 9))) for _ in range(rows)]
    return {"text": texts, "label": [int(int(text.split()[0][1:]) >= len(WORDS) // 2) for text in texts]}


def learned(program: Program) -> dict[str, Tensor]:
    """A copy of what a program has learned."""
    return {name: value.clone() for name, value in program.learned().items()}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)
