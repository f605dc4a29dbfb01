"""What ``benchmarks.frontier`` shows of its runs: exports and times, the table, the figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.frontier_rows import LORA

#: The reference of all times: what transformers makes of LoRA, merged.
THEIRS = "transformers' export"
SHAPES = ((1, 64), (8, 64), (32, 128))

#: What the table and the figure call the rows.
TITLES = {
    LORA: "LoRA alone",
    "first-layers": "LoRA on the first layers",
    "tp-magnitude": "Torch-Pruning, magnitude",
    "tp-taylor": "Torch-Pruning, Taylor",
    "tp-activation": "Torch-Pruning, activation",
    "mask-search": "mask search after training",
    "authors-finegates": "the authors' FineGates",
    "fine": "lorafx, fine",
    "fine-distilled": "lorafx, fine, distilled",
    "fine-coarse": "lorafx, fine and coarse",
    "fine-coarse-distilled": "lorafx, fine and coarse, distilled",
}


def shape_name(shape: tuple[int, int]) -> str:
    """Texts and tokens of each, as they are written."""
    return f"{shape[0]}x{shape[1]}"


@dataclass(frozen=True)
class Point:
    """A row at one budget.

    Attributes:
        row: its name
        budget: what it was asked to keep
        runs: what its folds gave, by fold
        whole: the accuracy of LoRA alone, by fold
        times: its timings by shape, as :func:`timed` keeps them
    """

    row: str
    budget: float
    runs: Mapping[int, Mapping[str, Any]]
    whole: Mapping[int, float]
    times: Mapping[str, Mapping[str, float]]

    @property
    def lost(self) -> list[float]:
        """Points of accuracy lost against LoRA alone, fold by fold, where both are there."""
        folds = sorted(self.runs.keys() & self.whole.keys())
        return [100 * (self.whole[fold] - self.runs[fold]["accuracy"]) for fold in folds]

    @property
    def accuracy(self) -> float:
        """The mean over folds."""
        return statistics.mean(run["accuracy"] for run in self.runs.values())

    def left(self, what: str) -> float:
        """The share of ``weights`` or ``flops`` that is left, the mean over folds."""
        return statistics.mean(run[what][1] / run[what][0] for run in self.runs.values())


def points(runs: Sequence[Mapping[str, Any]], times: Mapping[str, Any]) -> list[Point]:
    """The rows at their budgets, in the order of the runs."""
    grouped: dict[tuple[str, float], dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        grouped.setdefault((run["row"], run["budget"]), {})[run["fold"]] = run
    whole = {fold: run["accuracy"] for fold, run in grouped.get((LORA, 1.0), {}).items()}
    return [Point(*key, found, whole, times.get(label(*key), {})) for key, found in grouped.items()]


def label(row: str, budget: float) -> str:
    """What timings call a row at one budget."""
    return f"{row} {budget:.0%}"


def error(values: Sequence[float]) -> float:
    """The standard error of the mean; nan of one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


# ---- the table


def table(found: Sequence[Point]) -> str:
    """Markdown: one line a row and budget."""
    names = [shape_name(shape) for shape in SHAPES]
    head = ["", "asked", "weights left", "FLOPs left", "accuracy", "points lost", *(f"{name} ms" for name in names)]
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    for point in found:
        lines.append(f"| {' | '.join(_cells(point, names))} |")
    short = sorted({len(point.runs) for point in found})
    if short and short != [5]:
        counts = f"{short[0]} to {short[-1]}" if len(short) > 1 else str(short[0])
        lines += ["", f"Rows have {counts} of 5 folds so far."]
    return "\n".join(lines)


def _cells(point: Point, shapes: Sequence[str]) -> Iterator[str]:
    yield TITLES.get(point.row, point.row)
    yield f"{point.budget:.0%}"
    yield from (f"{point.left(what):.1%}" for what in ("weights", "flops"))
    yield f"{point.accuracy:.4f}"
    lost = [] if point.row == LORA else point.lost
    spread = f" ± {error(lost):.2f}" if len(lost) > 1 else ""
    yield f"{statistics.mean(lost):.2f}{spread}" if lost else ""
    for shape in shapes:
        timing = point.times.get(shape)
        yield "" if timing is None else f"{1e3 * timing['median']:.1f} ({timing['ratio']:.2f}x)"


# ---- times


def timed(folders: Mapping[str, Path], repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds of the exported models, all in one interleaved run on the CPU, by label and shape; the first is the one
    that the others are compared with."""
    from lorafx.proof.bench import bench

    result = bench(*folders.items(), shapes=SHAPES, repeats=repeats)
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in folders}
    for timing in result.timings:
        told = {"median": timing.median, "ratio": timing.ratio, "p10": timing.p10, "p90": timing.p90}
        found[timing.candidate][shape_name((timing.batch, timing.length))] = told
    return found


def read(file: Path) -> dict[str, Any]:
    """A JSON object, empty where the file is not there."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


# ---- the figure

#: lorafx's lines, and the others': colour, marker and dashes.
_OURS = {
    "fine": ("#9ecae1", "o", "-"),
    "fine-distilled": ("#4292c6", "o", "-"),
    "fine-coarse": ("#2171b5", "s", "-"),
    "fine-coarse-distilled": ("#08306b", "s", "-"),
}
_OTHERS = {
    "first-layers": ("#e6550d", "v", "--"),
    "tp-magnitude": ("#969696", "^", "--"),
    "tp-taylor": ("#636363", "D", "--"),
    "tp-activation": ("#bdbdbd", "P", "--"),
    "mask-search": ("#31a354", "X", "--"),
    "authors-finegates": ("#756bb1", "*", ":"),
}
_STYLES = {**_OURS, **_OTHERS}
#: How far below LoRA alone the figure shows accuracies: lines that fall deeper leave it.
_DEPTH = 0.12


def figure(found: Sequence[Point], file: Path) -> None:
    """Accuracy against milliseconds as SVG: a panel for each shape, a line for each row, from LoRA alone on.

    Error bars are the standard error of the points lost; what loses more than twelve points is below the panels.
    SystemExit when nothing has been timed.
    """
    import matplotlib as mpl

    mpl.use("svg")
    # The same figure is the same file.
    mpl.rcParams.update(
        {"svg.hashsalt": "frontier", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    )
    from matplotlib import pyplot

    with_times = [point for point in found if point.times]
    if not with_times:
        raise SystemExit("nothing has been timed; run: python -m benchmarks.frontier time")
    drawing, panels = pyplot.subplots(1, len(SHAPES), figsize=(10, 3.8), sharey=True)
    for panel, shape in zip(panels, map(shape_name, SHAPES), strict=True):
        for row in dict.fromkeys(point.row for point in with_times if point.row != LORA):
            _line(panel, [point for point in with_times if point.row in (LORA, row)], row, shape)
        panel.set_title(f"{shape.replace('x', ' × ')} tokens")
        panel.set_xlabel("milliseconds")
        panel.set_xlim(left=0)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("accuracy, five folds")
    whole = max(point.accuracy for point in with_times)
    panels[0].set_ylim(bottom=max(panels[0].get_ylim()[0], whole - _DEPTH))
    handles, labels = panels[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    drawing.tight_layout(rect=(0, 0.16, 1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(file, format="svg", metadata={"Date": None})
    pyplot.close(drawing)


def _line(panel: Any, found: Sequence[Point], row: str, shape: str) -> None:
    """One row, LoRA alone included, the fastest first."""
    colour, marker, dashes = _STYLES.get(row, ("#d6616b", "h", "-."))
    own = sorted((point for point in found if shape in point.times), key=lambda point: point.times[shape]["median"])
    panel.errorbar(
        [1e3 * point.times[shape]["median"] for point in own],
        [point.accuracy for point in own],
        [0.0 if point.row == LORA or len(point.lost) < 2 else error(point.lost) / 100 for point in own],
        color=colour,
        marker=marker,
        linestyle=dashes,
        markersize=4,
        linewidth=2 if row in _OURS else 1.2,
        elinewidth=0.8,
        label=TITLES.get(row, row),
    )
