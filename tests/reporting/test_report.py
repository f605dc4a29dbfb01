"""One report, three forms: JSON that comes back, text that fits its width, HTML that stands alone."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorafx
from lorafx.graph.target import Target
from lorafx.passes.lora import Lora
from lorafx.public import Program
from lorafx.reporting.render import braced
from lorafx.reporting.report import Report, json_value
from tests import zoo


@pytest.fixture(scope="module")
def program() -> Program:
    return lorafx.rewrite(zoo.captured("bert"), [Lora(rank=2, targets=("query", "*.output.dense"), blocks="0")])


@pytest.fixture(scope="module")
def report(program: Program) -> Report:
    return program.report


def test_it_counts_what_the_program_holds(program: Program, report: Report) -> None:
    rank, width, inner = 2, 32, program.config.intermediate_size
    adapters = 2 * rank * 2 * width + rank * (width + inner)
    head = program.config.num_labels * (width + 1)
    assert report.roles["adapter"] == dataclasses.replace(
        report.roles["adapter"], tensors=6, parameters=adapters, trainable=adapters, size=4 * adapters
    )
    assert report.roles["head"].trainable == head
    assert report.roles["base"].trainable == 0
    assert report.trainable == adapters + head
    assert report.roles["base"].parameters + head == held(program)


def held(program: Program) -> int:
    return sum(value.numel() for value in program.source.model.parameters())


def test_a_tied_tensor_counts_once() -> None:
    captured = zoo.captured("gpt2")
    assert captured.config.tie_word_embeddings
    assert captured.report.parameters == held(captured)
    assert captured.report.roles.keys() == {"base"}, "the output layer is the embedding, which is no head"


def test_it_tells_sites_and_misses_by_reason(report: Report) -> None:
    (lora,) = report.passes
    assert lora.options == {"targets": ["query", "*.output.dense"], "blocks": "0", "rank": 2}
    assert [site.partition(" ")[0] for site in lora.taken] == [
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.0.attention.output.dense",
        "bert.encoder.layer.0.output.dense",
    ]
    assert sum(map(len, lora.missed.values())) == len(zoo.captured("bert").sites()) - 3
    outside = [reason for reason in lora.missed if "outside" in reason]
    assert lora.missed[outside[0]] == (
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.attention.output.dense",
        "bert.encoder.layer.1.output.dense",
    )
    assert (lora.promise, lora.tensors) == ("exact", 6)
    assert lora.seconds > 0


def test_it_says_what_the_method_buys(program: Program, report: Report) -> None:
    (note,) = report.notes
    assert "the deployed model is then as large and as fast as the base" in note
    (folded,) = lorafx.fold(program).report.notes
    assert folded.endswith("as many as the base; it is as large and as fast as the base.")
    assert zoo.captured("bert").report.notes == ()


def test_a_broken_tie_is_told() -> None:
    program = lorafx.rewrite(zoo.captured("gpt2"), [Lora(rank=2, targets="wte")])
    program.tensor("transformer.wte.lora_embedding_A").data.normal_()
    folded = lorafx.fold(program)
    tie, size = folded.report.notes[::-1]
    assert tie == "The config of the result has to say tie_word_embeddings = False."
    assert "+" in size


def test_json_comes_back(report: Report) -> None:
    full = report.plus(parity={"ok": True, "max_abs": 1e-7}, benchmark=[{"name": "a", "seconds": 0.5}])
    text = json.dumps(full.to_json(), allow_nan=False)
    assert Report.from_json(json.loads(text)).to_json() == full.to_json()
    assert {"model", "passes", "roles", "notes", "sections", "parameters", "trainable"} == set(full.to_json())


def test_plus_adds_and_leaves_the_report_alone(report: Report) -> None:
    first = report.plus(training={"accuracy": 0.8}, parity=None)
    second = first.plus(training={"accuracy": 0.9}, output="here")
    assert report.sections == {}
    assert first.sections == {"training": {"accuracy": 0.8}}
    assert second.sections == {"training": {"accuracy": 0.9}, "output": "here"}


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True)
class Row:
    name: str
    shape: torch.Size
    dtype: torch.dtype
    worst: float


class Found:
    def to_json(self) -> dict[str, Any]:
        return {"ok": Colour.RED}


def test_any_value_becomes_json() -> None:
    row = Row("a", torch.Size([2, 3]), torch.bfloat16, math.inf)
    expected = {"name": "a", "shape": [2, 3], "dtype": "torch.bfloat16", "worst": "inf"}
    assert json_value([row, Found(), {1: (None, True)}]) == [expected, {"ok": "red"}, {"1": [None, True]}]
    assert json_value(math.nan) == "nan"


def test_text_says_it_all_within_its_width(report: Report) -> None:
    full = report.plus(
        benchmark=[{"candidate": "eager", "median": 0.5, "ratio": 1.0}, {"candidate": "onnx", "median": 0.25}],
        training={"accuracy": 0.8125, "steps": 1200, "done": True},
        parity={"ok": True, "cases": [1, 2]},
        remarks=["[bold]plain[/bold]", 3],
    )
    for width in (60, 100, 200):
        text = full.text(width)
        assert max(map(len, text.splitlines())) <= width
    for expected in (
        "BertForSequenceClassification: ",
        "bert.encoder.layer.0.attention.self.query",
        "lora, 3 not taken: block 1 is outside 0\n",
        "Tensors by role",
        "Benchmark",
        "onnx",
        "1,200",
        "0.8125",
        "[bold]plain[/bold]",
    ):
        assert expected in text


class Checker(HTMLParser):
    """Collects the text and refuses tags that are not closed, and anything that is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_html_stands_alone(report: Report) -> None:
    page = report.plus(remarks=["<script>alert(1)</script> & more"]).html()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert "<script>" not in page
    assert "<script>alert(1)</script> & more" in checker.text
    assert "bert.encoder.layer.0.attention.self.query" in checker.text


def test_paths_that_differ_in_one_number_are_drawn_together() -> None:
    paths = [f"layer.{block}.{name}" for block in (0, 1, 2, 5) for name in ("q", "k.0")]
    assert braced([*paths, "head", "layer.7.v"]) == ["layer.{0..2,5}.q", "layer.{0..2,5}.k.0", "head", "layer.7.v"]


@given(st.sets(st.tuples(st.integers(0, 12), st.sampled_from(["q", "k", "mlp.down"])), min_size=1))
def test_what_is_drawn_together_is_a_target_for_the_same_paths(chosen: set[tuple[int, str]]) -> None:
    every = [f"model.layers.{block}.{name}" for block in range(13) for name in ("q", "k", "mlp.down")]
    wanted = [f"model.layers.{block}.{name}" for block, name in sorted(chosen)]
    globs = Target.parse(tuple(f"glob:{path}" for path in braced(wanted)))
    assert {path for path in every if any(item.pattern.fullmatch(path) for item in globs.items if item.pattern)} == set(
        wanted
    )
