"""The page of a report: the answer first, pictures from numbers that are there, and nothing that can be wider than a
phone outside a box that scrolls.

What makes a page overflow is held without a browser: widths in pixels, charts that do not shrink, tables outside their
box. Where Chromium is installed it lays the page out too, at the widths of a phone and of a screen; what only eyes see,
words that touch in a chart and colours, no test does.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lorafx.reporting import page
from lorafx.reporting.answer import EARLIER, score_of, sentence
from lorafx.reporting.charts import Bars, Grid, Lines
from lorafx.reporting.contents import Contents
from lorafx.reporting.facts import Facts, PassReport, RoleReport
from lorafx.reporting.ladder import rungs
from lorafx.reporting.pictures import pictures
from lorafx.reporting.report import PAGE, REPORT, Report, read_report, write_report

HISTORY = [
    {"eval_loss": 0.7, "eval_accuracy": 0.5, "step": 0},
    {"loss": 0.6, "penalty": 0.1, "step": 10},
    {"loss": 0.4, "penalty": 0.1, "step": 20},
    {"eval_loss": 0.3, "eval_accuracy": 0.875, "step": 20},
]
TRAINING = {"metrics": {"train_loss": 0.5, "steps": 20, "eval_accuracy": 0.875}, "history": HISTORY, "seconds": 61.0}
PARITY = {"ok": True, "max_rel": 6.1e-7, "checked": "full", "summary": "equal: <largest> difference 6.1e-07"}
GATES = [
    {"module": "encoder.layer.0.output", "gate": "12 of 16"},
    {"module": "encoder.layer.1.output", "gate": "0 of 16"},
    {"module": "pooler", "gate": "16 of 16"},
]
RANKS = [{"module": f"layers.{block}.q", "rank": 2 + block, "of": 8} for block in range(3)]
BLOCKS = [{"block": f"layers.{n}", "parameters before": 100, "parameters after": 40 + n, "left": 0.4} for n in range(3)]


#: CSS pixels inside the page's margins on a narrow phone.
PHONE = 328


def timing(candidate: str, batch: int, seconds: float, ratio: float) -> dict[str, Any]:
    spread = {"p10": seconds * 0.9, "p90": seconds * 1.2, "ratio_p10": ratio * 0.9, "ratio_p90": ratio * 1.1}
    return {"candidate": candidate, "batch": batch, "length": 64, "median": seconds, "ratio": ratio, **spread}


TIMINGS = [
    timing(name, batch, batch * seconds, ratio)
    for batch in (1, 8)
    for name, seconds, ratio in (("PyTorch", 0.01, 1.0), ("lorafx", 0.004, 2.5))
]
PASSES = (
    PassReport("lora", {}, "exact", ("a (linear)", "b (linear)"), {"too small": ("c",)}, 4, 0, 0.1, "equal", 0.0),
    PassReport("fold-affine", {}, "close", ("a: linear",), {}, 0, 0, 0.1, "equal", 2e-7, True),
    PassReport("tidy", {}, "exact", ("a",), {}, 0, 0, 0.1, "equal", 0.0, True),
)


def facts(**sections: Any) -> Report:
    model = {"class": "Bert", "checkpoint": "/somewhere/tiny-bert", "folded": True, "base parameters": 1000}
    return Report(model, PASSES, {"base": RoleReport(3, 600, 0, 2400)}, ("A <note>.",), sections)


def everything() -> Report:
    learned = {"finegates: Open gates by module": GATES, "salora: Rank by module": RANKS, "Blocks": BLOCKS}
    learned["of another form"] = [{"row": {"kept": 3, "of": [4, 5]}}]
    return facts(training=TRAINING, parity=PARITY, benchmark={"timings": TIMINGS}, **learned)


# ---- the answer


def test_the_answer_is_one_sentence_of_what_was_measured() -> None:
    contents = Contents((("model.onnx", 2_000_000), ("tokenizer.json", 999)))
    assert sentence(everything(), contents) == (
        "Bert from tiny-bert: lora on 2 weights; accuracy 0.500 → 0.875; 2.0 MB, 40.0% fewer parameters than the base; "
        "2.50 times as fast as PyTorch (32.0 ms where it takes 80.0, 8 texts of 64 tokens); "
        "equal to 6.1e-07 of the scale of the trained model's outputs"
    )
    assert (
        sentence(facts(), Contents()) == "Bert from tiny-bert: lora on 2 weights; 40.0% fewer parameters than the base"
    )


def test_a_size_is_that_of_what_is_there() -> None:
    contents = Contents((("adapter_model.safetensors", 900_000), ("example_inputs.safetensors", 5_000_000)))
    model = {"class": "Bert", "checkpoint": None, "stage": "train"}
    assert sentence(Facts(model), contents) == "Bert: 0.9 MB without the base"
    assert sentence(Facts({**model, "stage": "eval"}), contents) == "Bert: 0.9 MB"
    assert sentence(Facts(model, roles={"base": RoleReport(3, 1600, 0, 6400)}), Contents()) == "Bert: 1,600 parameters"


def test_nothing_is_called_equal_that_was_not_found_so() -> None:
    reason = "not compared with the program: it was not asked for"
    assert sentence(facts(parity={"ok": None, "summary": reason}), Contents()).endswith(f"; {reason}")
    found = {"ok": False, "max_rel": 0.5, "summary": "logits differs"}
    assert sentence(facts(parity=found), Contents()).endswith("; logits differs")
    few = facts(parity={"ok": None, "summary": "approximate, int8: …"}, quantized={"bits": "int8"})
    assert [figure.value for figure in page.figures(few, Contents())][-1] == "approximate"


def test_a_speed_is_that_of_the_times_beside_it() -> None:
    """Both are medians of the same rounds; where the rounds themselves compare otherwise, there is no speed to tell."""
    close = [timing("PyTorch", 8, 0.0743, 1.0), timing("lorafx", 8, 0.0514, 1.42)]
    told = sentence(facts(benchmark={"timings": close}), Contents())
    assert told.endswith("; 1.45 times as fast as PyTorch (51.4 ms where it takes 74.3, 8 texts of 64 tokens)")
    busy = [timing("PyTorch", 8, 0.0023, 1.0), timing("lorafx", 8, 0.0108, 1.3)]
    told = sentence(facts(benchmark={"timings": busy}), Contents())
    assert told.endswith(
        "; its speed is not clear (times scatter too much: 1.17 to 1.43 times as fast as PyTorch round by round, "
        "10.8 ms where it takes 2.3, 8 texts of 64 tokens in the median; time them again on an idle machine)"
    )


def test_all_trainings_are_told_the_first_one_first() -> None:
    """A demo that trains twice would else say that training did nothing."""
    first = {"metrics": {"eval_accuracy": 0.75, "steps": 1200}, "history": [{"eval_accuracy": 0.25, "step": 0}]}
    second = {"metrics": {"eval_accuracy": 0.8, "steps": 30}, "history": [{"eval_accuracy": 0.75, "step": 0}]}
    report = facts(training={**second, "seconds": 60.0}, **{EARLIER: [{**first, "seconds": 120.0}]})
    figure = page.figures(report, Contents())[0]
    assert (figure.value, figure.detail) == (
        "0.250 → 0.750 → 0.800",
        "on the evaluation data, after 1,200 + 30 steps in 3 min",
    )
    assert "accuracy 0.250 → 0.750 → 0.800 on the evaluation data" in [rung.said for rung in rungs(report)]
    loss = facts(training={"metrics": {"train_loss": 0.3}}, **{EARLIER: [first]})
    assert page.figures(loss, Contents())[0].value == "0.3", "another measure is no start of this one"


def test_what_was_not_checked_is_said() -> None:
    step = PassReport("lora", {}, "exact", ("a",), {}, 2, 8, 0.1, "not checked: no weights were read")
    model = {"class": "Bert", "checkpoint": None}
    report = Report(model, (step,), {"adapter": RoleReport(2, 8, 8, 32), "base": RoleReport(1, 24, 0, 96)})
    told = "Bert: lora on 1 weight; 8 of 32 parameters trainable (25.00%); lora not checked: no weights were read"
    assert sentence(report, Contents()) == told
    assert [(rung.name, rung.figure) for rung in rungs(report)] == [("base", ""), ("rewritten", "not compared")]


def test_what_is_only_evaluated_is_not_to_train() -> None:
    """A base that was exported with slots: nothing of it trains any more, whatever its tensors once were."""
    roles = {"base": RoleReport(2, 24, 24, 96)}
    assert "24 of 24" in sentence(Facts({"class": "Bert", "stage": "train"}, roles=roles), Contents())
    evaluated = PassReport("to-eval", {}, "exact", ("a", "b"), {}, 0, 0, 0.1, "equal", 0.0)
    slots = Facts({"class": "Bert", "stage": "eval"}, (evaluated,), roles)
    assert sentence(slots, Contents()) == "Bert: 24 parameters"


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ({"eval_accuracy": 0.8, "eval_loss": 0.4}, ("accuracy", "0.800")),
        ({"eval_perplexity": 16.84, "eval_loss": 2.8}, ("perplexity", "16.8")),
        ({"eval_loss": 0.4, "train_loss": 0.3}, ("loss", "0.4")),
        ({"train_loss": 0.25}, ("training loss", "0.25")),
    ],
)
def test_a_score_is_the_best_measure_there_is(metrics: dict[str, float], told: tuple[str, str]) -> None:
    score = score_of(facts(training={"metrics": metrics}))
    assert score is not None
    assert (score.name, score.value) == told


def test_without_evaluation_the_loss_is_told_as_it_was_logged() -> None:
    """Its mean over all steps, which is what transformers calls the training loss, says nothing of what was learned."""
    logged = [{"loss": 3.9, "step": 10}, {"loss": 3.5, "step": 20}, {"loss": 3.1, "step": 30}, {"train_loss": 3.5}]
    score = score_of(facts(training={"metrics": {"train_loss": 3.5}, "history": logged}))
    assert score is not None
    assert (score.name, score.value, score.on) == ("training loss", "3.9 → 3.1", "as first and last logged")


def test_training_of_another_form_has_no_score() -> None:
    assert score_of(facts(training={"accuracy": 0.5})) is None
    assert pictures(facts(training={"accuracy": 0.5}, Blocks="none", other=[{"module": 3}], **{"x: y": [1]})) == []


# ---- the ladder


def test_the_ladder_has_the_largest_difference_of_each_rung() -> None:
    found = [(rung.name, rung.figure) for rung in rungs(everything())]
    assert found == [
        ("base", ""),
        ("rewritten", "0, every bit"),
        ("trained", "learned"),
        ("folded", "2.0e-07"),
        ("deployed", "6.1e-07"),
    ]


def test_a_pass_that_promises_nothing_changes_the_function() -> None:
    step = PassReport("magnitude", {}, "nothing", ("a",), {}, 0, 0, 0.1, "it promises nothing")
    (_, rung) = rungs(Facts({"class": "Bert"}, (step,)))
    assert (rung.figure, rung.said) == ("changed", "magnitude; magnitude: it promises nothing")


# ---- pictures


def test_pictures_are_of_the_numbers_that_are_there() -> None:
    charts = {picture.title: picture.chart for picture in pictures(everything())}
    training, speed, left, gates, ranks = charts.values()
    assert isinstance(training, Lines)
    assert dict(training.plots) == {
        "training loss, what the methods add included": ((10.0, 0.6), (20.0, 0.4)),
        "loss on the evaluation data": ((0.0, 0.7), (20.0, 0.3)),
        "accuracy on the evaluation data": ((0.0, 0.5), (20.0, 0.875)),
    }
    assert isinstance(speed, Bars)
    assert dict(speed.series)["lorafx"] == pytest.approx((40.0, 40.0))
    assert speed.notes == (("10 ms", "80 ms"), ("4 ms", "32 ms"))
    assert isinstance(left, Bars)
    assert left.series == (("left", (40.0, 41.0, 42.0)),)
    assert gates == Grid(("output",), ("0", "1"), ((0.75, 0.0),), (("75", "0"),)), "the pooler is in no block"
    assert ranks == Grid(("q",), ("0", "1", "2"), ((0.5, 0.75, 1.0),), (("2", "3", "4"),))


def test_two_stacks_are_not_one() -> None:
    rows = [{"module": f"{side}.block.0.q", "rank": rank} for side, rank in (("encoder", 1), ("decoder", 4))]
    (picture,) = pictures(facts(**{"salora: Rank by module": rows}))
    assert isinstance(picture.chart, Grid)
    assert (picture.chart.rows, picture.chart.texts) == (("encoder.block q", "decoder.block q"), (("1",), ("4",)))


def test_one_evaluation_is_no_curve() -> None:
    assert pictures(facts(training={"metrics": {}, "history": HISTORY[:2]})) == []


# ---- the page


class Reader(HTMLParser):
    """Collects text and tags; refuses tags that are not closed, twofold ids, scripts, and what is fetched."""

    VOID = ("meta", "use", "path", "rect", "br", "wbr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.drawn: list[str] = []
        self.links: list[str] = []
        self.charts: list[dict[str, str | None]] = []
        self.loose: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        assert tag not in ("script", "link", "img", "iframe")
        assert "src" not in known
        assert known.get("id") is None or known["id"] not in self.ids
        self.ids.add(str(known.get("id")))
        if tag == "a":
            self.links.append(str(known["href"]))
        elif "href" in known or "xlink:href" in known:
            assert str(known.get("href") or known.get("xlink:href")).startswith("#")
        if tag == "svg":
            self.charts.append(known)
        if tag == "table" and not any(held.get("class") == "scroll" for _, held in self.open):
            self.loose.append(tag)
        if tag not in ("meta", "wbr"):
            self.open.append((tag, known))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if any(tag == "svg" for tag, _ in self.open):
            self.drawn.append(data.strip())


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_stands_alone_and_says_it_all() -> None:
    text = everything().html()
    reader = read(text)
    assert len(reader.charts) == 5
    for said in ("0.500 → 0.875", "2.50 times", "equal to 6.1e-07", "A <note>.", "equal: <largest> difference 6.1e-07"):
        assert said in reader.text
    assert "not taken: too small" in " ".join(reader.text)
    assert "kept 3, of 4, 5" in reader.text
    assert not re.findall(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", text), "nothing is fetched"
    assert not re.findall(r'[{\[]"\w+"\s*[:,]', text), "no raw JSON"


def test_nothing_is_wider_than_a_phone() -> None:
    text = everything().html()
    reader = read(text)
    assert reader.loose == [], "tables outside a box that scrolls"
    for chart in reader.charts:
        assert "viewbox" in chart
        assert not {"width", "height"} & chart.keys()
        assert chart["aria-label"]
    style = text[text.index("<style>") : text.index("</style>")]
    assert re.search(r"svg \{[^}]*width: 100%; max-width: \d+rem; height: auto", style)
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", style)
    assert re.search(r"body \{[^}]*overflow-wrap: anywhere", style)
    least = re.sub(r"min\([^)]*\)|max-width:[^;]*", "", style)
    widths = re.findall(r"(?:width:|minmax\()\s*([\d.]+)(rem|em|px)", least)
    assert widths
    assert all(float(size) * (1 if unit == "px" else 16) <= PHONE for size, unit in widths), widths
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in style


#: Lays out a page in frames of several widths, everything unfolded, and says how wide each is and what it would need.
MEASURE = """<!doctype html><title></title><script>onload = () => {
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument;
    page.querySelectorAll("details").forEach(part => part.open = true);
    return [frame.clientWidth, page.documentElement.clientWidth, page.documentElement.scrollWidth];
  }));
}</script>"""


def laid_out(page: str, widths: tuple[int, ...], folder: Path) -> list[list[int]]:
    """The width of each frame, of the page inside beside its scroll bar, and of what is on it; [] without Chromium."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        return []
    frames = "".join(f'<iframe srcdoc="{html.escape(page)}" width={width} height=900></iframe>' for width in widths)
    (folder / "frames.html").write_text(MEASURE + frames, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    command = [browser, *options, f"--user-data-dir={folder / 'profile'}", (folder / "frames.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"<title>(.+?)</title>", shown)
    assert found is not None, shown[:200]
    return json.loads(found[1])


def test_a_name_breaks_between_its_words() -> None:
    assert (
        "<h1>Bert<wbr>For<wbr>Sequence<wbr>Classification from tiny-<wbr>bert</h1>"
        in dataclasses.replace(
            everything(), model={"class": "BertForSequenceClassification", "checkpoint": "tiny-bert"}
        ).html()
    )


def test_it_is_no_wider_than_a_phone_or_a_screen(tmp_path: Path) -> None:
    text = everything().html()
    wide = text.replace("</header>", "<p style='width:500px'>wide</p></header>")
    for shown, overflows in ((text, []), (wide, [390])):
        found = laid_out(shown, (390, 1280), tmp_path)
        assert [frame for frame, inside, needed in found if needed > inside] == (overflows if found else [])


def test_charts_take_the_colour_of_the_page() -> None:
    text = everything().html()
    assert "currentColor" in text
    assert "#123456" not in text, "the colour that stands for it while matplotlib draws"


def test_names_of_any_letters_are_drawn_as_they_are() -> None:
    names = ("模型 <PyTorch>", "costs $5_{", "α → β $x$")
    timed = [timing(name, 1, 0.01, 1.0) for name in names]
    assert set(names) <= set(read(facts(benchmark={"timings": timed}).html()).drawn)


def test_the_same_report_is_the_same_page() -> None:
    assert everything().html() == everything().html()


def test_without_matplotlib_the_numbers_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "can_draw", lambda: False)
    reader = read(everything().html())
    assert reader.charts == []
    assert any("matplotlib" in part for part in reader.text)
    assert "0.875" in reader.text
    assert not any("matplotlib" in part for part in read(facts().html()).text), "nothing to draw, nothing to say"


# ---- in a folder


def test_a_folder_has_its_page_with_links(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "a model.onnx").write_bytes(b"x" * 1500)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter_model.safetensors").write_bytes(b"x" * 3000)
    (tmp_path / ".hidden").write_bytes(b"x")
    write_report(everything(), tmp_path, "onnx/")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "onnx", PAGE, REPORT, "run"]
    assert read_report(tmp_path).to_json() == json.loads(json.dumps(everything().to_json()))
    reader = read((tmp_path / PAGE).read_text(encoding="utf-8"))
    assert set(reader.links) == {"onnx/a%20model.onnx", "run/adapter_model.safetensors"}
    assert "1.5 kB" in reader.text, "the size is that of what is deployed"
    assert "4.5 kB" not in reader.text
