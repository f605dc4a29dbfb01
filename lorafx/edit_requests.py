"""What an edit is asked to do: the rows of an edits file, and the options of editing."""

from __future__ import annotations

from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from .base import option
from .errors import did_you_mean
from .table import Table, read_table, short


@dataclass(frozen=True)
class EditRequest:
    """One edit of a causal language model: after ``prompt``, say ``target``.

    Attributes:
        prompt: the text before, without the space that follows it
        target: the text after
        paraphrases: other prompts that ``target`` should follow; they are measured, never trained on
        locality: prompts near by whose continuation should stay
    """

    prompt: str
    target: str
    paraphrases: tuple[str, ...] = ()
    locality: tuple[str, ...] = ()


@dataclass(frozen=True)
class EditOptions:
    """How :func:`lorafx.editing.edit` edits."""

    targets: tuple[str, ...] = option(("role:attn.query", "role:attn.value"), "weights to adapt, as a pass names them")
    blocks: str | int | None = option(None, "only these blocks, e.g. 10..20")
    rank: int = option(8, "rank of the update")
    alpha: float = option(32.0, "scale: the update is multiplied by alpha / rank")
    density: float = option(0.05, "share kept of each row of A and each column of B")
    start: int = option(3, "steps before sparsity begins")
    end: int = option(20, "the step at which it is reached")
    steps: int = option(25, "steps at most; fewer when the target is learned and the update is sparse")
    learning_rate: float = option(5e-4, "of Adam")
    margin: float = option(1.0, "by how much the logits of the target must lead before training may stop")
    clamp: float | None = option(None, "hold the entries of A and B within plus and minus this")
    prefix_weight: float = option(0.0, "weight of the divergence from the base within the prompt")
    locality_weight: float = option(0.0, "weight of the divergence from the base on an edit's locality prompts")
    seed: int = option(0, "seed of the initial values")


def read_edits(path: str | PathLike[str]) -> tuple[EditRequest, ...]:
    """Read edits from a table, JSON Lines as a rule: ``prompt``, ``target``, maybe ``paraphrases`` and ``locality``.

    ArtifactError, with the line, for a row that is none.
    """
    table = read_table(path)
    known = [entry.name for entry in fields(EditRequest)]
    for name, values in table.columns.items():
        if name not in known:
            row = next(row for row, value in enumerate(values) if value is not None)
            raise table.error(row, f"unknown key {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    single = {name: table.texts(name) for name in ("prompt", "target")}
    several = {name: table.columns.get(name, [None] * len(table)) for name in ("paraphrases", "locality")}
    for row in range(len(table)):
        for name, values in single.items():
            if not values[row].strip():
                raise table.error(row, f"{name!r} is empty")
    return tuple(
        EditRequest(
            **{name: values[row] for name, values in single.items()},
            **{name: _texts(table, row, name, values[row]) for name, values in several.items()},
        )
        for row in range(len(table))
    )


def _texts(table: Table, row: int, name: str, value: Any) -> tuple[str, ...]:
    listed = [] if value is None else value
    if not isinstance(listed, list) or not all(isinstance(text, str) and text.strip() for text in listed):
        raise table.error(row, f"{name!r} is {short(value)}, not a list of texts")
    return tuple(listed)
