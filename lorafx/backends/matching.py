"""onnxscript's rules of patterns with several results, in time that grows with a graph and not with its square."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from onnxscript.rewriter.pattern import MatchResult, SimplePatternMatcher


@contextmanager
def quick_matching() -> Iterator[None]:
    """Ask of a node first whether it can be the first result of a pattern at all.

    onnxscript 0.7 lists all nodes of the graph for every node before it asks that (its rule of two slices that are one
    split), which takes two fifths of the export of a decoder of 30 layers. Nothing else is matched, or matched
    otherwise: every combination that would be tried begins with that very question.
    """
    thorough = SimplePatternMatcher.match

    def match(self: Any, model: Any, graph_or_function: Any, node: Any, **options: Any) -> MatchResult:
        if not self.pattern.has_single_output_node:
            result = MatchResult()
            if not self.pattern.output_nodes[0].matches(node, result):
                return result
        return thorough(self, model, graph_or_function, node, **options)

    SimplePatternMatcher.match = match
    try:
        yield
    finally:
        SimplePatternMatcher.match = thorough
