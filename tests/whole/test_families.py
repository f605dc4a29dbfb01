"""Families of transformers beyond the matrix, each through everything the sweep asks (``benchmarks/families.py``)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lorafx
from benchmarks.families import known, main, stages_of, table
from benchmarks.family_checks import STAGES, Verdict, close_at_random, examine
from benchmarks.family_models import FAMILIES, build, tiny_config
from lorafx.graph.precision import recast
from tests.small import own

#: Kinds of models, not popularity: fused and grouped projections, ALiBi and rotary pairs, experts, sinks, shared
#: blocks, relative positions, learned tokens, convolutions over pixels, features and sound, pooled and pyramid towers.
EXACT = """
big_bird convbert deberta electra fnet layoutlm layoutlmv3 lilt markuplm mobilebert mpnet perceiver roformer squeezebert
bloom codegen cohere deepseek_v3 falcon gpt_neo gpt_oss gptj granitemoe mpt olmo2 phi3 qwen2_moe starcoder2
bart prophetnet umt5 beit convnextv2 efficientnet mobilevit poolformer regnet swin wav2vec2 bert-choice
""".split()  # noqa: SIM905 - a paragraph reads better than 40 lines


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.filterwarnings("default")  # the models' own
def test_family_is_exact(name: str):
    verdict = examine(name, FAMILIES[name], [stage for stage in STAGES if stage != "onnx"])
    assert verdict.verdict == "exact", f"{verdict.stage}: {verdict.reason} {verdict.where}"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_family_that_cannot_be_a_graph_is_refused_with_what_helps():
    verdict = examine("longformer", FAMILIES["longformer"], ["evaluation"])
    assert (verdict.verdict, verdict.stage) == ("refused", "capture")
    assert "modeling_longformer.py" in verdict.reason
    assert verdict.reason.endswith("choose a config or example inputs of your own that do not")


# ---- the sweep itself


def test_there_are_families_enough_and_a_quarter_goes_to_onnx():
    assert len(FAMILIES) >= 150
    assert sum("onnx" in stages_of(name) for name in FAMILIES) >= len(FAMILIES) // 4
    assert set(EXACT) <= FAMILIES.keys()
    assert len(EXACT) == len(set(EXACT)) == 40


def test_configs_are_tiny_wherever_a_size_hides():
    import transformers as hf

    config = tiny_config(hf.CONFIG_MAPPING["clip"], {"vision_config": {"patch_size": 4}})
    assert (config.vision_config.patch_size, config.vision_config.hidden_size) == (4, 32)
    assert (config.text_config.vocab_size, config.text_config.num_hidden_layers) == (120, 2)


def test_closing_zeroes_rows_and_columns_of_every_weight():
    program = recast(lorafx.capture(build(FAMILIES["bert"])), torch.float64)
    close_at_random(program, share=0.5)
    weight = program.tensor("bert.encoder.layer.0.intermediate.dense.weight")
    rows, columns = weight.eq(0).all(1).sum(), weight.eq(0).all(0).sum()
    assert 0 < rows < weight.shape[0]
    assert 0 < columns < weight.shape[1]


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch):
    def off_by_little(program: lorafx.Program, **_: object) -> lorafx.Program:
        folded = program.copy()
        own(folded.root, "classifier.bias").data.add_(1e-6)
        return folded

    monkeypatch.setattr(lorafx, "fold", off_by_little)
    verdict = examine("bert", FAMILIES["bert"], ["evaluation", "lora"])
    assert (verdict.verdict, verdict.stage) == ("differs", "lora")
    assert "['logits'] by" in verdict.reason


def test_results_resume_and_become_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [
        Verdict("a", "A", verdict="crash", stage="lora", reason="old"),
        Verdict("b", "B", verdict="refused", stage="capture", reason="no | graph"),
        Verdict("a", "A"),
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    assert {name: row["verdict"] for name, row in known(file).items()} == {"a": "exact", "b": "refused"}
    assert "2 families: 1 exact, 1 refused, 0 crash, 0 differs." in table(known(file))
    assert "| b | B | refused | capture: no \\| graph |" in table(known(file))
    monkeypatch.setattr("sys.argv", ["families", "--only", "no-such-family"])
    with pytest.raises(SystemExit):
        main()
