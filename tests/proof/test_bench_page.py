"""The page of a benchmark: accuracy against speed of folders that were scored on the same rows, and of no others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lorafx.files.folder import new_folder
from lorafx.proof.bench import BenchResult, Candidate, Timing
from lorafx.proof.bench_page import bench_page
from lorafx.reporting.facts import PassReport
from lorafx.reporting.report import Report, write_report
from tests.reporting.test_page import read

PARITY = {"ok": True, "max_rel": 6.1e-7, "checked": "full", "summary": "equal"}


def folder(place: Path, kind: str, accuracy: float | None, rows: str = "same", parity: Any = PARITY) -> Path:
    """A folder with a report, of a model that was scored (or not) and held against what trained (or not)."""
    metrics = {"train_loss": 0.5} if accuracy is None else {"eval_accuracy": accuracy}
    training = {"metrics": metrics, "history": [], "evaluated": rows}
    step = PassReport("lora", {}, "exact", ("a (linear)",), {}, 4, 0, 0.1, "equal", 0.0)
    with new_folder(place, kind, {}) as made:
        write_report(Report({"class": "Bert"}, (step,)).plus(training=training, parity=parity), made)
    return place


def timed(*labels: str) -> BenchResult:
    candidate = Candidate("", "onnx", "cpu", 2, "float32", None, None, None)
    timings = [
        Timing(label, 8, 64, 20, seconds, seconds * 0.9, seconds * 1.1, 0.1 / seconds, 0.09 / seconds, 0.11 / seconds)
        for label, seconds in zip(labels, (0.1, 0.05, 0.04, 0.03), strict=False)
    ]
    return BenchResult(tuple(dataclasses.replace(candidate, label=label) for label in labels), tuple(timings), {})


def said(*folders: Path) -> list[str]:
    """What the page says of the points in its picture."""
    drawn = read(bench_page(timed(*(place.name for place in folders)), folders)).drawn
    return [part for part in drawn if part[:1].isdigit() and ": " in part]


def test_budgets_side_by_side(tmp_path: Path) -> None:
    wide, narrow = folder(tmp_path / "wide", "onnx", 0.875), folder(tmp_path / "narrow", "onnx", 0.75)
    assert said(wide, narrow) == ["1: 0.875 at 100 ms, wide", "2: 0.750 at 50 ms, narrow"]
    page = bench_page(timed("wide", "narrow"), (wide, narrow))
    text = read(page).text
    assert "wide · narrow" in text
    assert "timed as “narrow”: equal to 6.1e-07 of the scale of the trained model's outputs" in text
    assert "Tensors by role" not in text, "of which there are none to tell"
    assert "2.00 times" in text


def test_a_run_is_what_was_scored(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", "run", 0.875, parity=None)
    assert said(run, folder(tmp_path / "onnx", "onnx", 0.875)) == ["1: 0.875 at 100 ms, run", "2: 0.875 at 50 ms, onnx"]


@pytest.mark.parametrize(
    "odd",
    [
        {"accuracy": 0.5, "rows": "others"},
        {"accuracy": None},
        {"accuracy": 0.5, "parity": None},
        {"accuracy": 0.5, "parity": {**PARITY, "ok": None}},
    ],
    ids=["scored on other rows", "not scored", "not compared", "another function"],
)
def test_what_does_not_compare_is_no_point(odd: dict[str, Any], tmp_path: Path) -> None:
    strange = folder(tmp_path / "strange", "onnx", **odd)
    a, b = (folder(tmp_path / name, "onnx", 0.75) for name in ("a", "b"))
    assert said(strange, a, b) == ["1: 0.750 at 50 ms, a", "2: 0.750 at 40 ms, b"]


def test_a_folder_of_others_is_timed_all_the_same(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "report.json").write_text('{"rows": []}', encoding="utf-8")
    assert said(theirs, folder(tmp_path / "a", "onnx", 0.75)) == []
