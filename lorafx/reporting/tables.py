"""Everything a report holds, as sections of rows and columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .answer import EARLIER
from .facts import Facts, PassReport
from .render import Section, braced, cell, sections_of

#: Titles of the sections that reports are commonly given; any other section's name is its title.
_TITLES = {
    **{name: name.capitalize() for name in ("parity", "training", "benchmark", "decoder", "quantized", "output")},
    "sizes": "Sizes in bytes",
    "scored": "Scored and timed",
}
#: What a training says to programs alone.
_OF_PROGRAMS = ("is_main", "evaluated")


def sections_of_facts(facts: Facts) -> list[Section]:
    """A report as it is shown to people: passes, their sites and misses, tensors by role, what was measured."""
    sites = [section for step in facts.passes for section in site_sections(step)]
    return [*history(facts.passes), *sites, role_section(facts), *measured(facts)]


def measured(facts: Facts) -> Iterator[Section]:
    """What methods learned and what was measured."""
    for name, value in facts.sections.items():
        told = value
        if name == "training":
            told = _for_people(value)
        elif name == EARLIER and isinstance(value, list):
            told = [_for_people(training) for training in value]
        yield from sections_of(_TITLES.get(name, name), told)


def _for_people(training: Any) -> Any:
    if not isinstance(training, Mapping):
        return training
    return {key: part for key, part in training.items() if key not in _OF_PROGRAMS}


def history(passes: Sequence[PassReport]) -> list[Section]:
    """The passes in one table; nothing without any."""
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
    return [Section("Passes", ("pass", "options", "sites", "missed", "parameters", "seconds"), rows)]


def site_sections(step: PassReport) -> Iterator[Section]:
    """What a pass took, and what it passed over by reason; paths that differ in their block together."""
    for outcome, modules in (("taken", _modules(step.taken)), *step.missed.items()):
        if modules:
            title = f"{step.name}, {len(modules)} {'taken' if outcome == 'taken' else f'not taken: {outcome}'}"
            yield Section(title, ("weights",), tuple((where,) for where in braced(modules)))


def _modules(taken: Iterable[str]) -> tuple[str, ...]:
    """The weights among what a pass took, ``path (kind …)`` or ``path: …``; operators are only counted."""
    return tuple(site.partition(" (")[0].partition(": ")[0] for site in taken if " (" in site or ": " in site)


def role_section(facts: Facts) -> Section:
    """What the tensors are for, and how many numbers they hold."""
    rows = (
        (name, str(role.tensors), f"{role.parameters:,}", f"{role.trainable:,}", f"{role.size / 1e6:,.2f}")
        for name, role in facts.roles.items()
    )
    return Section("Tensors by role", ("role", "tensors", "parameters", "trainable", "MB"), tuple(rows))
