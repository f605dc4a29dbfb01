"""Sums, products and comparisons of symbolic sizes, computed once.

Every tensor without values that a trace makes multiplies its sizes, adds up its strides and compares both, in Python
and by computer algebra: a fifth of the time of a large trace. Layers that repeat do so with the same symbols, and what
that gives is known by them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_log = logging.getLogger(__name__)

_OPERATIONS = ("add", "sub", "mul", "int_floordiv", "eq", "ne", "lt", "le", "gt", "ge", "sym_max", "sym_min")
#: Where a shape environment keeps what is known of its symbols, and the mark of what looks there.
_KNOWN = "lorafx_arithmetic"


@contextmanager
def remembered_sizes() -> Iterator[None]:
    """Within, an operation on two symbolic integers gives the value it gave for the like of them. Where torch has these
    operations is no promise of torch's: versions that have them elsewhere compute each of them."""
    try:
        from torch.fx.experimental.proxy_tensor import get_proxy_mode
        from torch.fx.experimental.sym_node import SymNode
    except ImportError as error:
        _log.debug("traces take their usual time: %s", error)
        yield
        return
    node: Any = SymNode
    found = {name: vars(node)[name] for name in _OPERATIONS if name in vars(node)}
    own = {name: operation for name, operation in found.items() if not hasattr(operation, _KNOWN)}  # else further out
    for name, operation in own.items():
        setattr(node, name, _remembering(operation, name, get_proxy_mode))
    try:
        yield
    finally:
        for name, operation in own.items():
            setattr(node, name, operation)


def _remembering(operation: Callable[..., Any], name: str, tracing: Callable[[], Any]) -> Callable[..., Any]:
    @functools.wraps(operation)
    def run(self: Any, other: Any) -> Any:
        # A tracer writes down what it sees computed, so it has to see it.
        key = None if tracing() is not None else _key(name, self, other)
        if key is None:
            return operation(self, other)
        known = vars(self.shape_env).setdefault(_KNOWN, {})
        if key not in known:
            known[key] = operation(self, other)
        return again(known[key])

    setattr(run, _KNOWN, True)
    return run


def again(node: Any) -> Any:
    """The same size as another object: a tracer tells by it which tensor's size it is."""
    result = object.__new__(type(node))
    vars(result).update(vars(node))
    return result


def _key(name: str, left: Any, right: Any) -> Any:
    """All that a result is made of; None where that is not known: of sizes that depend on values, of what is no
    integer, and where torch keeps a record of its own for each result."""
    try:
        environment = left.shape_env
        if environment is None or environment is not right.shape_env or left.fx_node or right.fx_node:
            return None
        if any(kind is not int for kind in (left.pytype, right.pytype, type(left._hint), type(right._hint))):
            return None
        # What is learned of symbols changes what their expressions stand for.
        return name, environment._version_counter, left._expr, right._expr, left._hint, right._hint
    except AttributeError:  # of another class, or of another version
        return None
