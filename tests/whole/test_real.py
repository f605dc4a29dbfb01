"""Real checkpoints: MiniLM and SmolLM2, through rewrite, fold and export."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

import lorafx
from lorafx.passes.lora import Lora
from lorafx.public import Program

pytestmark = pytest.mark.slow


def randomise(program: Program) -> None:
    """Give every B values as training would, so that folding changes the weights."""
    generator = torch.Generator().manual_seed(0)
    for name in program.names("adapter"):
        if "lora_B" in name:
            value = program.tensor(name)
            with torch.no_grad():
                value.copy_(0.02 * torch.randn(value.shape, generator=generator))


def test_minilm_exports_with_the_fused_operators_of_transformers_own_export(minilm: Path, tmp_path: Path) -> None:
    import onnx
    from transformers import AutoModelForSequenceClassification
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    from lorafx.models.examples import dynamic_shapes, example_inputs

    program = lorafx.capture(minilm, task="text-classification", num_labels=2)
    program = lorafx.rewrite(program, [Lora(rank=8)])
    randomise(program)
    result = lorafx.export(program, tmp_path / "lorafx")
    assert result is not None
    assert result.ok
    model = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2).eval()
    inputs = example_inputs(model, minilm)
    config = OnnxConfig(dynamic=True, dynamic_shapes=dynamic_shapes(model, inputs), ort_fusions="cpu")
    OnnxExporter().export(model, inputs, config).save_pretrained(tmp_path / "transformers")

    def operators(folder: str) -> Counter[str]:
        graph = onnx.load(str(tmp_path / folder / "model.onnx"), load_external_data=False).graph
        return Counter(node.op_type for node in graph.node)

    theirs = operators("transformers")
    assert theirs["SkipLayerNormalization"] == 12
    # All of theirs but these, which are faster apart.
    apart = Counter({"Sum": theirs.pop("SkipLayerNormalization"), "LayerNormalization": 12})
    # Of the last block one token is computed: its query by itself, and its row of the mask.
    one_token = Counter({"MatMul": 1, "Slice": 3, "Cast": 2})
    one_token += Counter(("Expand", "Mul", "ReduceSum", "Less", "Transpose"))
    assert operators("lorafx") == theirs + apart + one_token


def test_smollm2_folds_into_a_checkpoint_plain_transformers_opens(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    program = lorafx.rewrite(lorafx.capture(smollm2), [Lora(targets="all-linear", rank=8)])
    assert len(program.history[0].taken) == 30 * 7
    randomise(program)
    folded = lorafx.fold(program)
    result = lorafx.export(folded, tmp_path / "folded", format="hf")
    assert result is not None
    assert result.ok
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folded")
    batch = tokenizer(["The capital of France is", "Once upon a time there was"], padding=True, return_tensors="pt")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    base = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    module = program.module().eval()
    with torch.no_grad():
        merged, unmerged, before = plain(**batch).logits, module(**batch).logits, base(**batch).logits
    seen = batch["attention_mask"].bool()
    scale = unmerged[seen].abs().max()
    # fp32 over 30 layers in another order of operations; the adapters themselves move the logits a thousand times more.
    assert (merged[seen] - unmerged[seen]).abs().max() < 1e-5 * scale
    assert (before[seen] - unmerged[seen]).abs().max() > 1e-2 * scale
    assert plain.config.tie_word_embeddings
