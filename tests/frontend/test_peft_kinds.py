"""Every kind of adapter in PEFT's own suite, once: captured in PEFT's wrapper, folded, as exact as PEFT's merge.

The suite itself is ``benchmarks/peft_suite.py``. AdaMSS is there alone: it needs scikit-learn.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lorafx
from benchmarks.peft_judge import Finding, examine, trained, widened
from benchmarks.peft_suite import known, table
from lorafx.frontend.tuners import unwrapped
from tests import zoo


class Model(nn.Module):
    """A table, a norm and two layers, in one input of token indices with a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, words: Tensor) -> Tensor:
        return self.second(self.first(self.norm(self.table(words))).relu())


WEIGHTS: dict[str, Any] = {"init_weights": False}
KINDS: dict[str, dict[str, Any]] = {
    "AdaLora": {"init_lora_weights": False, "total_step": 1},
    "Beft": WEIGHTS,
    "BOFT": {**WEIGHTS, "boft_block_size": 4},
    "C3A": {**WEIGHTS, "block_size": 4},
    "Deft": {**WEIGHTS, "r": 2},
    "Delora": {**WEIGHTS, "r": 2},
    "FourierFT": {**WEIGHTS, "n_frequency": 5},
    "Frod": WEIGHTS,
    "Glora": {**WEIGHTS, "r": 2},
    "Gralora": {**WEIGHTS, "r": 4, "gralora_k": 2},
    "Hira": {**WEIGHTS, "r": 2},
    "HRA": {**WEIGHTS, "r": 2},
    "IA3": {"init_ia3_weights": False, "feedforward_modules": []},
    "Lily": {**WEIGHTS, "r": 2, "num_B": 2},
    "LNTuning": {"target_modules": "norm"},
    "LoHa": {**WEIGHTS, "r": 2},
    "LoKr": {**WEIGHTS, "r": 2},
    "Lora": {"init_lora_weights": False, "r": 2},
    "Miss": {**WEIGHTS, "r": 2},
    "OFT": {**WEIGHTS, "oft_block_size": 4},
    "OSF": {"effective_rank": 2},
    "Peanut": {**WEIGHTS, "r": 2},
    "Psoft": {**WEIGHTS, "r": 2},
    "Pvera": {**WEIGHTS, "r": 4},
    "RandLora": {**WEIGHTS, "r": 2},
    "Road": {**WEIGHTS, "group_size": 4},
    "Shira": {**WEIGHTS, "r": 1},
    "Supertuning": {**WEIGHTS, "sparsity": 0.5},
    "TinyLora": {"init_weights": "uniform"},
    "TrainableTokens": {"target_modules": ["table"], "token_indices": [1, 3]},
    "UniLora": WEIGHTS,
    "VBLoRA": {"vector_length": 4, "num_vectors": 6, "r": 2, "topk": 2},
    "Vera": {**WEIGHTS, "r": 4},
    "WaveFT": {**WEIGHTS, "n_frequency": 5},
}
#: What no weights compute: a router that looks at the input.
NATURE = {"Lily": "by nature"}


def inside(kind: str, base: nn.Module) -> Any:
    options = {"target_modules": ["first"], **KINDS[kind]}
    config = getattr(peft, f"{kind}Config")(**options)
    return peft.get_peft_model(copy.deepcopy(base), config)  # type: ignore[arg-type]


def words(seed: int = 0) -> dict[str, Tensor]:
    return {"words": torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("default")  # PEFT's own
def test_every_kind(kind: str) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        base = Model()
        model = trained(widened(inside(kind, base)))
    found = examine(Finding(kind, kind, "Model"), model, widened(base), [words(), words(1)])
    assert found.verdict == NATURE.get(kind, "exact"), found.reason


@pytest.mark.parametrize("trained_to", [0.05, 5.0])
def test_a_bound_on_a_norm_is_kept_on_both_of_its_sides(trained_to: float) -> None:
    """PSOFT's code branches there, which a trace cannot: it holds both sides, so training may cross the bound."""
    layer, base = peft.tuners.psoft.layer.OrthLayer, Model()
    own = layer._project_Q
    bounded = {**WEIGHTS, "r": 3, "use_cayley_neumann": True, "cayley_neumann_eps": 0.5}
    config = peft.PsoftConfig(target_modules=["first"], **bounded)
    began, went_on = (widened(peft.get_peft_model(copy.deepcopy(base), config)) for _ in range(2))  # type: ignore[arg-type]
    for model, number in ((began, 0.1), (went_on, trained_to)):
        (inner,) = [part for part in model.modules() if isinstance(part, layer)]
        inner.weight.data.fill_(number)
    found = examine(Finding("", "Psoft", "Model"), went_on, widened(base), [words(), words(1)])
    assert (found.verdict, layer._project_Q) == ("exact", own), found.reason
    program = lorafx.capture(began, inputs=words())
    (name,) = [name for name in program.source.adapters if name.endswith("default.weight")]
    program.load({name: torch.full((3,), trained_to, dtype=torch.float64)})
    with torch.no_grad():
        difference = program.module().eval()(**words()) - went_on(**words())
    assert difference.abs().max() < 1e-14


def test_the_judge_finds_a_wrong_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    fold = lorafx.fold

    def wrong(program: Any, **options: Any) -> Any:
        result = fold(program, **options)
        with torch.no_grad():
            next(value for name, value in result.learned().items() if name.endswith("weight")).add_(1e-9)
        return result

    base = Model()
    model = trained(widened(inside("Lora", base)))
    monkeypatch.setattr(lorafx, "fold", wrong)
    assert examine(Finding("", "", ""), model, widened(base), [words()]).verdict == "wrong"
    untrained: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["first"]))  # type: ignore[arg-type]
    assert examine(Finding("", "", ""), widened(untrained), widened(base), [words()]).verdict == "not built"


def test_the_table(tmp_path: Path) -> None:
    rows = [
        {"case": "0", **Finding("one", "Lora", "MLP", error=1.0, merged=2.0).to_json()},
        {"case": "1", **Finding("two", "Lora", "MLP", "kept", "a|b", error=0.0, merged=0.0).to_json()},
        {"case": "0", **Finding("one", "Lora", "MLP", error=3.0, merged=2.0).to_json()},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = table(known(file).values())
    assert "2 cases of 1 kinds: 1 exact, 1 kept." in text
    assert "Of 1 that PEFT merges, too, 0 have at most the error of its merge" in text
    assert "| Lora | 2 | 1 |  | 1 |  |  |  |" in text
    assert "| Lora: two | kept | a/b |" in text


# ---- PEFT's wrapper


def test_a_wrapped_model_is_captured_under_its_own_names() -> None:
    model: Any = peft.get_peft_model(zoo.build("bert"), peft.LoraConfig(r=2, target_modules=["query"]))  # type: ignore[arg-type]
    program = lorafx.capture(model.eval(), inputs=zoo.text(2, 7))
    assert program.name == "BertForSequenceClassification"
    assert not [name for name in program.roles if name.startswith("base_model.")]
    assert zoo.distance(zoo.eager(model, zoo.text(3, 5)), zoo.run(program, zoo.text(3, 5))) < 1e-6


def test_a_wrapper_that_does_more_than_call_its_model_stays() -> None:
    config = hf.LlamaConfig(**zoo.DECODER)
    base = hf.LlamaForCausalLM(config)
    prompts: Any = peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=2)
    at_a_token: Any = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM, target_modules=["q_proj"], alora_invocation_tokens=[3]
    )
    for options, stays in ((prompts, True), (at_a_token, True), (peft.LoraConfig(target_modules=["q_proj"]), False)):
        model: Any = peft.get_peft_model(copy.deepcopy(base), options)
        assert (unwrapped(model) is model) == stays
