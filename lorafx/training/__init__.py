"""Training a program: its module, transformers' Trainer told of methods, data, metrics.

Imports graph, recipes and models; exports nothing. ``lorafx.training.Trainer`` is transformers' Trainer for what
``program.module()`` returns, and ``MethodTrainerMixin`` makes one of any other; both load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["MethodTrainerMixin", "Trainer"]

if TYPE_CHECKING:
    from .trainer import MethodTrainerMixin, Trainer


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
