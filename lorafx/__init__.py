"""lorafx: a compiler for fine-tuned models, on torch.fx.

Capture a checkpoint as a graph, rewrite it with passes, train it, fold what it learned back into a smaller graph, and
deploy that. The names below are the public interface; they load on first use, so importing lorafx costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

_HOME = {
    "capture": "frontend.capture",
    "Program": "public",
    "rewrite": "pipeline",
    "fold": "pipeline",
    "Recipe": "recipes.recipe",
    "Report": "reporting.report",
    "train": "training.fit",
    "export": "backends.export",
    "verify": "proof.verify",
    "bench": "proof.bench",
    "inspect": "frontend.inspect",
    "load": "frontend.load",
    "LorafxError": "errors",
}

__all__ = [
    "LorafxError",
    "Program",
    "Recipe",
    "Report",
    "__version__",
    "bench",
    "capture",
    "export",
    "fold",
    "inspect",
    "load",
    "rewrite",
    "train",
    "verify",
]

if TYPE_CHECKING:
    from .backends.export import export
    from .errors import LorafxError
    from .frontend.capture import capture
    from .frontend.inspect import inspect
    from .frontend.load import load
    from .pipeline import fold, rewrite
    from .proof.bench import bench
    from .proof.verify import verify
    from .public import Program
    from .recipes.recipe import Recipe
    from .reporting.report import Report
    from .training.fit import train


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
