"""Which pictures a report has: each from numbers that are in it, by their form alone, so that any pass may have one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..graph.site import block_of, stack_of
from .answer import called, is_clear, score_text, shaped, three_digits, timings, timings_at_one_shape
from .charts import Bars, Chart, Grid, Lines, Points, shortened
from .facts import Facts
from .render import Section, section_of
from .scored import SCORED, Scored

#: What training logs that is worth a curve.
_CURVES = ("loss", "eval_loss", "eval_accuracy", "eval_perplexity")
_OF = re.compile(r"(\d+) of (\d+)")


@dataclass(frozen=True)
class Picture:
    """One picture: what it shows, what to know, the chart, the numbers it is drawn from, and what to know of parts."""

    title: str
    note: str
    chart: Chart
    table: Section
    remarks: tuple[str, ...] = ()


def pictures(facts: Facts) -> list[Picture]:
    """All that a report has numbers for."""
    found = [*_training(facts), *_latency(facts), *_scored(facts), *_removed(facts)]
    for name, rows in facts.sections.items():
        if isinstance(rows, list) and rows and all(_of_a_module(row) for row in rows):
            found += _by_block(name, rows)
    return found


def _of_a_module(row: Any) -> bool:
    return isinstance(row, Mapping) and isinstance(row.get("module"), str)


def _training(facts: Facts) -> Iterator[Picture]:
    training = facts.sections.get("training")
    history = training.get("history") if isinstance(training, Mapping) else None
    curves = []
    measured = f"eval_{training.get('metric')}" if isinstance(training, Mapping) else "loss"
    for key in dict.fromkeys((*_CURVES, measured)):
        label = "training loss" if key == "loss" else f"{called(key)} on the evaluation data"
        points = tuple((float(row["step"]), float(row[key])) for row in history or () if _is_point(row, key))
        if len(points) > 1:
            penalised = key == "loss" and any("penalty" in row for row in history or ())
            curves.append((f"{label}, what the methods add included" if penalised else label, points))
    if curves:
        steps = sorted({step for _, points in curves for step, _ in points})
        known = [dict(points) for _, points in curves]
        rows = tuple((f"{step:,.0f}", *(_shown(points.get(step)) for points in known)) for step in steps)
        table = Section("Training", ("step", *(label for label, _ in curves)), rows)
        yield Picture("Training", "What training logged as it went.", Lines(tuple(curves)), table)


def _is_point(row: Any, key: str) -> bool:
    return isinstance(row, Mapping) and all(isinstance(row.get(name), (int, float)) for name in ("step", key))


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _latency(facts: Facts) -> Iterator[Picture]:
    rows = timings(facts)
    if not rows:
        return
    first = str(rows[0]["candidate"])
    unit = {_inputs(row): float(row["median"]) / 100 for row in rows if row["candidate"] == first}
    names = list(dict.fromkeys(str(row["candidate"]) for row in rows))
    timed = {name: [row for row in rows if row["candidate"] == name] for name in names}

    def shares(key: str, name: str) -> tuple[float, ...]:
        return tuple(float(row[key]) / unit[_inputs(row)] for row in timed[name])

    chart = Bars(
        tuple(shaped(row).replace(" of ", "\nof ") for row in timed[first]),
        tuple((name, shares("median", name)) for name in names),
        f"time, % of {first}" if len(first) < 40 else "time, % of the first",
        tuple(tuple(zip(shares("p10", name), shares("p90", name), strict=True)) for name in names),
        tuple(tuple(f"{three_digits(row['median'] * 1e3)} ms" for row in timed[name]) for name in names),
    )
    note = "Medians of interleaved rounds; the lines go from the 10th to the 90th of 100, as far as there is room."
    yield Picture("How fast", note, chart, Section("How fast", _TIMED, tuple(map(_timed, rows))))


_TIMED = ("inputs", "what", "median ms", "p10 ms", "p90 ms", "times as fast, round by round")


def _timed(row: Mapping[str, Any]) -> tuple[str, ...]:
    times = (three_digits(row[key] * 1e3) for key in ("median", "p10", "p90"))
    return (shaped(row), row["candidate"], *times, f"{row['ratio']:.2f}")


def _scored(facts: Facts) -> Iterator[Picture]:
    """What was scored and timed, both; a single one compares with nothing."""
    timed = timings_at_one_shape(facts)
    rows = facts.sections.get(SCORED)
    known = [one for one in map(Scored.read, rows if isinstance(rows, list) else ()) if one is not None]
    times = {row["candidate"]: row for row in timed if is_clear(row, timed[0])}
    found = [(one, times[one.candidate]) for one in known if one.candidate in times and one.measure == known[0].measure]
    if len(found) < 2:
        return
    measure = found[0][0].measure
    figures = [(score_text(measure, one.value), three_digits(row["median"] * 1e3)) for one, row in found]
    chart = Points(
        shortened(
            [f"{value} at {time} ms, {one.model}" for (one, _), (value, time) in zip(found, figures, strict=True)], 68
        ),
        tuple((row["median"] * 1e3, one.value) for one, row in found),
        tuple((row["p10"] * 1e3, row["p90"] * 1e3) for _, row in found),
        f"ms for {shaped(timed[0])}",
        measure,
    )
    table = tuple(
        (one.model, value, one.candidate, *_timed(row)[2:5], one.why)
        for (one, row), (value, _) in zip(found, figures, strict=True)
    )
    yield Picture(
        f"{measure[0].upper()}{measure[1:]} against speed",
        f"Scores on the evaluation data, and the median time of {shaped(timed[0])}{_run_by(facts)}; the lines go from "
        "the 10th to the 90th of 100.",
        chart,
        Section("Scored and timed", ("model", measure, "timed as", *_TIMED[2:5], "why both are of it"), table),
        tuple(f"timed as “{one.candidate}”: {one.why}" for one, _ in found),
    )


def _run_by(facts: Facts) -> str:
    """How many threads a benchmark had, where it says so."""
    benchmark = facts.sections.get("benchmark")
    candidates = benchmark.get("candidates") if isinstance(benchmark, Mapping) else None
    threads = sorted({row["threads"] for row in candidates or () if isinstance(row.get("threads"), int)})
    if not threads:
        return ""
    return f" in {' or '.join(map(str, threads))} thread{'s' if threads != [1] else ''}"


def _inputs(row: Mapping[str, Any]) -> tuple[int, int]:
    return row["batch"], row["length"]


def _removed(facts: Facts) -> Iterator[Picture]:
    rows = facts.sections.get("Blocks")
    if not isinstance(rows, list) or not rows:
        return
    kept = [row for row in rows if row["parameters before"]]
    shares = tuple(100 * row["parameters after"] / row["parameters before"] for row in kept)
    chart = Bars(
        shortened([row["block"] for row in kept], 20),
        (("left", shares),),
        "% of the base's parameters that are left",
        notes=(tuple(f"{share:.0f} %" for share in shares),),
    )
    note = "What is left of each block after folding removed the channels that nothing needs."
    yield Picture("What was removed", note, chart, section_of("What was removed", rows))


def _by_block(name: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[Picture]:
    """Pictures of rows that each tell of a module: how many of how many are open, or of which rank it is."""
    method, _, title = name.partition(": ")
    who, table = f"{title or name} ({method})", section_of(name, list(rows))
    several = len({stack_of(row["module"]) for row in rows if block_of(row["module"]) is not None}) > 1
    shares: dict[tuple[str, int], tuple[float, str]] = {}
    for row in rows:
        for key, value in row.items():
            counts = _OF.fullmatch(value) if isinstance(value, str) else None
            if counts is not None and int(counts[2]) and (place := _place(row["module"], key, several)) is not None:
                shares[place] = int(counts[1]) / int(counts[2]), f"{100 * int(counts[1]) / int(counts[2]):.0f}"
    if shares:
        yield Picture(who, "Percent that is open, by layer and block.", _grid(shares), table)
    ranks = {
        place: row["rank"]
        for row in rows
        if isinstance(row.get("rank"), int) and (place := _place(row["module"], "", several)) is not None
    }
    most = max(ranks.values(), default=0)
    if most:
        cells = {place: (rank / most, str(rank)) for place, rank in ranks.items()}
        yield Picture(f"Ranks by layer ({method})", "The rank each layer has.", _grid(cells), table)


def _place(module: str, key: str, several: bool) -> tuple[str, int] | None:
    """The kind of layer and the block of a module's row, with its stack where there are several; None outside them."""
    block, stack = block_of(module), stack_of(module)
    if block is None:
        return None
    inside = module.removeprefix(f"{stack}.{block}").removeprefix(".")
    kind = f"{stack} {inside}" if several else inside or stack
    return kind + {"gate_in": " in", "gate_out": " out"}.get(key, ""), block


def _grid(cells: Mapping[tuple[str, int], tuple[float, str]]) -> Grid:
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = sorted({block for _, block in cells})
    return Grid(
        shortened(kinds, 24),
        tuple(map(str, blocks)),
        tuple(tuple(cells[kind, block][0] if (kind, block) in cells else None for block in blocks) for kind in kinds),
        tuple(tuple(cells.get((kind, block), (0, ""))[1] for block in blocks) for kind in kinds),
    )
