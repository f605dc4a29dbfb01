"""The options of training, declared once: recipe keys, command-line flags and help texts derive from here."""

from __future__ import annotations

from dataclasses import dataclass

from .base import option


@dataclass(frozen=True)
class ModelOptions:
    """What a recipe may say of the model it is meant for; the command line wins."""

    checkpoint: str | None = option(None, "the base checkpoint's folder")
    task: str | None = option(None, "open the checkpoint for this task, e.g. text-classification")
    num_labels: int | None = option(None, "size of the classification head")
    dtype: str | None = option(None, "load the base in this dtype, e.g. bfloat16")
    seed: int = option(0, "seed of initial values")


@dataclass(frozen=True)
class TrainOptions:
    """How ``lorafx train`` and :func:`lorafx.train` train. Everything else of HF Trainer goes through ``trainer``."""

    epochs: float = option(3.0, "passes over the training data")
    max_steps: int = option(-1, "stop after this many optimiser steps (-1: by epochs)")
    batch_size: int = option(32, "rows per device and micro-batch")
    eval_batch_size: int = option(64, "rows per device at evaluation")
    accumulate: int = option(1, "micro-batches per optimiser step")
    learning_rate: float = option(1e-3, "peak learning rate")
    schedule: str = option("linear", "learning-rate schedule, by transformers' names")
    warmup: float = option(0.0, "share of the steps spent warming up")
    weight_decay: float = option(0.0, "AdamW weight decay")
    max_grad_norm: float = option(1.0, "gradient clipping")
    max_length: int = option(128, "tokens kept of a text")
    seed: int = option(0, "seed of shuffling, dropout and noise")
    bf16: bool = option(False, "autocast to bfloat16")
    checkpointing: bool = option(False, "recompute activations block by block to save memory")
    evaluate: bool = option(True, "evaluate at the end of every epoch, when there is evaluation data")
    keep_best: bool = option(False, "end with the best epoch's weights (needs evaluation data)")
    save_steps: int = option(
        0, "save a resumable checkpoint every so many steps (0: every epoch when keep_best, else never)"
    )
    log_steps: int = option(50, "steps between log lines")
    text: str = option("text", "column of the text")
    text_pair: str | None = option(None, "column of a second text")
    label: str = option("label", "column of the label")
    trainer: dict[str, str | int | float | bool | dict[str, str | int | float | bool]] = option(
        {}, "any other TrainingArguments, by their own names"
    )
