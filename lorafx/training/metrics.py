"""What evaluation measures beside the loss: accuracy of classes, perplexity of next or masked tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..graph.program import Program
from ..models.tasks import loss_type

#: The label of what is not to be predicted, as transformers' losses have it.
_IGNORED = -100


@dataclass(frozen=True)
class Metric:
    """One figure of an evaluation.

    Attributes:
        name: ``accuracy`` or ``perplexity``
        greater_is_better: which of two figures is the better one
        reduce: ``(logits, labels)`` of a batch to the little that ``score`` needs, so that no logits are kept
        score: ``(reduced, labels)`` of all batches to the figure
    """

    name: str
    greater_is_better: bool
    reduce: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[np.ndarray, np.ndarray], float]

    def preprocess(self, outputs: Any, labels: Tensor) -> Tensor:
        """What HF Trainer calls for each batch. Models with several outputs give their logits first."""
        return self.reduce(outputs[0] if isinstance(outputs, tuple) else outputs, labels)

    def compute(self, prediction: Any) -> dict[str, float]:
        """What HF Trainer calls with everything at the end."""
        return {self.name: self.score(prediction.predictions, prediction.label_ids)}


def metric_of(program: Program) -> Metric | None:
    """The metric of a program's task, or None where its loss says enough (regression, several labels a row)."""
    kind = loss_type(program.source.model) or ""
    config = program.config
    if kind.endswith("Classification"):
        single = getattr(config, "problem_type", None) in (None, "single_label_classification")
        return ACCURACY if single and config.num_labels > 1 else None
    if kind in ("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration"):
        shifted = kind == "ForCausalLM" and not getattr(config, "is_encoder_decoder", False)
        return NEXT_PERPLEXITY if shifted else PERPLEXITY
    return None


def _argmax(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(-1)


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    counted = labels != _IGNORED
    return float((predictions == labels)[counted].mean())


def _surprise(logits: Tensor, labels: Tensor) -> Tensor:
    """Per row, the summed negative log-likelihood of its targets and their number: (batch, 2), fp64."""
    flat = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=_IGNORED, reduction="none"
    )
    sums = flat.view_as(labels).double().sum(1)
    return torch.stack([sums, labels.ne(_IGNORED).sum(1).double()], 1)


def _surprise_of_next(logits: Tensor, labels: Tensor) -> Tensor:
    return _surprise(logits[:, :-1], labels[:, 1:])


def _perplexity(rows: np.ndarray, labels: np.ndarray) -> float:
    # Over all tokens: the mean of the batches' losses would weigh a short batch like a long one.
    total, count = rows.sum(0)
    mean = total / count if count else math.nan
    return math.inf if mean > 700 else math.exp(mean)  # beyond 700 fp64 ends


ACCURACY = Metric("accuracy", True, _argmax, _accuracy)
PERPLEXITY = Metric("perplexity", False, _surprise, _perplexity)
NEXT_PERPLEXITY = Metric("perplexity", False, _surprise_of_next, _perplexity)
