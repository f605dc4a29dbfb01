"""A benchmark's result as a page: times side by side, with the scores recorded in the folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import ArtifactError
from ..files.folder import find_manifest
from ..models.hub import local_folder
from ..reporting.answer import called, measure_of
from ..reporting.contents import Contents
from ..reporting.facts import Facts
from ..reporting.page import draw_page
from ..reporting.report import REPORT, Report, read_report
from ..reporting.scored import SCORED, Scored, proof_of, reached
from .bench import BenchResult


def bench_page(result: BenchResult, folders: Sequence[Path]) -> str:
    """A page that needs no other file.

    Args:
        folders: what was timed, in the order of the result's candidates
    """
    labels = [candidate.label for candidate in result.candidates]
    found = [_scored(label, local_folder(folder)) for label, folder in zip(labels, folders, strict=True)]
    known = [one for one in found if one is not None]
    # Scores on other rows, or of another measure, do not compare; the last folder is the one in question.
    scores = [score for score, rows in known if (score.measure, rows) == (known[-1][0].measure, known[-1][1])]
    notes = tuple(f"{candidate.label}: {candidate.note}" for candidate in result.candidates if candidate.note)
    facts = Facts({"class": " · ".join(labels)}, notes=notes).plus(benchmark=result, **{SCORED: scores or None})
    return draw_page(facts, Contents())


def _scored(label: str, folder: Path) -> tuple[Scored, str] | None:
    """The score in a folder's report, and the rows it was measured on; None where there is none, or where the model in
    the folder was not found to be the one that was scored."""
    report = _report(folder)
    key = None if report is None else measure_of(report)
    if report is None or key is None:
        return None
    trained = report.sections["training"].get("evaluated")
    last = max(reached(report))
    manifest = find_manifest(folder)
    why = "it is what was scored" if manifest is not None and manifest.kind == "run" else proof_of(report)
    if trained is None or why is None:
        return None
    return Scored(label, label, called(key), reached(report)[last], why), str(trained)


def _report(folder: Path) -> Report | None:
    if not (folder / REPORT).is_file():
        return None
    try:
        return read_report(folder)
    except ArtifactError:  # another program's
        return None
