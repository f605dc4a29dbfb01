"""What evaluation measures beside the loss: accuracy of classes, F1 of several labels in a row or of entities, errors
of numbers, perplexity of next or masked tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..graph.program import Program
from ..models.tasks import IGNORED, loss_type, problem_type


@dataclass(frozen=True)
class Metric:
    """One figure of an evaluation, and what goes with it.

    Attributes:
        name: ``accuracy``, ``f1``, ``rmse``, ``perplexity``
        greater_is_better: which of two figures is the better one
        reduce: turns ``(logits, labels)`` of a batch into the little that ``score`` needs, so that no logits are kept
        score: turns ``(reduced, labels)`` of all batches into the figure
        beside: turns ``(reduced, labels)`` of all batches into further figures by name, for people to read
        whole: whether ``reduce`` takes all outputs, not the first alone
    """

    name: str
    greater_is_better: bool
    reduce: Callable[[Any, Any], Tensor]
    score: Callable[[Any, Any], float]
    beside: Callable[[Any, Any], Mapping[str, float]] | None = None
    whole: bool = False

    def preprocess(self, outputs: Any, labels: Tensor) -> Tensor:
        """What HF Trainer calls for each batch. Models with several outputs give their logits first."""
        return self.reduce(outputs[0] if isinstance(outputs, tuple) and not self.whole else outputs, labels)

    def compute(self, prediction: Any) -> dict[str, float]:
        """What HF Trainer calls with everything at the end."""
        found = prediction.predictions, prediction.label_ids
        return {self.name: self.score(*found), **(self.beside(*found) if self.beside is not None else {})}


def measured_by(metric: Metric | None, own: Callable[[Any], Any] | None) -> dict[str, Any]:
    """What HF Trainer measures by: our metric, which sees a part of the outputs, or the caller's."""
    if metric is None:
        return {"compute_metrics": own}
    return {"compute_metrics": metric.compute, "preprocess_logits_for_metrics": metric.preprocess}


def metric_of(program: Program) -> Metric | None:
    """The metric of a program's task, or None where its loss says enough (several numbers in a row)."""
    kind = loss_type(program.source.model) or ""
    config = program.config
    if kind == "ForTokenClassification":
        names = {int(number): str(name) for number, name in (config.id2label or {}).items()}
        return entity_f1(names) if any(name.startswith("B-") for name in names.values()) else ACCURACY
    if kind.endswith("Classification"):
        problem = problem_type(config)
        if problem == "regression" and config.num_labels > 1:
            return None
        return {"regression": RMSE, "multi_label_classification": F1}.get(problem, ACCURACY)
    if kind in ("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration"):
        shifted = kind == "ForCausalLM" and not getattr(config, "is_encoder_decoder", False)
        return NEXT_PERPLEXITY if shifted else PERPLEXITY
    return None


def _argmax(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(-1)


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    counted = labels != IGNORED
    return float((predictions == labels)[counted].mean())


def _surprise(logits: Tensor, labels: Tensor) -> Tensor:
    """Per row, the summed negative log-likelihood of its targets and their number: (batch, 2), fp64."""
    flat = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    sums = flat.view_as(labels).double().sum(1)
    return torch.stack([sums, labels.ne(IGNORED).sum(1).double()], 1)


def _surprise_of_next(logits: Tensor, labels: Tensor) -> Tensor:
    return _surprise(logits[:, :-1], labels[:, 1:])


def _perplexity(rows: np.ndarray, labels: np.ndarray) -> float:
    # Over all tokens: the mean of the batches' losses would weigh a short batch like a long one.
    total, count = rows.sum(0)
    mean = total / count if count else math.nan
    return math.inf if mean > 700 else math.exp(mean)  # exp overflows fp64 soon after


# ---- several labels a row


def _chosen(logits: Tensor, labels: Tensor) -> Tensor:
    """1 where a label is more likely than not, else 0."""
    return (logits > 0).to(torch.int8)


def harmonic(right: float, found: float, wanted: float) -> float:
    """F1 from counts: how many were found, how many wanted, and how many of the found are right; 0 where both are 0."""
    return 2 * right / (found + wanted) if found + wanted else 0.0


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    wanted = labels > 0.5
    return harmonic(float((wanted & (predictions > 0)).sum()), float((predictions > 0).sum()), float(wanted.sum()))


def _beside_f1(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    by_label = [_f1(predictions[:, label], labels[:, label]) for label in range(labels.shape[1])]
    return {"f1_macro": float(np.mean(by_label)), "exact": float(((labels > 0.5) == (predictions > 0)).all(1).mean())}


# ---- numbers


def _number(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.reshape(len(logits)).float()


def _rmse(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(np.sqrt(np.mean((predictions.astype(float) - labels) ** 2)))


def _correlated(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Pearson's correlation; empty where either is constant and it is undefined."""
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return {}
    return {"pearson": float(np.corrcoef(predictions.astype(float), labels)[0, 1])}


# ---- tags of words


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities that tags like ``B-PER I-PER O`` mark, as (kind, first word, word after the last).

    As conlleval reads them: an ``I-`` that continues nothing of its kind begins an entity; ``E-`` and ``S-`` end one.
    """
    found, kind, start = set(), "", 0
    for at, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if kind and not (prefix in ("I", "E") and name == kind):
            found.add((kind, start, at))
            kind = ""
        if name and not kind:
            kind, start = name, at
        if kind and prefix in ("E", "S"):
            found.add((kind, start, at + 1))
            kind = ""
    return found


def entity_f1(names: Mapping[int, str]) -> Metric:
    """F1 of entities (kind and both ends right), of tags with these names; the accuracy of tags beside it."""

    def score(predictions: np.ndarray, labels: np.ndarray) -> float:
        right = found = wanted = 0
        for predicted, own in zip(predictions, labels, strict=True):
            counted = own != IGNORED
            guessed, told = (entities([names[int(tag)] for tag in row[counted]]) for row in (predicted, own))
            right, found, wanted = right + len(guessed & told), found + len(guessed), wanted + len(told)
        return harmonic(right, found, wanted)

    return Metric("f1", True, _argmax, score, lambda *found: {"accuracy": _accuracy(*found)})


F1 = Metric("f1", True, _chosen, _f1, _beside_f1)
RMSE = Metric("rmse", False, _number, _rmse, _correlated)
ACCURACY = Metric("accuracy", True, _argmax, _accuracy)
PERPLEXITY = Metric("perplexity", False, _surprise, _perplexity)
NEXT_PERPLEXITY = Metric("perplexity", False, _surprise_of_next, _perplexity)
