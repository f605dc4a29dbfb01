"""The name by which scripts import :mod:`lorafx.training.data`."""

from .training.data import prepare

__all__ = ["prepare"]
