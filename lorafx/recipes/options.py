"""The options of training, declared once: recipe keys, command-line flags and help texts derive from here."""

from __future__ import annotations

from dataclasses import dataclass

from ..base import Options, option
from ..errors import RecipeError
from ..ranges import MOST_LABELS


@dataclass(frozen=True)
class ModelOptions(Options):
    """What a recipe may say about the model it is meant for; the command line wins."""

    @classmethod
    def title(cls) -> str:
        return "model options"

    checkpoint: str | None = option(None, "the base checkpoint's folder")
    task: str | None = option(None, "open the checkpoint for this task, e.g. text-classification")
    num_labels: int | None = option(None, "size of the classification head", least=1, most=MOST_LABELS)
    ignore_mismatched_sizes: bool = option(
        False, "weights whose size differs from the checkpoint's (a head for other classes) start at random"
    )
    dtype: str | None = option(None, "load the base in this dtype, e.g. bfloat16")
    seed: int = option(0, "seed of initial values", least=0, below=2**32)


@dataclass(frozen=True)
class TrainOptions(Options):
    """How ``lorafx train`` and :func:`lorafx.train` train. Everything else of HF Trainer goes through ``trainer``."""

    @classmethod
    def title(cls) -> str:
        return "training options"

    def __post_init__(self) -> None:
        if self.max_steps == 0:
            raise RecipeError("training options: max_steps = 0 trains nothing; give steps, or -1 to train by epochs")
        if self.epochs == 0 and self.max_steps < 1:
            raise RecipeError("training options: epochs = 0 trains nothing; give epochs or max_steps")

    epochs: float = option(3.0, "passes over the training data", least=0, group="Length")
    max_steps: int = option(-1, "stop after this many optimiser steps (-1: by epochs)", least=-1)
    batch_size: int = option(32, "rows per device and micro-batch", least=1)
    accumulate: int = option(1, "micro-batches per optimiser step", least=1)
    seed: int = option(0, "seed of shuffling, dropout and noise", least=0, below=2**32)
    learning_rate: float = option(1e-3, "peak learning rate", least=0, group="Optimiser")
    schedule: str = option("linear", "learning-rate schedule, by transformers' names")
    warmup: float = option(0.0, "share of the steps spent warming up", least=0, below=1)
    weight_decay: float = option(0.0, "AdamW weight decay", least=0)
    max_grad_norm: float = option(1.0, "gradient clipping", least=0)
    distill: float = option(
        0.0, "share of the loss taken from a teacher's answers instead of the labels", least=0, most=1, group="Teacher"
    )
    distill_temperature: float = option(2.0, "divides the logits before they are compared", above=0)
    distill_hidden: float = option(0.0, "weight of the distance to the teacher's hidden states, by block", least=0)
    text: str | None = option(
        None,
        "column of the text (default: 'text'; 'tokens' for words, 'question' for questions, 'image' for images)",
        group="Data",
    )
    text_pair: str | None = option(None, "column of a second text (default for questions: 'context')")
    label: str | None = option(
        None,
        "column of the label (default: 'label'; 'tags' for words, 'answers' for questions); for a causal model the "
        "text that follows (default: none); several columns of 0 and 1, separated by commas, are several labels",
    )
    max_length: int = option(128, "tokens kept of each text", least=1)
    stride: int = option(
        32, "tokens shared by neighbouring windows of a context that is longer than max_length", least=0
    )
    chat: bool = option(
        False,
        "learn the assistant's turns, by the chat template: in the column 'messages', or the label as an answer",
    )
    packing: bool = option(
        False, "put several texts of a causal model into one row of up to max_length tokens; each sees those before it"
    )
    end_of_text: bool = option(True, "end the texts that a model learns to write with the end-of-text token")
    evaluate: bool = option(
        True, "evaluate before the first step and after every epoch, when there is evaluation data", group="Evaluation"
    )
    eval_batch_size: int = option(64, "rows per device at evaluation", least=1)
    keep_best: bool = option(False, "end with the weights of the best epoch, among those after the methods' schedules")
    samples: int = option(0, "evaluation rows that a causal model continues at the end, for you to read", least=0)
    bf16: bool = option(False, "autocast to bfloat16", group="Machine")
    checkpointing: bool = option(False, "recompute activations block by block to save memory")
    save_steps: int = option(
        0, "save a resumable checkpoint every N steps (0: every epoch when keep_best, else never)", least=0
    )
    log_steps: int = option(50, "steps between log lines", least=1)
    trainer: dict[str, str | int | float | bool | dict[str, str | int | float | bool]] = option(
        {}, "any other TrainingArguments, by their own names"
    )
