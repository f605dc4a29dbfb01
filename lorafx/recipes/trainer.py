"""What goes through to transformers' ``TrainingArguments``: checked where a recipe is read, not where training begins.

What depends on the machine (half precision, several processes) is found there alone.
"""

from __future__ import annotations

import dataclasses
import enum
import typing
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from .options import TrainOptions

#: Our training options by the names transformers has for them.
ARGUMENTS = {
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
#: Arguments that have another place here: two values for one thing would leave one of them out without a word.
_ELSEWHERE = {theirs: f"the training option {ours!r}" for ours, theirs in ARGUMENTS.items()}
_ELSEWHERE |= {"save_steps": "the training option 'save_steps'"}
_ELSEWHERE |= {"output_dir": "the command's -o (output_dir in Python)", "resume_from_checkpoint": "--resume (resume)"}
#: Warming up may also be counted in steps, which no option of ours says.
_COUNTED = "warmup_steps"
#: What a value of a plain type may be, and what that is called.
_PLAIN: dict[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
}


def check_training(settings: TrainOptions) -> None:
    """RecipeError for a schedule or arguments that transformers does not have or take, or that are options of ours.

    For those who train, or write down how to. Opening a run does not ask: that may be with another transformers.
    """
    if settings.schedule != "linear":  # the default: transformers is not imported for it
        from transformers.trainer_utils import SchedulerType

        known = [entry.value for entry in SchedulerType]
        if settings.schedule not in known:
            hint = did_you_mean(settings.schedule, known)
            raise RecipeError(f"unknown schedule {settings.schedule!r}{hint}; known: {', '.join(known)}")
    for name, value in settings.trainer.items():
        _check_argument(name, value)
        if name in _ELSEWHERE and not (name == _COUNTED and settings.warmup == 0):
            raise RecipeError(f"trainer: {name} is said by {_ELSEWHERE[name]}; leave it out here")


def _check_argument(name: str, value: Any) -> None:
    """RecipeError for an unknown name, or where the argument is a number, a switch or one of several words and the
    value is not: TrainingArguments take any, and the word "False" is true."""
    from transformers import TrainingArguments

    known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    if name not in known:
        raise RecipeError(f"trainer: TrainingArguments has no {name!r}{did_you_mean(name, known)}")
    hint = typing.get_type_hints(TrainingArguments)[name]
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    several = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    words = [str(entry.value) for kind in several for entry in kind]
    if words and value not in words:
        nearest = did_you_mean(str(value), words)
        raise RecipeError(f"trainer: {name} = {value!r} is not one of {', '.join(words)}{nearest}")
    right, what = _PLAIN.get(kinds[0], ((), "")) if len(kinds) == 1 else ((), "")
    fits = isinstance(value, right) and (kinds[0] is bool or not isinstance(value, bool))
    if what and not fits and value is not None:
        raise RecipeError(f"trainer: {name} = {value!r} is not {what}")
