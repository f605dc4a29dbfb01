"""The options of a training as transformers' ``TrainingArguments``."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from transformers import TrainingArguments

from ..errors import UsageError, first_line
from ..recipes.options import TrainOptions
from ..recipes.trainer import ARGUMENTS, check_training
from .metrics import Metric


def training_arguments(
    settings: TrainOptions, folder: str | PathLike[str], evaluates: bool, metric: Metric | None, progress: bool = True
) -> TrainingArguments:
    """The transformers ``TrainingArguments`` of ``settings``; UsageError for a value they do not take."""
    check_training(settings)
    # Checkpoints and evaluations come together, for a best one to be there to keep.
    moment = "steps" if settings.save_steps else "epoch"
    values: dict[str, Any] = {theirs: getattr(settings, ours) for ours, theirs in ARGUMENTS.items()}
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
