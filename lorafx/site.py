"""The name by which passes in packages of their own import :mod:`lorafx.graph.site`."""

from .graph.site import Site

__all__ = ["Site"]
