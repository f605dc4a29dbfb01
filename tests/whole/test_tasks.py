"""Every task from a table to ONNX and back: trained, folded, exported, verified, opened again."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers as hf
from click.testing import CliRunner

import lorafx
from lorafx.cli import main
from lorafx.commands import job
from lorafx.models.sentences import Pooling
from lorafx.passes.lora import Lora
from lorafx.recipes.recipe import Recipe
from lorafx.reporting.report import read_report
from tests.training.test_images import BLUE, RED, picture, processor, vit_config

pytestmark = pytest.mark.slow

WORDS = [["the", "film", "was", "good"], ["the", "plot", "was", "dull"], ["a", "fine", "movie"], ["not", "a", "film"]]
TEXTS = [" ".join(words) for words in WORDS]
OTHERS = ["the movie was great", "a poor cast", "very good", "it was bad"]


@dataclass(frozen=True)
class Case:
    """A task: its table, what opens it in transformers, and what is known of it then."""

    task: str
    columns: dict[str, list[Any]]
    auto: Any
    metric: str
    num_labels: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    names: dict[int, str] | None = None
    problem: str | None = None


CASES = [
    Case(
        "text-classification", {"text": TEXTS, "text_pair": OTHERS, "label": ["same", "other"] * 2},
        hf.AutoModelForSequenceClassification, "accuracy", 2, {"text_pair": "text_pair"}, {0: "other", 1: "same"},
    ),
    Case(
        "multi-label-classification", {"text": TEXTS, "label": [["good"], ["dull"], ["good", "short"], []]},
        hf.AutoModelForSequenceClassification, "f1", 3, {}, {0: "dull", 1: "good", 2: "short"},
        "multi_label_classification",
    ),
    Case(
        "regression", {"text": TEXTS, "label": [1.5, -2.0, 1.0, 0.25]},
        hf.AutoModelForSequenceClassification, "rmse", problem="regression",
    ),
    Case(
        "token-classification",
        {"tokens": WORDS, "tags": [["O", "B-THING", "O", "O"]] * 2 + [["O", "O", "B-THING"]] * 2},
        hf.AutoModelForTokenClassification, "f1", 2, {}, {0: "B-THING", 1: "O"},
    ),
    Case(
        "question-answering",
        {"question": ["what was it"] * 4, "context": TEXTS, "answers": ["good", "plot", "fine movie", ""]},
        hf.AutoModelForQuestionAnswering, "f1", options={"stride": 1},
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.task)
def test_a_task_goes_all_the_way(case: Case, tiny_checkpoint: Path, tmp_path: Path) -> None:
    program = lorafx.capture(tiny_checkpoint, task=case.task, num_labels=case.num_labels)
    program = lorafx.rewrite(program, [Lora(rank=2)])
    options: dict[str, Any] = {"max_steps": 3, "batch_size": 2, "progress": False, **case.options}
    result = lorafx.train(program, case.columns, eval_data=case.columns, **options)
    assert result.metric == case.metric
    assert f"eval_{case.metric}" in result.metrics
    program.save(tmp_path / "run")
    folded = lorafx.fold(lorafx.load(tmp_path / "run"))
    for kind in ("hf", "onnx"):
        proven = lorafx.export(folded, tmp_path / kind, format=kind)  # type: ignore[arg-type]
        assert proven is not None
        assert proven.ok, proven
        assert read_report(tmp_path / kind).sections["training"]["metric"] == case.metric  # type: ignore[index]
    again = lorafx.verify(tmp_path / "run", tmp_path / "onnx")
    assert again.ok, again
    shutil.rmtree(tmp_path / "run")
    model, opened = case.auto.from_pretrained(tmp_path / "hf").eval(), lorafx.load(tmp_path / "hf")
    for config in (model.config, opened.config, hf.AutoConfig.from_pretrained(tmp_path / "onnx")):
        assert config.problem_type == case.problem
        assert case.names is None or config.id2label == case.names
    batch = program.example
    with torch.no_grad():
        ours, theirs = program.module().eval()(**batch), model(**batch)
    for name in ours:
        # The folded weights are rounded once more.
        torch.testing.assert_close(theirs[name], ours[name], atol=1e-5, rtol=1e-4)


def test_a_sentence_encoder_keeps_its_pooling_all_the_way(tiny_checkpoint: Path, tmp_path: Path) -> None:
    program = lorafx.capture(tiny_checkpoint, task="sentence-similarity")
    program = lorafx.rewrite(program, [Lora(rank=2)])
    columns = {"text": TEXTS, "text_pair": OTHERS}
    result = lorafx.train(program, columns, eval_data=columns, max_steps=3, batch_size=2, progress=False)
    assert result.metric == "recall_at_1"
    program.save(tmp_path / "run")
    folded = lorafx.fold(lorafx.load(tmp_path / "run"))
    for kind in ("hf", "onnx"):
        proven = lorafx.export(folded, tmp_path / kind, format=kind)  # type: ignore[arg-type]
        assert proven is not None
        assert proven.ok, proven
        assert (tmp_path / kind / "1_Pooling" / "config.json").is_file()
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["sentence_embedding"]
    plain, again = hf.AutoModel.from_pretrained(tmp_path / "hf").eval(), lorafx.load(tmp_path / "hf")
    batch = program.example
    with torch.no_grad():
        trained = program.module().eval()(**batch).sentence_embedding
        pooled = Pooling()(plain(**batch).last_hidden_state, batch["attention_mask"])
        reopened = again.module().eval()(**batch).sentence_embedding
    (deployed,) = session.run(None, {name: value.numpy() for name, value in batch.items()})
    for other in (pooled, reopened, torch.from_numpy(deployed)):
        # Of length 1; the folded weights are rounded once more.
        torch.testing.assert_close(other, trained, atol=1e-5, rtol=0)


def test_a_folder_of_images_goes_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_timed", lambda *given: None)
    torch.manual_seed(0)
    hf.ViTForImageClassification(vit_config(num_labels=5)).save_pretrained(tmp_path / "base")
    processor().save_pretrained(tmp_path / "base")
    for name, colour in (("red", RED), ("blue", BLUE)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for size in range(8, 16):
            picture(colour, size).save(tmp_path / "images" / name / f"{size}.png")
    recipe = Recipe((Lora(rank=2),), {"task": "image-classification"}, {"max_steps": 30, "learning_rate": 1e-2})
    (tmp_path / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    images, out = str(tmp_path / "images"), tmp_path / "out"
    words = ["run", str(tmp_path / "recipe.toml"), "--checkpoint", str(tmp_path / "base"), "--data", images]
    result = CliRunner().invoke(main, [*words, "--eval", images, "-o", str(out)])
    assert result.exit_code == 0, result.output
    training: Any = read_report(out / "onnx").sections["training"]
    assert training["metrics"]["eval_accuracy"] == 1.0
    model: Any = hf.AutoModelForImageClassification.from_pretrained(out / "folded").eval()
    eyes: Any = hf.AutoImageProcessor.from_pretrained(out / "onnx", backend="pil")
    with torch.no_grad():
        found = model(**eyes(images=[picture(RED), picture(BLUE)], return_tensors="pt")).logits.argmax(-1)
    assert [model.config.id2label[number] for number in found.tolist()] == ["red", "blue"]
    picture(RED).save(tmp_path / "images" / "blue" / "8.png")
    result = CliRunner().invoke(main, [*words, "--eval", images, "-o", str(out)])
    assert result.exit_code == 2
    assert "trained from other inputs (data, evaluation data)" in result.output
