"""Every recipe in `examples/` from checkpoint to verified ONNX, on real weights and a few real sentences."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lorafx.cli import main
from lorafx.recipes.recipe import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))
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


def test_there_is_a_recipe_for_every_method_and_three_combinations() -> None:
    recipes = [{step.pass_name() for step in Recipe.read(file).passes} for file in RECIPES]
    assert set().union(*recipes) >= FIVE
    for together in ({"tied-lora", "finegates"}, {"salora", "finegates"}, {"prilora", "rose-lora"}):
        assert together in recipes


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_the_recipe_ends_in_a_verified_model(recipe: Path, minilm: Path, sentences: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["run", str(recipe), "--checkpoint", str(minilm), "--data", str(sentences), "-o", str(out)]
    result = CliRunner().invoke(main, [*words, "--max-steps", "12", "--batch-size", "8", "--json"])
    assert result.exit_code == 0, result.output
    for name in ("run", "folded", "onnx"):
        assert (out / name / "lorafx.json").is_file()
    report = json.loads((out / "run" / "report.json").read_text(encoding="utf-8"))
    assert report["sections"]["training"]["metrics"]["steps"] == 12
    methods = {step.pass_name() for step in Recipe.read(recipe).passes} & FIVE
    assert {title.partition(":")[0] for title in report["sections"]} >= methods, "each method says what it learned"
