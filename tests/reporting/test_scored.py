"""Accuracy against speed: a point for what was both scored and timed, and for nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest

from lorafx.reporting.answer import EARLIER
from lorafx.reporting.charts import Points, svg_of
from lorafx.reporting.contents import Contents
from lorafx.reporting.facts import Facts, PassReport, RoleReport
from lorafx.reporting.page import draw_page
from lorafx.reporting.pictures import Picture, pictures
from lorafx.reporting.scored import SCORED, Form, Scored, forms_of, reached, scored
from tests.reporting.test_page import laid_out, read, timing

LORA = PassReport("lora", {}, "exact", ("a (linear)",), {}, 4, 0, 0.1, "equal", 0.0)
FOLD = PassReport("fold-affine", {}, "close", ("a: linear",), {}, 0, 0, 0.1, "equal", 2e-7, True)
PARITY = {"ok": True, "max_rel": 6.1e-7, "checked": "full", "summary": "equal: largest difference 6.1e-07"}
TIMED = [timing("the base", batch, batch * 0.01, 1.0) for batch in (1, 8)]
TIMED += [timing("made", batch, batch * 0.004, 2.5) for batch in (1, 8)]


def training(begun: float | None, ended: float, rows: str | None = "same", **more: Any) -> dict[str, Any]:
    start = [] if begun is None else [{"eval_accuracy": begun, "eval_loss": 1.0, "step": 0}]
    return {"metrics": {"eval_accuracy": ended}, "history": start, **({"evaluated": rows} if rows else {}), **more}


def report(parameters: int = 1000, passes: tuple[PassReport, ...] = (LORA, FOLD), **sections: Any) -> Facts:
    model = {"class": "Bert", "checkpoint": "tiny", "folded": True, "base parameters": 1000}
    told = {"training": training(0.5, 0.875), "parity": PARITY, "benchmark": {"timings": TIMED}, **sections}
    return Facts(model, passes, {"base": RoleReport(3, parameters, 0, 4 * parameters)}, sections=told)


def with_points(facts: Facts) -> Facts:
    return facts.plus(**{SCORED: scored(facts, forms_of(facts, "the base", "made"))})


def picture(facts: Facts) -> Picture | None:
    return next((one for one in pictures(facts) if one.title.endswith("against speed")), None)


# ---- what was scored


def test_scores_by_how_many_trainings_there_were() -> None:
    both: dict[str, Any] = {"training": training(0.75, 0.8), EARLIER: [training(0.25, 0.75)]}
    assert reached(report(**both)) == {0: 0.25, 1: 0.75, 2: 0.8}


@pytest.mark.parametrize("rows", [("one", "another"), ("one", None), (None, None)])
def test_scores_on_other_rows_do_not_compare(rows: tuple[str | None, str | None]) -> None:
    """Nor do those of which nobody knows the rows. Those of one training do, whatever they are of."""
    both: dict[str, Any] = {"training": training(0.75, 0.8, rows[1]), EARLIER: [training(0.25, 0.75, rows[0])]}
    assert reached(report(**both)) == {2: 0.8}
    assert reached(report(training=training(0.25, 0.75, rows[1]))) == {0: 0.25, 1: 0.75}


def test_another_measure_is_no_score_of_this_one() -> None:
    first = {"metrics": {"eval_f1": 0.3}, "history": [{"eval_f1": 0.1, "step": 0}], "evaluated": "same"}
    both: dict[str, Any] = {"training": training(None, 0.8), EARLIER: [first]}
    assert reached(report(**both)) == {2: 0.8}
    assert reached(report(training={"metrics": {"train_loss": 0.1}})) == {}
    assert reached(dataclasses.replace(report(), sections={})) == {}


# ---- what a point is proven by


def test_the_forms_of_a_model_that_keeps_the_shapes_of_its_base() -> None:
    assert [(one.candidate, one.value) for one in scored(report(), forms_of(report(), "the base", "made"))] == [
        ("the base", 0.5),
        ("the base", 0.875),
        ("made", 0.875),
    ]


def models(facts: Facts) -> list[str]:
    return [one.model for one in scored(facts, forms_of(facts, "the base", "made"))]


def test_nothing_is_a_point_without_its_proof() -> None:
    before, folded, deployed = models(report())
    assert models(report(parameters=900)) == [before, deployed], "smaller than the base: another speed"
    gated = dataclasses.replace(report(), roles={"base": RoleReport(3, 900, 0, 1), "gate": RoleReport(1, 100, 0, 1)})
    assert models(gated) == [before, deployed], "gates that are left are no parameters of the base"
    assert models(report(parity={"ok": None, "summary": "approximate"})) == [before, folded], "quantised: not scored"
    assert models(report(parity={"ok": False, "summary": "differs"})) == [before, folded]
    for step in (
        dataclasses.replace(LORA, promise="nothing"),
        dataclasses.replace(LORA, proof="not checked: no weights were read"),
    ):
        assert models(report(passes=(step, FOLD))) == [folded, deployed], "not known to begin as the base"
    assert models(report(training=training(None, 0.875))) == [folded, deployed]
    assert models(report(benchmark={"timings": []})) == []


# ---- the picture


def test_the_picture_has_the_score_and_the_time_of_each() -> None:
    found = picture(with_points(report()))
    assert found is not None
    assert found.title == "Accuracy against speed"
    assert isinstance(found.chart, Points)
    assert found.chart.names == (
        "0.500 at 80 ms, the base before training",
        "0.875 at 80 ms, trained and folded, in PyTorch",
        "0.875 at 32 ms, trained and deployed",
    )
    assert found.chart.places == ((80.0, 0.5), (80.0, 0.875), (32.0, 0.875))
    assert found.chart.spans[2] == pytest.approx((28.8, 38.4))
    assert (found.chart.along, found.chart.up) == ("ms for 8 texts of 64 tokens", "accuracy")
    assert found.remarks == (
        "timed as “the base”: what was put on the base had not changed it yet",
        "timed as “the base”: folded it has the base's shapes, and so its speed",
        "timed as “made”: equal to 6.1e-07 of the scale of the trained model's outputs",
    )


def test_a_decoder_has_its_perplexity() -> None:
    told = {"metric": "perplexity", "metrics": {"eval_perplexity": 16.84, "eval_loss": 2.8}}
    found = picture(with_points(report(training={**told, "history": [{"eval_perplexity": 1234.5, "step": 0}]})))
    assert found is not None
    assert isinstance(found.chart, Points)
    assert (found.title, found.chart.up) == ("Perplexity against speed", "perplexity")
    assert found.chart.names[::2] == (
        "1,234 at 80 ms, the base before training",
        "16.8 at 32 ms, trained and deployed",
    )


def test_its_caption_tells_the_threads() -> None:
    timed = {"timings": TIMED, "candidates": [{"label": "the base", "threads": 2}, {"label": "made", "threads": 2}]}
    found = picture(with_points(report(benchmark=timed)))
    assert found is not None
    assert "8 texts of 64 tokens in 2 threads" in found.note


def test_one_point_is_no_picture_and_a_time_that_is_not_clear_is_no_point() -> None:
    facts = report(training=training(None, 0.875), parity={"ok": None, "summary": "approximate"})
    assert len(scored(facts, forms_of(facts, "the base", "made"))) == 1
    assert picture(with_points(facts)) is None
    busy = [timing("the base", 8, 0.08, 1.0), timing("made", 8, 0.2, 2.5)]
    found = picture(with_points(report(benchmark={"timings": busy})))
    assert found is not None
    assert isinstance(found.chart, Points)
    assert [place for place, _ in found.chart.places] == [80.0, 80.0], "not that of what was slowed down"


def test_a_report_of_an_earlier_version_has_no_such_picture() -> None:
    assert picture(report()) is None
    for strange in ("none", [3], [{"candidate": "made"}], {"made": 0.5}):
        assert picture(report(scored=strange)) is None


def test_numbers_stand_where_there_is_room() -> None:
    """Of two places that nearly touch one has its number below it; of three in a row none is on another's."""
    places = ((100.0, 0.5), (100.0, 0.81), (100.0, 0.8), (30.0, 0.8))
    spans = tuple((along, along) for along, _ in places)
    drawn = svg_of(Points(("a", "b", "c", "d"), places, spans, "ms", "accuracy"), "chart", "about")
    numbers = re.findall(r'font-size: 8px[^>]*text-anchor: middle[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>(\d)<', drawn)
    at = {number: (float(x), float(y)) for x, y, number in numbers}
    assert sorted(at) == ["1", "2", "3", "4"]
    assert at["3"][1] - at["2"][1] > 10, "one above, one below"
    assert all(math.dist(at[a], at[b]) > 8 for a, b in itertools.combinations(at, 2)), "8 is the height of a digit"


def test_it_is_on_the_page_with_its_reasons() -> None:
    text = draw_page(with_points(report()), Contents())
    reader = read(text)
    assert "Accuracy against speed" in reader.text
    assert {"1", "2", "3", "ms for 8 texts of 64 tokens", "accuracy"} <= set(reader.drawn)
    assert "3: 0.875 at 32 ms, trained and deployed" in reader.drawn
    assert any("folded it has the base's shapes" in part for part in reader.text)


def test_it_is_no_wider_than_a_phone_or_a_screen(tmp_path: Path) -> None:
    long = "a model of a name that goes on and on, with words and more words than a line of a phone has room for"
    forms = [Form("the base", long, 0, long), Form("made", "BertForSequenceClassification" * 4, 1, "x" * 200)]
    facts = report()
    text = draw_page(facts.plus(**{SCORED: scored(facts, forms)}), Contents())
    assert len(read(text).charts) == 2
    for frame, inside, needed in laid_out(text, (390, 1280), tmp_path):
        assert needed <= inside, frame


def test_a_form_that_was_not_timed_is_none() -> None:
    facts = report()
    assert scored(facts, [Form("another", "x", 1, "y"), Form("made", "x", 3, "y")]) == []
    assert scored(facts, [Form("made", "x", 1, "y")]) == [Scored("made", "x", "accuracy", 0.875, "y")]
