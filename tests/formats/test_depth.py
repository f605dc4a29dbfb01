"""Checkpoints of programs that sublayers left: fewer layers where whole ones went, else what is left of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import lorafx
from lorafx.graph.tree import put_tensor
from lorafx.passes.dead_channels import DeadChannels
from lorafx.public import Program
from tests import zoo
from tests.captures import shared

ENDS = ("attn.out", "ffn.down")


def without(program: Program, *closed: tuple[int, str], **options: Any) -> Program:
    """Folded, with the sublayers closed that are in these blocks and end with weights of these roles."""
    result = program.copy()
    for site in program.sites():
        if (site.block, site.role) in closed:
            zero = torch.zeros_like(program.tensor(site.parameter))
            put_tensor(result.root, site.parameter, nn.Parameter(zero, requires_grad=False))
    folded = lorafx.fold(result, gather="never", **options)
    assert len(folded.facts("Taken out")) == len(closed)
    return folded


@shared
def three_layers() -> Program:
    """A decoder of three layers of two kinds."""
    torch.manual_seed(0)
    kinds: Any = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 3}
    config = hf.Qwen3Config(**{**zoo.DECODER, "num_hidden_layers": 3}, **kinds, use_sliding_window=True)
    return lorafx.capture(hf.Qwen3ForCausalLM(config).eval(), inputs=zoo.text(2, 7))


def same(program: Program, folder: Path) -> bool:
    inputs = zoo.text(2, 9)
    # fp32 rounding: the same operators but for those that went.
    return zoo.distance(zoo.run(program, inputs), zoo.run(lorafx.load(folder), inputs)) < 1e-6


@pytest.mark.parametrize("gone", [0, 1])
def test_a_layer_that_went_is_no_layer_of_the_checkpoint(gone: int, tmp_path: Path) -> None:
    folded = without(three_layers(), *((gone, end) for end in ENDS))
    lorafx.export(folded, tmp_path / "folded", "hf")
    config: Any = hf.AutoConfig.from_pretrained(tmp_path / "folded")
    assert config.num_hidden_layers == 2
    assert config.layer_types == [kind for i, kind in enumerate(three_layers().config.layer_types) if i != gone]
    assert same(folded, tmp_path / "folded")
    plain: Any = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    inputs = zoo.text(2, 9)
    assert zoo.distance(zoo.run(folded, inputs), zoo.eager(plain, inputs)) < 1e-6


def test_half_a_layer_is_said_by_what_is_left_of_it(tmp_path: Path) -> None:
    folded = without(three_layers(), (0, "attn.out"), (2, "ffn.down"))
    lorafx.export(folded, tmp_path / "folded", "layered")
    assert same(folded, tmp_path / "folded")
    uniform = without(three_layers(), (0, "attn.out"), (2, "ffn.down"), removal=DeadChannels(uniform=True))
    lorafx.export(uniform, tmp_path / "uniform", "hf")
    assert same(uniform, tmp_path / "uniform")


def test_a_layer_that_leaves_a_norm_behind_stays(tmp_path: Path) -> None:
    folded = without(zoo.captured("bert"), *((1, end) for end in ENDS), removal=DeadChannels(uniform=True))
    lorafx.export(folded, tmp_path / "folded", "hf")
    assert hf.AutoConfig.from_pretrained(tmp_path / "folded").num_hidden_layers == 2
    assert same(folded, tmp_path / "folded")


def test_what_follows_from_the_index_of_a_layer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class whose layers differ by their index alone gives something else with fewer of them."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from lorafx.formats.hf import hf_model

    plain = LlamaDecoderLayer.forward

    def scaled(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, hidden_states * (1 + self.self_attn.layer_idx), *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", scaled)
    program = lorafx.capture(zoo.build("llama"), inputs=zoo.text(2, 7))
    folded = without(program, *((0, end) for end in ENDS))
    model: Any = hf_model(folded)
    assert model.config.num_hidden_layers == 2
