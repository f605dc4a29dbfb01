"""Values of operators on fake tensors: shapes and dtypes, symbolic ones too, without numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode


class FakeValues:
    """Computes fake values of nodes.

    Blocks repeat, so most calls are the like of an earlier one; symbolic shapes are slow to compute, and a fake value
    is nothing but its metadata, so those nodes share one.
    """

    def __init__(self, mode: FakeTensorMode):
        self.mode = mode
        self._known: dict[Any, Any] = {}

    def of(self, node: fx.Node) -> Any:
        """The value of ``node``, from those its operands carry."""
        key = (node.target, _likeness(node.args), _likeness(tuple(node.kwargs.items())))
        if key not in self._known:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            operator: Any = node.target
            with self.mode, torch.no_grad():
                self._known[key] = operator(*args, **kwargs)
        return self._known[key]


def _likeness(value: Any) -> Any:
    """What of an argument decides an operator's fake result, as something hashable."""
    if isinstance(value, fx.Node):
        return _likeness(value.meta["val"])
    if isinstance(value, (list, tuple)):
        return tuple(_likeness(item) for item in value)
    if isinstance(value, Tensor):
        sizes = _likeness(value.shape), _likeness(value.stride())
        return sizes, value.dtype, value.device, value.requires_grad
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr
    return type(value), value
