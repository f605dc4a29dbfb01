"""Scores beside speeds: which models of a report were scored and timed, both, and how that is known.

A score is measured where a model trains, a time where it is deployed, and the two are not of the same form of it. So a
place in a picture of accuracy against speed is something that whoever timed the models writes down, with its reason; it
is never guessed from names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .answer import called, earlier, measure_of, same_function, timings
from .facts import Facts

#: The section of them in a report.
SCORED = "scored"


@dataclass(frozen=True)
class Form:
    """A form of a model that was timed.

    Attributes:
        candidate: its label in the benchmark
        model: what it is, for people
        trainings: how many of the report's trainings it has behind it; 0 is before the first
        why: how it is known that the model which was scored then computes the same, or is as fast
    """

    candidate: str
    model: str
    trainings: int
    why: str


@dataclass(frozen=True)
class Scored:
    """A model whose score and whose time are known.

    Attributes:
        candidate: the candidate of the benchmark whose time is its own
        model: what it is, for people
        measure: of the score, by the name people have for it (``accuracy``)
        value: the score
        why: how it is known that both are of it
    """

    candidate: str
    model: str
    measure: str
    value: float
    why: str

    @classmethod
    def read(cls, row: Any) -> Scored | None:
        """What a report holds of one; None where it holds something else."""
        try:
            return cls(row["candidate"], row["model"], row["measure"], float(row["value"]), row["why"])
        except (KeyError, TypeError, ValueError):
            return None


def scored(facts: Facts, forms: Iterable[Form]) -> list[Scored]:
    """Those of ``forms`` that were timed, and whose score is known: see :func:`reached`."""
    key, known = measure_of(facts), reached(facts)
    timed = {row["candidate"] for row in timings(facts)}
    return [
        Scored(form.candidate, form.model, called(key), known[form.trainings], form.why)
        for form in forms
        if key is not None and form.trainings in known and form.candidate in timed
    ]


def reached(facts: Facts) -> dict[int, float]:
    """The scores of a report, by how many trainings the model had: 0 is before the first.

    All are of one measure and on the same rows, those of the last training's evaluation. Where a training does not say
    which rows it was scored on (reports of earlier versions), its scores compare with none but one another. What a
    training began with counts for the first alone: later ones may begin with another function than the last one ended.
    """
    key = measure_of(facts)
    if key is None:
        return {}
    trainings = [*earlier(facts), facts.sections["training"]]
    rows = trainings[-1].get("evaluated")
    found: dict[int, float] = {}
    for number, training in enumerate(trainings, 1):
        if training is trainings[-1] or (rows is not None and training.get("evaluated") == rows):
            begun = [entry for entry in training.get("history") or () if entry.get("step") == 0 and key in entry]
            for count, figures in ((0, begun[0] if begun and number == 1 else {}), (number, training.get("metrics"))):
                value = figures.get(key) if isinstance(figures, Mapping) else None
                if isinstance(value, (int, float)):
                    found[count] = float(value)
    return found


def forms_of(facts: Facts, base: str, made: str) -> Iterator[Form]:
    """The forms of a model that was trained once and timed beside its base, as far as the report proves them.

    Args:
        base: the candidate that is the base
        made: the candidate that was exported
    """
    put_on = [step for step in facts.passes if not step.folding]
    if all(step.promise in ("exact", "close") and not step.proof.startswith("not checked") for step in put_on):
        yield Form(base, "the base before training", 0, "what was put on the base had not changed it yet")
    if is_as_large(facts):
        yield Form(base, "trained and folded, in PyTorch", 1, "folded it has the base's shapes, and so its speed")
    same = proof_of(facts)
    if same is not None:
        yield Form(made, "trained and deployed", 1, same)


def proof_of(facts: Facts) -> str | None:
    """How closely what was made was found to be what was trained; None where it was not found to be."""
    parity, figure = facts.sections.get("parity"), same_function(facts)
    found = figure is not None and isinstance(parity, Mapping) and parity.get("ok") is True
    return figure.clause if found and figure is not None else None


def is_as_large(facts: Facts) -> bool:
    """Whether what was folded has the base's shapes: as many parameters, and none that a method brought."""
    same = facts.parameters == facts.model.get("base parameters") and bool(facts.model.get("folded"))
    return same and not {"adapter", "gate"} & facts.roles.keys()
