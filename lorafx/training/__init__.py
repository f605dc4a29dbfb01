"""Training a program: its module, transformers' Trainer extended for methods, data, metrics.

Imports graph, recipes, models and files; exports nothing. The names below load on first use: ``Trainer`` is
transformers' for what ``program.module()`` returns, ``MethodTrainerMixin`` turns any other into one, ``LorafxCallback``
serves loops that take callbacks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = [
    "LorafxCallback",
    "MethodTrainerMixin",
    "TrainResult",
    "Trainer",
    "last_checkpoint",
    "load_state",
    "rewritten_model",
    "state_of",
    "train",
    "training_arguments",
]

if TYPE_CHECKING:
    from .arguments import training_arguments
    from .fit import TrainResult, train
    from .trainer import (
        LorafxCallback,
        MethodTrainerMixin,
        Trainer,
        last_checkpoint,
        load_state,
        rewritten_model,
        state_of,
    )


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import fit, trainer

        return getattr(trainer if hasattr(trainer, name) else fit, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
