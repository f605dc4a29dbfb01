"""The name by which passes in packages of their own import :mod:`lorafx.graph.state`."""

from .graph.state import MethodState, SiteState

__all__ = ["MethodState", "SiteState"]
