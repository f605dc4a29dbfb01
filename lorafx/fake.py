"""Values of operators on fake tensors: shapes and dtypes, symbolic ones too, without numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode


class FakeValues:
    """Computes fake values of nodes.

    Blocks repeat, so most calls are the like of an earlier one; symbolic shapes are slow to compute, and a fake value
    is nothing but its metadata, so those nodes share one.
    """

    def __init__(self, mode: FakeTensorMode, root: nn.Module):
        self.mode = mode
        self.root = root
        self._known: dict[Any, Any] = {}

    def of(self, node: fx.Node) -> Any:
        """The value of ``node``, from those its operands carry."""
        key = (node.target, self._likeness(node.args), self._likeness(tuple(node.kwargs.items())))
        if key not in self._known:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._operand)
            operator: Any = node.target
            with self.mode, torch.no_grad():
                self._known[key] = operator(*args, **kwargs)
        return self._known[key]

    def _operand(self, node: fx.Node) -> Any:
        """An operand's fake value; of an inner graph (the body of a no-grad region, say) the graph itself."""
        return node.meta["val"] if "val" in node.meta else self.root.get_submodule(str(node.target))

    def _likeness(self, value: Any) -> Any:
        """What of an argument decides an operator's fake result, as something hashable."""
        if isinstance(value, fx.Node):
            return self._likeness(self._operand(value))
        if isinstance(value, (list, tuple)):
            return tuple(self._likeness(item) for item in value)
        if isinstance(value, Tensor):
            sizes = self._likeness(value.shape), self._likeness(value.stride())
            return sizes, value.dtype, value.device, value.requires_grad
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return value.node.expr
        return type(value), value
