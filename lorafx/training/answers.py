"""Question answering: where in a context the answer to a question stands.

A context that is too long for the model is read in overlapping windows, and a window without the answer points at
its first token. Evaluation maps the best span of all windows of a row back to characters of the context.
"""

from __future__ import annotations

import json
import logging
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from ..files.table import Table, short
from .metrics import Metric, harmonic
from .reading import Learned, Reading

_log = logging.getLogger(__name__)

#: Rows tokenised at a time; tokens of an answer, at most; starts and ends that are tried with each other.
_CHUNK, _LONGEST, _BEST = 1000, 30, 20


@dataclass(frozen=True)
class Answer:
    """One answer: its text, and where in the context it begins, in characters."""

    text: str
    start: int


@dataclass(frozen=True)
class Window:
    """Part of a context: its row, and where in the context each token stands; None for tokens outside it."""

    row: int
    places: Sequence[tuple[int, int] | None]

    def labels(self, answer: Answer | None) -> tuple[int, int]:
        """The first and the last token of an answer, or the first of all where it is not (whole) in the window."""
        if answer is None:
            return 0, 0
        end = answer.start + len(answer.text)
        inside = [at for at, place in enumerate(self.places) if place and place[0] < end and answer.start < place[1]]
        held = [place for place in self.places if place is not None]
        if not inside or answer.start < held[0][0] or end > held[-1][1]:
            return 0, 0
        return inside[0], inside[-1]


def learn_answers(reading: Reading) -> Learned:
    """The windows of questions and contexts, and the tokens at which the first answer of each row begins and ends.

    Raises:
        ArtifactError: an answer that is not in its context, or not where it is said to be; a question that leaves no
            room for its context
        UsageError: a tokenizer that does not say where its tokens stand
    """
    reading.refuse("chat", "packing")
    table, pair = reading.table, reading.pair or "context"
    contexts = table.texts(pair)
    answers = answers_of(table, reading.label, contexts)
    inputs, windows = _windows(reading, table.texts(reading.text), contexts)
    spans = [window.labels(answers[window.row][0] if answers[window.row] else None) for window in windows]
    labels = {"start_positions": [start for start, _ in spans], "end_positions": [end for _, end in spans]}
    return Learned(inputs, labels, metric=span_metric(windows, contexts, answers))


# ---- what a table holds


def answers_of(table: Table, column: str, contexts: Sequence[str]) -> list[list[Answer]]:
    """The answers of every row, none where there is none: SQuAD's ``{"text": […], "answer_start": […]}``, or a text,
    which begins where a column ``answer_start`` says."""
    starts = table.columns.get("answer_start")
    found, twice = [], 0
    for row, value in enumerate(table.column(column)):
        given = _given(table, row, column, value, None if starts is None else starts[row])
        found.append([_placed(table, row, *answer, contexts[row]) for answer in given])
        twice += any(start is None and contexts[row].count(text) > 1 for text, start in given)
    if twice:
        what = f"{twice} of {len(table)} answers stand in their contexts more than once, and the first place is learned"
        _log.warning("%s: %s; give answer_start", table.name, what)
    return found


def _given(table: Table, row: int, column: str, value: Any, start: Any) -> list[tuple[str, int | None]]:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with suppress(json.JSONDecodeError):  # a text that only begins like JSON
            value = json.loads(value)
    if isinstance(value, str):
        return [(value, _start(table, row, start))] if value else []
    parts: list[Any] = [value.get(name) for name in ("text", "answer_start")] if isinstance(value, Mapping) else []
    texts, starts = map(_listed, parts) if parts else (None, None)
    if not isinstance(texts, list) or (starts is not None and len(starts) != len(texts)):
        raise table.error(row, f"{column!r} is {short(value)}, neither a text nor text and answer_start as SQuAD's are")
    return [(text, _start(table, row, at)) for text, at in zip(texts, starts or [None] * len(texts), strict=True)]


def _listed(part: Any) -> Any:
    """A list; one value or an array counts as a list."""
    return [part] if isinstance(part, (str, int)) else part.tolist() if hasattr(part, "tolist") else part


def _start(table: Table, row: int, value: Any) -> int | None:
    if value is None or value == "":
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        raise table.error(row, f"'answer_start' is {short(value)}, not a number of characters") from None


def _placed(table: Table, row: int, text: Any, start: int | None, context: str) -> Answer:
    if not isinstance(text, str) or not text.strip():
        raise table.error(row, f"the answer {short(text)} is not a text; leave it empty where there is no answer")
    found = context.find(text) if start is None else start
    if found < 0 or context[found : found + len(text)] != text:
        where = "is not in its context" if start is None else f"does not stand at character {start} of its context"
        raise table.error(row, f"the answer {short(text)} {where}; answers are parts of it, letter by letter")
    return Answer(text, found)


# ---- windows


def _windows(reading: Reading, questions: list[str], contexts: list[str]) -> tuple[dict[str, Any], list[Window]]:
    tokenizer, limit, overlap = reading.texts.tokenizer, reading.texts.cuts.limit, reading.options.stride
    if not tokenizer.is_fast:
        raise UsageError("this tokenizer does not say where its tokens stand in a text; open it as a fast one")
    asked = tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]
    brackets = tokenizer.num_special_tokens_to_add(pair=True)
    for row, ids in enumerate(asked):
        if len(ids) + brackets + overlap >= limit:
            what = (
                f"{reading.text!r} has {len(ids)} tokens, which leave of {limit} no more than windows share ({overlap})"
            )
            raise reading.table.error(row, f"{what}; raise max_length, or lower stride")
    inputs: dict[str, Any] = {}
    windows: list[Window] = []
    options = {"truncation": "only_second", "max_length": limit, "stride": overlap}
    for first in range(0, len(questions), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        encoded = tokenizer(
            questions[chunk], contexts[chunk], **options, return_overflowing_tokens=True, return_offsets_mapping=True
        )
        rows, places = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        for at, (row, offsets) in enumerate(zip(rows, places, strict=True)):
            sides = encoded.sequence_ids(at)
            kept = [tuple(place) if side == 1 else None for place, side in zip(offsets, sides, strict=True)]
            windows.append(Window(first + row, kept))
        for name, values in encoded.items():
            inputs.setdefault(name, []).extend(values)
    return inputs, windows


# ---- what is measured


def span_metric(windows: Sequence[Window], contexts: Sequence[str], answers: Sequence[Sequence[Answer]]) -> Metric:
    """F1 of the words of answers, and how many match exactly, as SQuAD counts them: the best over a row's answers."""
    unanswered = any(not own for own in answers)

    def said(logits: np.ndarray) -> list[str]:
        best: list[tuple[float, str]] = [(-np.inf, "")] * len(contexts)
        none = [np.inf] * len(contexts)
        for window, (starts, ends) in zip(windows, logits, strict=True):
            score, span = _best(window, starts, ends)
            none[window.row] = min(none[window.row], float(starts[0] + ends[0]))
            if score > best[window.row][0]:
                best[window.row] = (score, contexts[window.row][span[0] : span[1]])
        return [
            "" if unanswered and without > score else text for (score, text), without in zip(best, none, strict=True)
        ]

    def mean(logits: np.ndarray, score: Any) -> float:
        pairs = zip(said(logits), answers, strict=True)
        return float(
            np.mean([max(score(text, one.text) for one in own) if own else float(not text) for text, own in pairs])
        )

    def exact(logits: np.ndarray, _: Any) -> dict[str, float]:
        return {"exact": mean(logits, _exact)}

    return Metric("f1", True, _stacked, lambda logits, _: mean(logits, word_f1), exact, whole=True)


def _stacked(outputs: Sequence[Tensor], labels: Any) -> Tensor:
    """The logits of starts and of ends, (batch, 2, length)."""
    return torch.stack([outputs[0].float(), outputs[1].float()], 1)


def _best(window: Window, starts: np.ndarray, ends: np.ndarray) -> tuple[float, tuple[int, int]]:
    """The score and the place of the likeliest span of a window."""
    inside = np.array([at for at, place in enumerate(window.places) if place is not None], dtype=int)
    if not len(inside):
        return -np.inf, (0, 0)
    first = inside[np.argsort(-starts[inside], kind="stable")[:_BEST]]
    last = inside[np.argsort(-ends[inside], kind="stable")[:_BEST]]
    pairs = [(float(starts[a] + ends[b]), int(a), int(b)) for a in first for b in last if 0 <= b - a < _LONGEST]
    if not pairs:
        return -np.inf, (0, 0)
    score, a, b = max(pairs)
    start, end = window.places[a], window.places[b]
    assert start is not None
    assert end is not None
    return score, (start[0], end[1])


def _words(text: str) -> list[str]:
    """The words of an answer as SQuAD compares them: without case, punctuation and articles."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _exact(text: str, wanted: str) -> float:
    return float(_words(text) == _words(wanted))


def word_f1(text: str, wanted: str) -> float:
    """F1 of the words that two answers share."""
    own, other = Counter(_words(text)), Counter(_words(wanted))
    if not own or not other:
        return float(own == other)
    return harmonic((own & other).total(), own.total(), other.total())
