"""Charts as data, and as static SVG by matplotlib, where it is installed (the extra ``report``).

An SVG takes the width it is given and the colour of the text around it, so it serves light and dark pages alike. Its
text stays text.
"""

from __future__ import annotations

import functools
import html
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

#: Stands for the colour of the page's text while matplotlib draws.
_INK = "#123456"
_BLUE, _ORANGE, _GREY = "#3b7dd8", "#e07b39", "#8a8f98"
_COLOURS = (_BLUE, _GREY, _ORANGE, "#4aa564", "#9467bd")
#: Inches; at 96 dots each a phone's width of 360 shows the text at nine tenths of its size.
_WIDTH = 4.2
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are names, whatever signs they hold
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **{f"{name}color": _INK for name in ("text.", "axes.label", "axes.edge", "xtick.", "ytick.")},
}


@dataclass(frozen=True)
class Lines:
    """Curves over steps, one plot above the other: a label for each plot, and its points."""

    plots: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]
    along: str = "step"


@dataclass(frozen=True)
class Bars:
    """Horizontal bars: a group for each label, in it one for each series; the last series is the one to look at.

    ``spans`` are from where to where values scatter, ``notes`` what stands at the end of a bar.
    """

    labels: tuple[str, ...]
    series: tuple[tuple[str, tuple[float, ...]], ...]
    along: str
    spans: tuple[tuple[tuple[float, float], ...], ...] = ()
    notes: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Grid:
    """A field of cells, coloured by a share between 0 and 1; None is a cell that is not there."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    shares: tuple[tuple[float | None, ...], ...]
    texts: tuple[tuple[str, ...], ...]
    along: str = "block"


@dataclass(frozen=True)
class Points:
    """Places in a plane, numbered: a name for each, where it is, and from where to where it scatters along the first
    axis."""

    names: tuple[str, ...]
    places: tuple[tuple[float, float], ...]
    spans: tuple[tuple[float, float], ...]
    along: str
    up: str


Chart = Lines | Bars | Grid | Points


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


@functools.lru_cache(maxsize=64)  # the pages of a run, its fold and its export show the same curves
def svg_of(chart: Chart, name: str, about: str) -> str:
    """A chart as an ``<svg>`` element for the inside of a page.

    Args:
        name: one word, another for each chart of a page
        about: what it shows, for those who cannot see it
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # Text stays text: the viewer has fonts for more letters than matplotlib comes with.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure = Figure(layout="constrained")
        FigureCanvasSVG(figure)
        _DRAW[type(chart)](figure, chart)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inlined(stream.getvalue(), about)


def _inlined(text: str, about: str) -> str:
    """What matplotlib wrote as a part of a page: no prologue, no names that another chart has too, the page's ink."""
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace(_INK, "currentColor")
    head, rest = text.split(">", 1)
    (box,) = re.findall(r'viewBox="[^"]*"', head)
    label = html.escape(about, quote=True)
    links = 'xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg"'
    return f'<svg {links} {box} role="img" aria-label="{label}">{rest}'


def _lines(figure: Any, chart: Lines) -> None:
    figure.set_size_inches(_WIDTH, 1.45 * len(chart.plots) + 0.3)
    axes = figure.subplots(len(chart.plots), 1, sharex=True, squeeze=False)[:, 0]
    for place, (plot, (label, points)) in enumerate(zip(axes, chart.plots, strict=True)):
        along, values = zip(*points, strict=True)
        plot.plot(along, values, color=_COLOURS[place % len(_COLOURS)], marker="o" if len(points) < 30 else "", ms=3)
        plot.set_title(label, loc="left", fontsize=8.5)
        plot.grid(alpha=0.25)
        plot.annotate(f"{values[-1]:.3g}", (along[-1], values[-1]), (5, -3), textcoords="offset points")
        plot.margins(x=0.12, y=0.2)
    axes[-1].set_xlabel(chart.along)


def _bars(figure: Any, chart: Bars) -> None:
    count, groups = len(chart.series), len(chart.labels)
    figure.set_size_inches(_WIDTH, max(1.4, 0.19 * count * groups + 0.12 * groups + (0.75 if count > 1 else 0.5)))
    axes = figure.subplots()
    thick = 0.8 / count
    # What scatters further than this would make the bars too small to compare.
    far = 1.6 * max(value for _, values in chart.series for value in values)
    for place, (name, values) in enumerate(chart.series):
        middles = [group + (place - (count - 1) / 2) * thick for group in range(groups)]
        colour = _COLOURS[(count - 1 - place) % len(_COLOURS)]  # the last is what was made
        axes.barh(middles, values, thick * 0.9, label=name, color=colour)
        spans = chart.spans[place] if chart.spans else tuple((value, value) for value in values)
        ends = [min(end, far) for _, end in spans]
        axes.hlines(middles, [start for start, _ in spans], ends, color=_INK, linewidth=1)
        for note, end, middle in zip(chart.notes[place] if chart.notes else (), ends, middles, strict=False):
            axes.annotate(note, (end, middle), (4, -2.5), textcoords="offset points", fontsize=7.5)
    axes.set_yticks(range(groups), chart.labels)
    axes.invert_yaxis()
    axes.set_xlabel(chart.along)
    axes.margins(x=0.18 if chart.notes else 0.05)
    axes.grid(axis="x", alpha=0.25)
    if count > 1:
        figure.legend(loc="outside upper left", frameon=False, ncols=1, fontsize=8)


def _grid(figure: Any, chart: Grid) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    rows, columns = len(chart.rows), len(chart.columns)
    figure.set_size_inches(_WIDTH, 0.24 * rows + 0.65)
    axes = figure.subplots()
    values = [[float("nan") if share is None else share for share in row] for row in chart.shares]
    shades = LinearSegmentedColormap.from_list("share", ["#dbe7f7", _BLUE, "#123a73"])
    axes.pcolormesh(values, cmap=shades, vmin=0, vmax=1, edgecolors=_GREY, linewidth=0.3)
    axes.invert_yaxis()
    step = 1 + (columns - 1) // 12
    axes.set_xticks([place + 0.5 for place in range(0, columns, step)], chart.columns[::step])
    axes.set_yticks([place + 0.5 for place in range(rows)], chart.rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(chart.along)
    if columns > 8 or max(len(text) for row in chart.texts for text in row) > 4:
        return  # no room; the numbers are in the table below
    for y, (row, texts) in enumerate(zip(chart.shares, chart.texts, strict=True)):
        for x, (share, text) in enumerate(zip(row, texts, strict=True)):
            colour = "#ffffff" if (share or 0) > 0.45 else "#101418"
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7, color=colour)


def _points(figure: Any, chart: Points) -> None:
    figure.set_size_inches(_WIDTH, 2.3 + 0.19 * len(chart.names))
    axes = figure.subplots()
    for number, (name, (along, up)) in enumerate(zip(chart.names, chart.places, strict=True), 1):
        start, end = chart.spans[number - 1]
        colour = _COLOURS[(len(chart.names) - number) % len(_COLOURS)]  # the last is what was made
        axes.hlines(up, start, end, color=colour, linewidth=1)
        axes.plot([along], [up], "o", color=colour, ms=6, label=f"{number}: {name}")
    axes.set_xlim(0, 1.12 * max(end for _, end in chart.spans))
    axes.margins(y=0.25)
    for number, (place, side) in enumerate(zip(chart.places, _sides(chart.places), strict=True), 1):
        moved = (9 * side[0], 9 * side[1])
        texts: Any = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 8}
        axes.annotate(str(number), place, moved, **texts)
    axes.set_xlabel(chart.along)
    axes.set_ylabel(chart.up)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper left", frameon=False, ncols=1, fontsize=8, handletextpad=0.2)


#: Where the number of a place may stand, first choice first: above, below, or aside of these, clear of its own line.
_SIDES = ((0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))


def _sides(places: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
    """The side of each place on which its number is furthest from other places and their numbers.

    Distances are of a field that is 12 places' widths wide and 8 high, what a chart of a phone's width has.
    """
    wide = max(along for along, _ in places) or 1.0
    low, high = min(up for _, up in places), max(up for _, up in places)
    dots = [(12 * along / wide, 8 * (up - low) / ((high - low) or 1.0)) for along, up in places]
    chosen: list[tuple[int, int]] = []
    numbers: list[tuple[float, float]] = []
    for place, (x, y) in enumerate(dots):
        taken = dots[:place] + dots[place + 1 :] + numbers
        free = [min((math.dist((x + dx / 2, y + dy / 2), other) for other in taken), default=0) for dx, dy in _SIDES]
        # More than one place's width apart is apart.
        side = _SIDES[max(range(len(_SIDES)), key=lambda choice: (min(free[choice], 1.0), -choice))]
        chosen.append(side)
        numbers.append((x + side[0] / 2, y + side[1] / 2))
    return chosen


_DRAW: dict[type, Any] = {Lines: _lines, Bars: _bars, Grid: _grid, Points: _points}


def shortened(labels: Sequence[str], most: int = 28) -> tuple[str, ...]:
    """Labels that fit beside a chart: their ends are what tells them apart."""
    return tuple(label if len(label) <= most else "…" + label[1 - most :] for label in labels)
