"""Requests for edits: the rows of an edits file, and the options of editing."""

from __future__ import annotations

from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from ..base import Options, option
from ..errors import did_you_mean
from ..files.table import Table, read_table, short


@dataclass(frozen=True)
class EditRequest:
    """One edit of a causal language model: after ``prompt``, say ``target``.

    Attributes:
        prompt: the text before, without the space that follows it
        target: the text after
        paraphrases: other prompts that ``target`` should follow; measured, never trained on
        locality: related prompts whose continuation should stay
    """

    prompt: str
    target: str
    paraphrases: tuple[str, ...] = ()
    locality: tuple[str, ...] = ()


@dataclass(frozen=True)
class EditOptions(Options):
    """How :func:`lorafx.editing.edit` edits.

    Source: RoseLoRA, arXiv 2406.10777; ``start`` and ``end`` are those of its code, whose other settings are
    :data:`PAPER`. The defaults here were found with SmolLM2-135M, where the paper's change 1.1 % of the adapted weights
    (at most ``rank · density²`` can change, so at most 0.81 % here) and fail in one edit of five: the feed-forward
    layers of the last blocks learn an edit with the fewest changes elsewhere.
    """

    @classmethod
    def title(cls) -> str:
        return "editing options"

    targets: tuple[str, ...] = option(("role:ffn.*",), "weights to adapt, in the language of targets")
    blocks: str | int | None = option("-10..-1", "only in these blocks; negative ones count from the last")
    rank: int = option(4, "rank of the update", least=1)
    alpha: float = option(32.0, "scale: the update is multiplied by alpha / rank", above=0)
    density: float = option(0.045, "share kept of each row of A and each column of B", above=0, most=1)
    start: int = option(3, "steps before sparsity begins", least=0)
    end: int = option(20, "the step at which the density is reached", least=1)
    steps: int = option(60, "most steps; fewer when the target is learned and the update is sparse", least=1)
    learning_rate: float = option(1e-3, "learning rate of Adam", least=0)
    margin: float | None = option(0.5, "lead of the target's logits that ends training (none: take all steps)")
    clamp: float | None = option(None, "keep the entries of A and B between minus and plus this", above=0)
    prefix_weight: float = option(3.0, "weight of the KL divergence from before the edit within the prompt", least=0)
    locality_weight: float = option(0.0, "the same weight for an edit's locality prompts", least=0)
    seed: int = option(0, "seed of the initial values", least=0, below=2**32)


#: The settings of the paper's code: dense for 3 steps, sparse by step 20 of 25, the query and value projections.
PAPER = EditOptions(
    targets=("role:attn.query", "role:attn.value"),
    blocks=None,
    rank=8,
    density=0.05,
    steps=25,
    learning_rate=5e-4,
    margin=None,
    prefix_weight=0.0,
)


def read_edits(path: str | PathLike[str]) -> tuple[EditRequest, ...]:
    """Read edits from a table, usually JSON Lines: ``prompt``, ``target``, and optionally ``paraphrases`` and
    ``locality``. ArtifactError, with the line, for a row that is not an edit.
    """
    table = read_table(path)
    known = [entry.name for entry in fields(EditRequest)]
    for name, values in table.columns.items():
        if name not in known:
            row = next(row for row, value in enumerate(values) if value is not None)
            raise table.error(row, f"unknown key {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    prompts, targets = table.texts("prompt"), table.texts("target")
    none = [None] * len(table)
    paraphrases, locality = (table.columns.get(name, none) for name in ("paraphrases", "locality"))
    for row in range(len(table)):
        for name, values in (("prompt", prompts), ("target", targets)):
            if not values[row].strip():
                raise table.error(row, f"{name!r} is empty")
    return tuple(
        EditRequest(
            prompts[row],
            targets[row],
            _texts(table, row, "paraphrases", paraphrases[row]),
            _texts(table, row, "locality", locality[row]),
        )
        for row in range(len(table))
    )


def _texts(table: Table, row: int, name: str, value: Any) -> tuple[str, ...]:
    listed = [] if value is None else value
    if not isinstance(listed, list) or not all(isinstance(text, str) and text.strip() for text in listed):
        raise table.error(row, f"{name!r} is {short(value)}, not a list of texts")
    return tuple(listed)
