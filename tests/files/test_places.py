"""What a written folder says of where others lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafx.files.places import checkpoint_name, found_from, place_from, relative_place


def test_folders_with_a_parent_in_common_are_named_one_from_the_other(tmp_path: Path) -> None:
    run, base = tmp_path / "runs" / "first", tmp_path / "models" / "base"
    assert place_from(run, base) == relative_place(run, base) == "../../models/base"
    assert found_from(run, "../../models/base") == base
    assert found_from(tmp_path / "moved" / "runs" / "first", "../../models/base") == tmp_path / "moved/models/base"


def test_nothing_in_common_but_the_root_is_named_in_full() -> None:
    assert relative_place("/data/run", "/models/base") is None
    assert place_from("/data/run", "/models/base") == "/models/base"
    assert found_from("/elsewhere/run", "/models/base") == Path("/models/base")


def test_a_folder_reached_by_a_link_is_found_from_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far" / "runs").mkdir(parents=True)
    (tmp_path / "far" / "base").mkdir()
    (tmp_path / "near").symlink_to(tmp_path / "far" / "runs")
    (tmp_path / "near" / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    place = place_from("near/run", "far/base")
    assert place == "../../base"
    assert found_from("near/run", place).samefile("far/base")


def test_a_checkpoint_is_called_as_people_call_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint_name(tmp_path / "all-MiniLM-L6-v2") == "all-MiniLM-L6-v2"
    cached = tmp_path / "models--sentence-transformers--all-MiniLM-L6-v2" / "snapshots" / "c9745ed1d9f2"
    assert checkpoint_name(cached) == "sentence-transformers/all-MiniLM-L6-v2"
    monkeypatch.chdir(tmp_path)
    assert checkpoint_name(".") == tmp_path.name
