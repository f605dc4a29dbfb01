"""What a person sees who works interactively: names that are listed, values that show what they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafx
from lorafx.errors import UsageError
from lorafx.parity.comparison import Case, Comparison
from lorafx.passes import finegates, prilora, rose_lora, salora, tied_lora
from lorafx.proof.bench import BenchResult, Candidate, Timing
from tests.small import adapted, captured


def timed(*, labels: tuple[str, ...] = ("base", "<onnx>")) -> BenchResult:
    candidates = tuple(Candidate(label, "onnx", "cpu", 1, "float32", 10, None, None) for label in labels)
    times = zip(labels, ((0.2, 1.0), (0.1, 2.0))[: len(labels)], strict=True)
    timings = tuple(Timing(label, 8, 64, 5, *[median] * 3, *[ratio] * 3) for label, (median, ratio) in times)
    return BenchResult(candidates, timings, {"python": "3.11"})


CASES = Case("2x8", "logits", 1e-7, 1.0), Case("1x1", "x", problem="no x")
COMPARED = Comparison("a", "<b>", torch.float32, 1e-5, CASES)

VALUES: dict[str, Any] = {
    "program": lambda: adapted(captured()),
    "report": lambda: adapted(captured()).report,
    "comparison": lambda: COMPARED,
    "timings": timed,
}


def test_the_public_names_are_listed_and_there() -> None:
    assert dir(lorafx) == sorted(lorafx.__all__)
    assert {"bench", "capture", "inspect", "load"} <= set(dir(lorafx))
    assert all(getattr(lorafx, name) is not None for name in dir(lorafx))
    with pytest.raises(AttributeError, match="'lorafx' has no attribute 'captures'"):
        _ = lorafx.captures  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", VALUES)
def test_a_value_shows_itself_in_a_line(name: str) -> None:
    line = repr(VALUES[name]())
    assert "\n" not in line
    assert len(line) < 240


@pytest.mark.parametrize("name", VALUES)
def test_and_in_a_notebook_as_tables(name: str) -> None:
    page = VALUES[name]()._repr_html_()
    assert page.startswith("<div><div><b>")
    assert "<table>" in page
    assert not re.search(r"<(script|style|html|body|head|link)\b", page), "what else is on it keeps its look"
    assert "<onnx>" not in page
    assert "<b></b>" not in page.replace("<b>", "", 1)
    opened = re.findall(r"<(div|table|tr|td|th|details|summary|b)[ >]", page)
    closed = re.findall(r"</(div|table|tr|td|th|details|summary|b)>", page)
    assert sorted(opened) == sorted(closed)


def test_what_the_lines_say() -> None:
    counts = r"[\d,]+ of [\d,]+ parameters train"
    assert re.fullmatch(rf"<Program BertForSequenceClassification: small; {counts}>", repr(adapted()))
    assert repr(captured()).startswith("<Program BertForSequenceClassification: as captured; ")
    assert repr(COMPARED) == "<Comparison of a and <b>: x for inputs 1x1: no x>"
    assert repr(timed()) == "<BenchResult of base, <onnx>: at best <onnx> is 2.00 times as fast as base, at 8x64>"
    assert repr(timed(labels=("base",))) == "<BenchResult of base: 200.0 ms at 8x64>"


def test_a_program_and_a_folder_are_inspected_alike(tiny_checkpoint: Path) -> None:
    program = lorafx.capture(tiny_checkpoint, check=False)
    assert lorafx.inspect(program).to_json() == program.report.to_json()
    assert lorafx.inspect(tiny_checkpoint, check=False).model == program.report.model
    with pytest.raises(UsageError, match="check is for opening"):
        lorafx.inspect(program, check=False)


def test_methods_have_the_names_of_their_papers_and_keep_the_old_ones() -> None:
    names = [(finegates.FineGates, finegates.Finegates), (prilora.PriLoRA, prilora.Prilora)]
    names += [(salora.SaLoRA, salora.Salora), (tied_lora.TiedLoRA, tied_lora.TiedLora)]
    names += [(rose_lora.RoseLoRA, rose_lora.RoseLora)]
    assert all(new is old for new, old in names)
    assert [new.__name__ for new, _ in names] == ["FineGates", "PriLoRA", "SaLoRA", "TiedLoRA", "RoseLoRA"]
    assert [new.pass_name() for new, _ in names] == ["finegates", "prilora", "salora", "tied-lora", "rose-lora"]
