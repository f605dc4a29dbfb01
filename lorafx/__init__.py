"""lorafx: a compiler for fine-tuned models, on torch.fx.

Capture a checkpoint as a graph, rewrite it with passes, train it, fold what it learned back into a smaller graph, and
deploy that. The names below are the public interface; they load on first use, so importing lorafx costs nothing.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "capture": "capture",
    "Program": "program",
    "rewrite": "pipeline",
    "fold": "pipeline",
    "Recipe": "recipe",
    "Report": "report",
    "train": "training",
    "export": "export",
    "verify": "parity",
    "load": "store",
    "LorafxError": "errors",
}

__all__ = [
    "LorafxError",
    "Program",
    "Recipe",
    "Report",
    "__version__",
    "capture",
    "export",
    "fold",
    "load",
    "rewrite",
    "train",
    "verify",
]

if TYPE_CHECKING:
    from .capture import capture
    from .errors import LorafxError
    from .export import export
    from .parity import verify
    from .pipeline import fold, rewrite
    from .program import Program
    from .recipe import Recipe
    from .report import Report
    from .store import load
    from .training import train


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(types.ModuleType):
    """Lets ``lorafx.capture`` stay the function: importing a submodule of that name would otherwise hide it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
