"""The options of a training as transformers' ``TrainingArguments``."""

from __future__ import annotations

import dataclasses
import typing
from os import PathLike
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from ..errors import UsageError, did_you_mean, first_line
from ..recipes.options import TrainOptions
from .metrics import Metric

#: Our options by the names transformers has for them.
_ARGUMENTS = {
    "epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "accumulate": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "schedule": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
    "bf16": "bf16",
    "log_steps": "logging_steps",
}
#: What a value of a plain type may be, and what that is called.
_PLAIN: dict[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
}


def training_arguments(
    settings: TrainOptions, folder: str | PathLike[str], evaluates: bool, metric: Metric | None, progress: bool = True
) -> TrainingArguments:
    """The transformers ``TrainingArguments`` of ``settings``; UsageError for a value they do not take."""
    for name, value in settings.trainer.items():
        _check_argument(name, value)
    schedules = [entry.value for entry in SchedulerType]
    if settings.schedule not in schedules:
        hint = did_you_mean(settings.schedule, schedules)
        raise UsageError(f"unknown schedule {settings.schedule!r}{hint}; known: {', '.join(schedules)}")
    # Checkpoints and evaluations come together, for a best one to be there to keep.
    moment = "steps" if settings.save_steps else "epoch"
    values: dict[str, Any] = {theirs: getattr(settings, ours) for ours, theirs in _ARGUMENTS.items()}
    values.update(
        output_dir=str(folder),
        eval_strategy=("no" if not (evaluates and settings.evaluate) else moment if settings.keep_best else "epoch"),
        eval_steps=settings.save_steps or None,
        eval_on_start=evaluates and settings.evaluate,
        save_strategy=moment if saves(settings) else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=2,
        load_best_model_at_end=settings.keep_best,
        metric_for_best_model=metric.name if metric is not None else "loss",
        greater_is_better=metric is not None and metric.greater_is_better,
        use_cpu=not torch.accelerator.is_available(),
        logging_nan_inf_filter=False,  # a loss that is not a number any more is to be seen
        report_to="none",
        disable_tqdm=not progress,
        ddp_find_unused_parameters=False,
    )
    try:
        return TrainingArguments(**{**values, **settings.trainer})
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(f"training options: {first_line(error)}") from error


def saves(settings: TrainOptions) -> bool:
    """Whether a training keeps checkpoints on its way."""
    return settings.keep_best or settings.save_steps > 0


def _check_argument(name: str, value: Any) -> None:
    """UsageError for an argument that TrainingArguments do not have, or where one is a number or a switch and the value
    is not: they take any, and the word "False" is true."""
    known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    if name not in known:
        raise UsageError(f"trainer: TrainingArguments has no {name!r}{did_you_mean(name, known)}")
    hint = typing.get_type_hints(TrainingArguments)[name]
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    right, what = _PLAIN.get(kinds[0], ((), "")) if len(kinds) == 1 else ((), "")
    fits = isinstance(value, right) and (kinds[0] is bool or not isinstance(value, bool))
    if what and not fits and value is not None:
        raise UsageError(f"trainer: {name} = {value!r} is not {what}")
