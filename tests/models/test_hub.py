"""Models by their names on Hugging Face's hub: the cache is asked, and the hub where that is allowed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import lorafx
from lorafx.cli import main
from lorafx.errors import ArtifactError
from lorafx.models.hub import local_folder


@pytest.fixture
def cached(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of ``tiny/bert`` in a cache laid out as huggingface_hub does it; nothing may be fetched."""
    home = tmp_path / "hub" / "models--tiny--bert"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0a1b2c")
    shutil.copytree(tiny_checkpoint, home / "snapshots" / "0a1b2c")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return home / "snapshots" / "0a1b2c"


def test_a_name_is_the_folder_in_the_cache(cached: Path) -> None:
    assert local_folder("tiny/bert") == local_folder(Path("tiny/bert")) == cached
    (Path("tiny") / "bert").mkdir(parents=True)
    assert local_folder("tiny/bert") == Path("tiny/bert"), "a folder that is there comes first"


def test_what_is_nowhere_is_said_with_its_name(cached: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"^other/bert: no such folder, and Hugging Face's hub or its cache has no such model"
    ):
        local_folder("other/bert")


@pytest.mark.parametrize("place", ["run", "./out/run", "../out/run", "/out/run", "out/a/run", "here/rum", "out/"])
def test_a_path_is_no_name(place: str, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is one beside a folder that exists, where a name is only mistyped: nobody is asked about it."""
    Path("here").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    assert local_folder(place) == Path(place)


def test_pickled_weights_are_fetched_only_where_they_are_allowed(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def fetched(_name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        return str(cached)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    for allowed in (False, True):
        local_folder("tiny/bert", allow_pickle=allowed)
    assert ["pytorch_model*.bin" in patterns for patterns in asked] == [False, True]


def test_commands_take_names(cached: Path) -> None:
    asked = ["rewrite", "tiny/bert", "--task", "text-classification", "--num-labels", "2", "--pass", "lora"]
    made = CliRunner().invoke(main, [*asked, "-o", "run"])
    assert made.exit_code == 0, made.output
    assert "from tiny/bert" in made.output
    program = lorafx.load("run")
    assert program.source.path == str(cached)
    wrong = CliRunner().invoke(main, ["rewrite", "tiny/bird", "--pass", "lora", "--dry-run"])
    assert (wrong.exit_code, "tiny/bird: no such folder" in wrong.stderr) == (5, True)


def test_both_sides_of_a_comparison_may_be_names(cached: Path) -> None:
    assert lorafx.verify("tiny/bert", cached, shapes=[(2, 5)]).ok
