"""Every recipe in `examples/` from checkpoint to verified ONNX, on real weights and a few real sentences."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from click.testing import CliRunner

from examples.assets import digits
from examples.tables import TABLES, write_tables
from lorafx.cli import main
from lorafx.commands import job
from lorafx.recipes.recipe import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))
TASKS = sorted((Path(__file__).parents[2] / "examples" / "tasks").glob("*.toml"))
FIVE = {"prilora", "salora", "tied-lora", "finegates", "rose-lora"}


@pytest.fixture(scope="module")
def sentences(movie_split: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 96 of the movie sentences."""
    with movie_split[0].open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))[:97]
    file = tmp_path_factory.mktemp("tables") / "sentences.csv"
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return file


@pytest.fixture(scope="module")
def encoder(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first three blocks of MiniLM: a first, a middle and a last one, of real weights, in half the time of six."""
    from transformers import AutoModel

    folder = shutil.copytree(minilm, tmp_path_factory.mktemp("checkpoints") / "MiniLM-L3")
    AutoModel.from_pretrained(minilm, num_hidden_layers=3).save_pretrained(folder)
    return folder


def test_there_is_a_recipe_for_every_method_and_three_combinations() -> None:
    recipes = [{step.pass_name() for step in Recipe.read(file).passes} for file in RECIPES]
    assert set().union(*recipes) >= FIVE
    for together in ({"tied-lora", "finegates"}, {"salora", "finegates"}, {"prilora", "rose-lora"}):
        assert together in recipes


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_the_recipe_ends_in_a_verified_model(
    recipe: Path, encoder: Path, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fewest rounds, of short texts: nothing is asked of the speed in its report.
    monkeypatch.setattr(job, "_SECONDS", 0.0)
    monkeypatch.setattr(job, "_SHAPES", ((1, 8), (2, 8)))
    out = tmp_path / "out"
    words = ["run", str(recipe), "--checkpoint", str(encoder), "--data", str(sentences), "-o", str(out)]
    result = CliRunner().invoke(main, [*words, "--max-steps", "12", "--batch-size", "8", "--json"])
    assert result.exit_code == 0, result.output
    for name in ("run", "folded", "onnx"):
        assert (out / name / "lorafx.json").is_file()
    report = json.loads((out / "run" / "report.json").read_text(encoding="utf-8"))
    assert report["sections"]["training"]["metrics"]["steps"] == 12
    methods = {step.pass_name() for step in Recipe.read(recipe).passes} & FIVE
    assert {title.partition(":")[0] for title in report["sections"]} >= methods, "each method says what it learned"


def test_there_is_a_recipe_for_every_task_and_a_table_for_every_text() -> None:
    assert {file.stem for file in TASKS} == {*TABLES, "images"}
    for file in TASKS:
        assert Recipe.read(file).model["task"]


@pytest.mark.slow
def test_the_recipe_for_images_learns_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten of each class, from random weights: as many as are learned by heart in seconds."""
    monkeypatch.setattr(job, "_timed", lambda *given: None)
    images, out = tmp_path / "digits", tmp_path / "out"
    for number in range(10):
        (images / str(number)).mkdir(parents=True)
        for file in sorted((digits()[0] / str(number)).iterdir())[:10]:
            shutil.copy(file, images / str(number))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.ViTConfig(image_size=28, patch_size=7, num_channels=1, intermediate_size=64, **sizes)
    hf.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    grey: dict[str, Any] = {"size": {"height": 28, "width": 28}, "image_mean": [0.5], "image_std": [0.5]}
    hf.ViTImageProcessorPil(**grey).save_pretrained(tmp_path / "vit")
    recipe = next(file for file in TASKS if file.stem == "images")
    words = ["run", str(recipe), "--checkpoint", str(tmp_path / "vit"), "--data", str(images), "--eval", str(images)]
    result = CliRunner().invoke(main, [*words, "-o", str(out), "--max-steps", "150", "--learning-rate", "1e-2"])
    assert result.exit_code == 0, result.output
    sections = json.loads((out / "onnx" / "report.json").read_text(encoding="utf-8"))["sections"]
    assert sections["parity"]["ok"]
    assert sections["training"]["metrics"]["eval_accuracy"] > 0.5, "one in ten by chance"


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_the_recipe_of_a_task_ends_in_a_verified_model(
    name: str, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_timed", lambda *given: None)  # twenty seconds each, and no part of the task
    train, test = write_tables(name, tmp_path / "data", 96, 32)
    recipe = next(file for file in TASKS if file.stem == name)
    words = ["run", str(recipe), "--checkpoint", str(encoder), "--data", str(train), "--eval", str(test)]
    result = CliRunner().invoke(main, [*words, "-o", str(tmp_path / "out"), "--max-steps", "12", "--batch-size", "8"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "onnx" / "report.json").read_text(encoding="utf-8"))
    training = report["sections"]["training"]
    assert training["metrics"]["steps"] == 12
    assert training["metric"] is not None
    assert report["sections"]["parity"]["ok"]
