"""What happened to a program, as the value people hold: :mod:`.facts`, and the doors to text and pages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError
from ..files.places import checkpoint_name
from ..files.whole import write_whole
from ..graph.facts import Gathered, ZeroButKept
from ..models.identity import by_header
from ..notebook import shown
from .answer import EARLIER, sentence
from .contents import Contents
from .facts import Facts, PassReport, RoleReport, json_value
from .page import draw_page
from .render import draw_text
from .tables import history, role_section, sections_of_facts

if TYPE_CHECKING:
    from torch import Tensor

    from ..graph.program import Applied, Program
    from ..graph.selection import Miss


#: The files that a report is, in every folder that lorafx writes a model into.
REPORT, PAGE = "report.json", "report.html"


@dataclass(frozen=True)
class Report(Facts):
    """What happened to a program: its data is that of :class:`lorafx.reporting.facts.Facts`."""

    def text(
        self,
        width: int = 100,
        *,
        details: bool = True,
        overview: bool = False,
        next_step: str = "",
        folder: str | PathLike[str] | None = None,
    ) -> str:
        """The report as plain text no wider than ``width`` columns: what came of it in one sentence, then the rest.

        Args:
            details: with every table
            overview: with two of them at least, passes and tensors by role
            next_step: what to do next, one line
            folder: what was written, which is named with its size
        """
        lead = f"{folder}: " if folder is not None else ""
        lines = [lead + sentence(self, Contents.of(folder)), *([f"Next: {next_step}"] if next_step else [])]
        if details:
            return draw_text([*lines, *self.notes], sections_of_facts(self), width)
        return draw_text(lines, [*history(self.passes), role_section(self)], width) if overview else "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Report {sentence(self, Contents.of(None))}>"

    def _repr_html_(self) -> str:
        return shown([sentence(self, Contents.of(None)), *self.notes], sections_of_facts(self))

    def html(self, folder: str | PathLike[str] | None = None, model: str = "") -> str:
        """The report as one HTML page that needs no other file; with links to what lies in ``folder``, of which the
        model itself is what lies below ``model``."""
        return draw_page(self, Contents.of(folder, model))


def write_report(report: Report, folder: Path, model: str = "") -> None:
    """Write a report into the folder it is about, as it then is: for programs, and as a page for people."""
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False)
    for name, content in ((PAGE, report.html(folder, model)), (REPORT, text + "\n")):
        write_whole(folder / name, content)


def read_report(folder: Path) -> Report:
    """The report in a folder. ArtifactError when there is none, or it is not one of a program."""
    file = folder / REPORT
    if not file.is_file():
        raise ArtifactError(f"{folder}: no {REPORT}; give a folder that lorafx wrote")
    try:
        return Report.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{file}: no report of a program; give a run, or what was folded or exported") from None


# ---- making one


def report_of(program: Program) -> Report:
    """The report of a program: its history, what it holds now, and what that buys."""
    from ..graph.program import parameter_count

    source = program.source
    model = {
        "class": program.name,
        "checkpoint": checkpoint_name(source.path) if source.path is not None else None,
        "task": source.task,
        "stage": program.stage,
        "dtype": str(getattr(program.config, "dtype", None) or "").removeprefix("torch."),
        "folded": program.origin is not None,
        "base parameters": parameter_count(source.model.parameters()),
    }
    last = len(program.origin.history if program.origin is not None else program.history)
    passes = tuple(_pass_report(program, applied, place >= last) for place, applied in enumerate(program.history))
    roles = _roles(program)
    learned = {"training": json_value(program.trained)} if program.trained is not None else {}
    learned |= {EARLIER: [json_value(each) for each in program.earlier]} if program.earlier else {}
    return Report(model, passes, roles, tuple(_notes(program, roles)), {**learned, **_learned(program)})


def shrunk_blocks(program: Program) -> list[dict[str, Any]]:
    """Weights and FLOPs by block beside those of the captured program; nothing when none got smaller."""
    from .sizes import block_rows

    if program.origin is None or program.captured is None:
        return []
    rows = block_rows(program.captured, program)
    return rows if any(row["parameters after"] < row["parameters before"] for row in rows) else []


def _learned(program: Program) -> dict[str, Any]:
    """What passes have to say, by titles that name them; methods of what they learned, before it was folded."""
    from ..base import methods_of
    from ..graph.state import method_state

    source = program.origin or program
    sections = {
        f"{method.pass_name()}: {title}": json_value(value)
        for method, applied in (methods_of(source) if source.device.type != "meta" else ())
        for title, value in method.describe(method_state(applied, source.tensor)).items()
    }
    gathered = Gathered.noted(program)
    for applied in program.history:
        for title, value in applied.facts.items():
            rows = value
            if title == ZeroButKept.title and isinstance(value, list):
                rows = [row for row in value if not _settled(ZeroButKept.read(row), gathered)]
            if rows:
                sections[f"{applied.step.pass_name()}: {title}"] = json_value(rows)
    rows = shrunk_blocks(program)
    return {**sections, "Blocks": rows} if rows else sections


def _settled(kept: ZeroButKept | None, gathered: Iterable[Gathered]) -> bool:
    """Whether all zeros of a dimension went when a later pass gathered the columns in use."""
    if kept is None:
        return False
    gone = {(fact.weight, fact.dimension): fact.before - fact.after for fact in gathered}
    return kept.zero <= gone.get((kept.weight, kept.dimension), 0)


def _pass_report(program: Program, applied: Applied, folding: bool) -> PassReport:
    from ..base import Pass
    from ..graph.tree import has_tensor
    from ..recipes.recipe import pass_dict

    step = applied.step
    assert isinstance(step, Pass)
    names = [name for entry in applied.inserted for name in entry.tensors.values()]
    missed: dict[str, list[str]] = {}
    for miss in applied.missed:
        missed.setdefault(miss.reason, []).append(_where(miss))
    return PassReport(
        name=step.pass_name(),
        options={key: json_value(value) for key, value in pass_dict(step).items() if key != "name"},
        promise=step.promise.value,
        taken=applied.taken,
        missed={reason: tuple(modules) for reason, modules in missed.items()},
        tensors=len(names),
        parameters=sum(program.tensor(name).numel() for name in names if has_tensor(program.root, name)),
        seconds=applied.seconds,
        proof=applied.proof,
        difference=applied.difference,
        folding=folding,
    )


def _where(miss: Miss[Any]) -> str:
    return getattr(miss.site, "module", None) or str(miss.site)


def _roles(program: Program) -> dict[str, RoleReport]:
    from torch import nn

    found: dict[str, list[Tensor]] = {}
    seen: set[int] = set()
    for name, role in program.roles.items():
        value = program.tensor(name)
        if id(value) not in seen:  # a tied tensor counts under its first name
            seen.add(id(value))
            found.setdefault(role, []).append(value)
    return {
        role: RoleReport(
            tensors=len(values),
            parameters=sum(value.numel() for value in values if isinstance(value, nn.Parameter)),
            trainable=sum(value.numel() for value in values if value.requires_grad),
            size=sum(value.numel() * value.element_size() for value in values),
        )
        for role, values in found.items()
    }


def _notes(program: Program, roles: Mapping[str, RoleReport]) -> list[str]:
    """What the history buys, read off the tensors: no method is known by name."""
    adapters, gates = (roles[role].parameters if role in roles else 0 for role in ("adapter", "gate"))
    notes = []
    if program.origin is not None:
        notes.append(_folding_note(program))
    elif adapters:
        notes.append(
            f"The {adapters:,} adapter parameters keep the stored file and the optimiser state small; they fold into"
            " the base weights, and the deployed model is then as large and as fast as the base."
        )
    if gates:
        notes.append(
            f"{gates:,} gates: the deployed model gets smaller only by what training closes and folding then removes."
        )
    if program.config_changes:
        changes = ", ".join(f"{key} = {value}" for key, value in program.config_changes.items())
        notes.append(f"The config of the result has to say {changes}.")
    if by_header(program.source.hashes):
        notes.append(
            "No weight of the base was read: its files are known by size, header and time until the run is trained."
        )
    if program.source.modified:
        notes.append(
            f"{program.source.modified[0]} of the base was modified (or copied) after the rewrite, which read no"
            " weights: whether it is the base that was rewritten cannot be told."
        )
    if waiting := program.waiting():
        notes.append(f"{len(waiting)} tensors are made of weights, when the run is opened with them: {waiting[0]}, …")
    unproven: dict[str, list[str]] = {}
    for applied in program.history:
        if applied.proof.startswith("not checked"):
            unproven.setdefault(applied.proof, []).append(applied.step.pass_name())
    return notes + [f"Promises of {', '.join(passes)} {reason}." for reason, passes in unproven.items()]


def _folding_note(program: Program) -> str:
    before = sum(value.numel() for value in program.source.model.parameters())
    after = sum(value.numel() for value in program.root.parameters())
    if after == before:
        return f"Folded: {after:,} parameters, as many as the base; it is as large and as fast as the base."
    return f"Folded: {after:,} parameters where the base has {before:,} ({(after - before) / before:+.1%})."
