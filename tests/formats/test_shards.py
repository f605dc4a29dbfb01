"""A checkpoint written a tile at a time is the one transformers and safetensors would have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from lorafx.deferred import tiles
from lorafx.deferred.tensor import deferred
from lorafx.files.folder import file_hash
from lorafx.formats.shards import write_checkpoint, write_file

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}


def models() -> dict[str, nn.Module]:
    llama = hf.LlamaConfig(**SIZES, intermediate_size=40, num_key_value_heads=2, tie_word_embeddings=True)
    mixtral = hf.MixtralConfig(**SIZES, intermediate_size=40, num_key_value_heads=2, num_local_experts=3)
    t5 = hf.T5Config(d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4, vocab_size=61)
    gpt2 = hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=61, n_positions=16)
    return {
        "tied": hf.LlamaForCausalLM(llama),
        "in bf16": hf.LlamaForCausalLM(llama).to(torch.bfloat16),
        "experts in one tensor": hf.MixtralForCausalLM(mixtral),
        "three names of one tensor": hf.T5ForConditionalGeneration(t5),
        "buffers": hf.GPT2LMHeadModel(gpt2),
        "a bare encoder": hf.BertModel(hf.BertConfig(**SIZES, intermediate_size=40)),
    }


def put_off(model: nn.Module) -> nn.Module:
    """The model with every parameter computed later; ties stay."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                made.setdefault(id(value), nn.Parameter(deferred(value.detach()), requires_grad=False))
                module._parameters[name] = made[id(value)]
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


@pytest.mark.parametrize("size", ["20KB", "5GB"])
@pytest.mark.parametrize("name", models())
def test_the_folder_is_the_one_transformers_writes(
    name: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE", 100)
    model = models()[name].eval()
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)  # type: ignore[operator]
    (tmp_path / "ours").mkdir()
    entries = write_checkpoint(put_off(model), tmp_path / "ours", size)
    ours, theirs = (sorted(file.name for file in (tmp_path / side).iterdir()) for side in ("ours", "theirs"))
    assert ours == theirs
    for file in ours:
        left, right = ((tmp_path / side / file).read_bytes() for side in ("ours", "theirs"))
        same = json.loads(left) == json.loads(right) if file.endswith(".json") else left == right
        assert same, file
    for file, entry in entries.items():
        assert (entry.sha256, entry.size) == (
            file_hash(tmp_path / "ours" / file),
            (tmp_path / "ours" / file).stat().st_size,
        )
    assert set(entries) == {file for file in ours if file.endswith(".safetensors")}


def test_a_file_is_the_one_safetensors_writes_bit_by_bit(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    held = {f"of {kind}": torch.arange(12).reshape(3, 4).to(kind) for kind in (*kinds, torch.int8, torch.uint8)}
    held |= {"yes or no": torch.tensor([True, False]), "one number": torch.tensor(2.5), "nothing": torch.zeros(0, 4)}
    save_file(held, tmp_path / "theirs", metadata={"format": "pt"})
    entry = write_file(tmp_path / "ours", held)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert entry.sha256 == file_hash(tmp_path / "theirs")


def test_values_that_lie_otherwise_in_memory_are_written_row_by_row(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    write_file(tmp_path / "file", {"turned": base.t(), "turned later": deferred(base).t()})
    found = load_file(tmp_path / "file")
    assert torch.equal(found["turned"], base.t())
    assert torch.equal(found["turned later"], base.t())
