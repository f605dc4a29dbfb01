"""The name by which passes in packages of their own import :mod:`lorafx.graph.edit`."""

from .graph.edit import Edit

__all__ = ["Edit"]
