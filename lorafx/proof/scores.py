"""The quality of a model that computes a different function on purpose (quantised, say): one figure for it, and one for
the original.

On a table that is what training evaluates: accuracy, F1, an error, perplexity. Without a table it is measured on
examples of the original: the perplexity of the texts that a decoder writes, or how often both give the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from ..models.sentences import in_a_row, side_by_side
from ..models.tasks import IGNORED
from ..models.tokenizers import length_limit, pad_token
from ..parity.inputs import SHAPES, Generator
from ..parity.runner import Runner
from ..public import Program
from ..recipes.options import TrainOptions
from ..recipes.recipe import parse_options
from ..training.data import has_inputs, prepare, tokenizer_of
from ..training.images import is_of_images
from ..training.metrics import ACCURACY, NEXT_PERPLEXITY, Metric, metric_of
from ..training.module import LABELS
from ..training.tasks import task_of
from .decoding import spoken


@dataclass(frozen=True)
class Scores:
    """A score of a model, to be compared with that of its replacement.

    Attributes:
        metric: what training measures (``accuracy``, ``f1``, ``perplexity`` …), ``agreement`` (share of answers that
            are the model's) or ``similarity`` (mean cosine of outputs with the model's)
        on: what it is measured on
        before: what the model scores
        ask: gives the score of another model
    """

    metric: str
    on: str
    before: float
    ask: Callable[[Runner], float]

    def with_other(self, other: Runner) -> dict[str, Any]:
        """Both scores, as a report has them; one that is not a number is null."""
        after = self.ask(other)
        scores = {"before": self.before, "after": after}
        return {"metric": self.metric, "on": self.on, **{key: _finite(value) for key, value in scores.items()}}


def scores_of(program: Program, runner: Runner, data: Any, options: Mapping[str, Any]) -> Scores:
    """What ``runner``, which was made of ``program``, scores on a table, or on its own examples when that is None.

    Raises:
        UsageError: the model does not learn from a table, or has no metric
        ArtifactError: the table cannot be used
    """
    if data is not None:
        return _on_table(program, runner, data, parse_options(TrainOptions, dict(options), "training options"))
    if runner.decoder is not None:
        return _on_own_texts(program, runner)
    return _on_examples(program, runner)


def refuse_unscored(program: Program, data: Any) -> None:
    """UsageError for a table that ``program`` cannot be scored on, whatever is in it; before any work."""
    if data is not None and not has_inputs(data, program) and not is_of_images(program):
        task_of(program)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- a table


def _on_table(program: Program, runner: Runner, data: Any, options: TrainOptions) -> Scores:
    prepared = prepare(data, program, tokenizer_of(program), options)
    metric = prepared.metric or metric_of(program)
    if metric is None:
        raise UsageError(f"{program.name} has no measure to score on data; leave data out")
    rows = [prepared.rows[index] for index in range(len(prepared.rows))]
    name = Path(data).name if isinstance(data, (str, PathLike)) else "data"

    def ask(one: Runner) -> float:
        # A decoder takes no padding after a text.
        size = 1 if one.decoder is not None else options.eval_batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        return _score(metric, one, batches, prepared.collator)

    return Scores(metric.name, f"{len(rows)} rows of {name}", ask(runner), ask)


def _score(metric: Metric, runner: Runner, batches: Sequence[Any], collator: Any) -> float:
    reduced, wanted = [], []
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # masked tokens are chosen at random: the same ones for every model
        for rows in batches:
            batch = dict(collator(rows))
            labels = [batch.pop(name) for name in LABELS if name in batch]
            batch, sides = in_a_row(batch)
            outputs = runner(batch)
            if sides:
                outputs = side_by_side(outputs, sides)
            first = outputs.get("logits", next(iter(outputs.values())))
            reduced.append(metric.reduce(list(outputs.values()) if metric.whole else first, labels[0]))
            wanted.append(labels[0])
    return metric.score(_joined(reduced), _joined(wanted))


def _joined(batches: Sequence[Tensor]) -> np.ndarray:
    """One array from batches whose rows differ in length, padded as HF Trainer does."""
    widest = max(batch.shape[-1] for batch in batches) if batches[0].dim() > 1 else 0
    padded = [
        torch.nn.functional.pad(batch, (0, widest - batch.shape[-1]), value=IGNORED) if widest else batch
        for batch in batches
    ]
    return torch.cat(padded).numpy()


# ---- no table


def _on_own_texts(program: Program, runner: Runner) -> Scores:
    tokenizer = tokenizer_of(program)
    texts = [(asked, said) for asked, said in spoken(runner, tokenizer) if len(said) > 1]
    sound = any(asked.dim() > 1 for asked, _ in texts)
    kind = "made-up sounds" if sound else "prompts" if tokenizer is not None else "made-up prompts"

    def ask(one: Runner) -> float:
        rows = []
        for asked, said in texts:
            logits = one(one.decoder.asked(asked, said))["logits"]
            rows.append(NEXT_PERPLEXITY.reduce(logits, said[None]).numpy())
        return NEXT_PERPLEXITY.score(np.concatenate(rows), np.zeros(len(rows)))

    on = f"{len(texts)} {kind} and what the graph wrote after them before (no data was given)"
    return Scores("perplexity", on, ask(runner), ask)


def _on_examples(program: Program, runner: Runner) -> Scores:
    generator = Generator(runner.inputs, pad=pad_token(runner.config), limit=length_limit(runner.config))
    batches = [batch.values for batch in generator.batches(SHAPES)]
    expected = [_answer(runner, values) for values in batches]
    classes = all(answer.dim() == 2 and answer.shape[1] > 1 for answer in expected) and metric_of(program) is ACCURACY
    count = sum(len(answer) for answer in expected)

    def ask(one: Runner) -> float:
        pairs = [(first, _answer(one, values)) for first, values in zip(expected, batches, strict=True)]
        found = [_alike(*pair) if classes else _cosine(*pair) for pair in pairs]
        return float(torch.cat(found).double().mean())

    return Scores("agreement" if classes else "similarity", f"{count} made-up inputs (no data was given)", 1.0, ask)


def _answer(runner: Runner, values: Any) -> Tensor:
    """The logits, or else the first output."""
    outputs = runner(values)
    return outputs.get("logits", next(iter(outputs.values())))


def _alike(first: Tensor, second: Tensor) -> Tensor:
    return (first.argmax(-1) == second.argmax(-1)).flatten()


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    return torch.cosine_similarity(first.double().flatten(1), second.double().flatten(1))
