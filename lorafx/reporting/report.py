"""What happened to a program, as one value: JSON for programs, text and HTML for people."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..graph.facts import Gathered, ZeroButKept
from ..models.checkpoint import by_header
from .render import Section, braced, cell, draw_html, draw_text, section_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..graph.program import Applied, Program
    from ..graph.selection import Miss

#: Titles of the sections that :meth:`Report.plus` is commonly given; any other section's name is its title.
_TITLES = {"parity": "Parity", "training": "Training", "benchmark": "Benchmark", "sizes": "Sizes in bytes"}


@dataclass(frozen=True)
class PassReport:
    """One pass of the history.

    Attributes:
        name: its name in recipes
        options: those that differ from their defaults
        promise: what it promises about the outputs
        taken: the sites it rewrote
        missed: the modules it passed over, by reason
        tensors: how many tensors it inserted
        parameters: how many numbers those hold now (0 once they are folded away)
        seconds: how long it took
        proof: how it was held to its promise, or why it was not
    """

    name: str
    options: Mapping[str, Any]
    promise: str
    taken: tuple[str, ...]
    missed: Mapping[str, tuple[str, ...]]
    tensors: int
    parameters: int
    seconds: float
    proof: str = ""


@dataclass(frozen=True)
class RoleReport:
    """The tensors of one role, each counted once however many names it has.

    Attributes:
        tensors: parameters and buffers
        parameters: how many numbers the parameters hold
        trainable: how many of them train
        size: bytes, of buffers too
    """

    tensors: int
    parameters: int
    trainable: int
    size: int


@dataclass(frozen=True)
class Report:
    """What happened to a program.

    Attributes:
        model: class, checkpoint, task, stage, dtype, and whether it is folded
        passes: the history, oldest first
        roles: tensors by role
        notes: plain sentences: what the passes buy, what to know
        sections: what methods learned, and what was measured (``parity``, ``training``, ``benchmark``, …), JSON values
    """

    model: Mapping[str, Any]
    passes: tuple[PassReport, ...] = ()
    roles: Mapping[str, RoleReport] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sections: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many numbers the parameters hold."""
        return sum(role.parameters for role in self.roles.values())

    @property
    def trainable(self) -> int:
        """How many of them train."""
        return sum(role.trainable for role in self.roles.values())

    def plus(self, **sections: Any) -> Report:
        """A new report with further sections: objects, lists of rows, dataclasses, plain values; None adds nothing."""
        added = {name: json_value(value) for name, value in sections.items() if value is not None}
        return dataclasses.replace(self, sections={**self.sections, **added})

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values. Keys keep their meaning from version to version; new ones may join."""
        own = {entry.name: json_value(getattr(self, entry.name)) for entry in dataclasses.fields(self)}
        return {**own, "parameters": self.parameters, "trainable": self.trainable}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Report:
        """The report that :meth:`to_json` gave ``value``; KeyError or TypeError when it gave another."""
        passes = tuple(
            PassReport(
                **{
                    **step,
                    "taken": tuple(step["taken"]),
                    "missed": {reason: tuple(modules) for reason, modules in step["missed"].items()},
                }
            )
            for step in value["passes"]
        )
        roles = {role: RoleReport(**counts) for role, counts in value["roles"].items()}
        return cls(value["model"], passes, roles, tuple(value["notes"]), value["sections"])

    def text(self, width: int = 100) -> str:
        """The report as plain text no wider than ``width`` columns."""
        return draw_text((self._headline(), *self.notes), self.shown(), width)

    def html(self) -> str:
        """The report as one HTML page that needs no other file."""
        return draw_html(f"lorafx: {self.model['class']}", (self._headline(), *self.notes), self.shown())

    def shown(self) -> list[Section]:
        """The report as it is shown to people."""
        own = [*_pass_sections(self.passes), _role_section(self)]
        return own + [section_of(_TITLES.get(name, name), value) for name, value in self.sections.items()]

    def _headline(self) -> str:
        place = f" from {self.model['checkpoint']}" if self.model["checkpoint"] else ""
        share = self.trainable / self.parameters if self.parameters else 0.0
        return (
            f"{self.model['class']}{place}: {self.parameters:,} parameters, {self.trainable:,} trainable ({share:.2%}),"
            f" {self.model['stage']} graph"
        )


# ---- making one


def report_of(program: Program) -> Report:
    """The report of a program: its history, what it holds now, and what that buys."""
    source = program.source
    model = {
        "class": program.name,
        "checkpoint": source.path,
        "task": source.task,
        "stage": program.stage,
        "dtype": str(getattr(program.config, "dtype", None) or "").removeprefix("torch."),
        "folded": program.origin is not None,
    }
    passes = tuple(_pass_report(program, applied) for applied in program.history)
    roles = _roles(program)
    return Report(model, passes, roles, tuple(_notes(program, roles)), _learned(program))


def shrunk_blocks(program: Program) -> list[dict[str, Any]]:
    """Weights and FLOPs by block beside those of the captured program; nothing when none got smaller."""
    from .sizes import block_rows

    if program.origin is None or program.captured is None:
        return []
    rows = block_rows(program.captured, program)
    return rows if any(row["parameters after"] < row["parameters before"] for row in rows) else []


def _learned(program: Program) -> dict[str, Any]:
    """What passes have to say, by titles that name them; methods of what they learned, before it was folded."""
    from ..base import Method
    from ..graph.state import method_state

    source = program.origin or program
    sections = {
        f"{applied.step.pass_name()}: {title}": json_value(value)
        for applied in source.history
        if isinstance(applied.step, Method) and source.device.type != "meta"
        for title, value in applied.step.describe(method_state(applied, source.tensor)).items()
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


def _pass_report(program: Program, applied: Applied) -> PassReport:
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
            "No weight of the base was read: its files are known by their size and header until the run is trained."
        )
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


def json_value(value: Any) -> Any:
    """``value`` in terms of JSON: dataclasses and mappings as objects, sequences as lists, all else as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON has no infinity, and a comparison may find one
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, enum.Enum):
        return json_value(value.value)
    if hasattr(value, "to_json"):
        return json_value(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: json_value(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): json_value(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [json_value(inner) for inner in value]
    return str(value)


# ---- for people


def _pass_sections(passes: Sequence[PassReport]) -> list[Section]:
    if not passes:
        return []
    rows = tuple(
        (
            step.name,
            ", ".join(f"{key} = {cell(value)}" for key, value in step.options.items()) or "defaults",
            str(len(step.taken)),
            str(sum(map(len, step.missed.values()))),
            f"{step.parameters:,}",
            f"{step.seconds:.2f}",
        )
        for step in passes
    )
    summary = Section("Passes", ("pass", "options", "sites", "missed", "parameters", "seconds"), rows)
    return [summary, *(section for step in passes for section in _site_sections(step))]


def _site_sections(step: PassReport) -> Iterator[Section]:
    for outcome, modules in (("taken", _modules(step.taken)), *step.missed.items()):
        if modules:
            title = f"{step.name}, {len(modules)} {'taken' if outcome == 'taken' else f'not taken: {outcome}'}"
            yield Section(title, ("weights",), tuple((where,) for where in braced(modules)))


def _modules(taken: Iterable[str]) -> tuple[str, ...]:
    """The weights among what a pass took, ``path (kind …)`` or ``path: …``; operators are only counted."""
    return tuple(site.partition(" (")[0].partition(": ")[0] for site in taken if " (" in site or ": " in site)


def _role_section(report: Report) -> Section:
    rows = (
        (name, str(role.tensors), f"{role.parameters:,}", f"{role.trainable:,}", f"{role.size / 1e6:,.2f}")
        for name, role in report.roles.items()
    )
    return Section("Tensors by role", ("role", "tensors", "parameters", "trainable", "MB"), tuple(rows))
