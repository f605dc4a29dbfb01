"""Faster ONNX exports with the same result: avoid what torch's converter and onnxscript's rules do over and over."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .lowering import lower

_log = logging.getLogger(__name__)


@contextmanager
def quicker() -> Iterator[None]:
    """While it is entered, rules check a node's kind first, as they would later anyway, the converter's table of
    operators is built once, and graphs are decomposed without another trace where :mod:`lorafx.backends.lowering` can.

    Where these lie is not promised by torch or onnxscript: with versions that have them elsewhere, exports are as slow
    as before.
    """
    try:
        from onnxscript.rewriter.pattern import Pattern
        from torch.onnx._internal.exporter import _decomp, _fx_passes
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        match, table = Pattern.match, vars(ONNXRegistry)["from_torchlib"]
        decompose, operators = _fx_passes.decompose_with_registry, _decomp.get_onnx_implemented_overloads
    except (ImportError, AttributeError, KeyError) as error:
        _log.debug("exports take their usual time: %s", error)
        yield
        return
    make: Any = ONNXRegistry.from_torchlib

    def from_torchlib(*options: Any, **named: Any) -> Any:
        """A copy of the table, as an export may add operators to it."""
        own = copy.copy(_made(make, *options, **named))
        own.functions = {operator: list(known) for operator, known in own.functions.items()}
        return own

    def decomposed(exported: Any, registry: Any) -> Any:
        return exported if lower(exported, {*operators(registry)}) else decompose(exported, registry)

    Pattern.match = _asking_first(match)
    _fx_passes.decompose_with_registry = decomposed
    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)
    try:
        yield
    finally:
        Pattern.match, ONNXRegistry.from_torchlib = match, table
        _fx_passes.decompose_with_registry = decompose


@functools.cache
def _made(make: Any, *options: Any, **named: Any) -> Any:
    """torch's table of ONNX operators: some hundred functions, whose code is parsed for their types."""
    return make(*options, **named)


def _asking_first(match: Any) -> Any:
    """``Pattern.match`` that first asks whether the node is of the kind that the pattern's first result is.

    onnxscript 0.7 asks that of every node for every rule, after preparing for the answer; its one rule of two results
    (two slices that are one split) even lists all nodes of the graph before, which takes two fifths of the export of a
    decoder of 30 layers. Whatever it would try begins with that very question.
    """

    from onnxscript.rewriter.pattern import SimplePatternMatcher

    @functools.wraps(match)
    def asked(self: Any, model: Any, graph: Any, node: Any, *, tracer: Any = None, **options: Any) -> Any:
        if tracer is None and type(self._matcher) is SimplePatternMatcher:
            (first, *_) = self._target_pattern.output_nodes
            if not first.op.matches(node.op_type):
                return None
        return match(self, model, graph, node, tracer=tracer, **options)

    return asked
