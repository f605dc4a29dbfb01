"""A training whose weights are not finite any more: it stops there, and nothing of it is kept."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..errors import UsageError
from ..graph.program import Program
from .trainer import rewritten_model, state_of

_log = logging.getLogger(__name__)


class StopDiverged(TrainerCallback):
    """Stops a training at the first logged loss that is not a number, if trained weights are not finite either: half
    precision skips a step whose gradients overflow, and goes on."""

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        if math.isfinite((logs or {}).get("loss", 0.0)):
            return
        inner = rewritten_model(model)
        values = state_of(inner)  # whole ones, where processes share them
        if not _lost({name: values[name] for name in inner.program.trainable() if name in values}):
            return
        _log.warning("step %d: the loss is %s, and so are weights; training stops", state.global_step, logs["loss"])
        control.should_training_stop = True


def refuse_diverged(program: Program, learning_rate: float) -> None:
    """UsageError when a weight that ``program`` trained is not finite."""
    trained = program.trainable()
    lost = _lost(trained)
    if lost:
        raise UsageError(
            f"{program.name} diverged: {len(lost)} of {len(trained)} trained weights are not finite numbers, as "
            f"{lost[0]}; train it anew with a lower learning_rate than {learning_rate:g}, or with warmup"
        )


def _lost(values: dict[str, Any]) -> list[str]:
    """The names of the floating-point tensors that hold numbers which are not finite."""
    return [name for name, value in values.items() if value.is_floating_point() and not _finite(value)]


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value.detach()).all())
