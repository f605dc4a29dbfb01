"""The name by which scripts import :mod:`lorafx.recipes.options`."""

from .recipes.options import TrainOptions

__all__ = ["TrainOptions"]
