"""Values of operators on fake tensors: shapes and dtypes, symbolic ones too, without numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode, disable_fake_tensor_cache

from .shapes import told

if TYPE_CHECKING:
    from .program import Program


def _has_inner(node: fx.Node) -> bool:
    """Whether a node reads an inner graph."""
    return any("val" not in operand.meta for operand in node.all_input_nodes)


class FakeValues:
    """Computes fake values of nodes.

    Blocks repeat, and every pass looks at the same graph, so most calls resemble an earlier one; symbolic shapes are
    slow to compute, and a fake value is only metadata, so such nodes share one. The cache belongs to the fake mode,
    which all copies of a program share, and begins with the values of the trace.
    """

    def __init__(self, mode: FakeTensorMode, program: Program):
        self.mode = mode
        self.root = program.root
        self._known: dict[Any, Any] = vars(mode).setdefault("lorafx_known", {})
        if not self._known:
            self.learn(program.graph)

    def learn(self, graph: fx.Graph) -> None:
        """Take the values that the operators of ``graph`` carry for similar nodes; they are right."""
        for node in graph.nodes:
            if "val" in node.meta and isinstance(node.target, torch._ops.OpOverload) and not _has_inner(node):
                self._known.setdefault(self._key(node), node.meta["val"])

    def of(self, node: fx.Node) -> Any:
        """The value of ``node``, from those its operands carry."""
        if _has_inner(node):  # which may change
            return self._computed(node)
        key = self._key(node)
        if key not in self._known:
            self._known[key] = self._computed(node)
        return self._known[key]

    def _key(self, node: fx.Node) -> Any:
        """The key that determines the value of a node."""
        return node.target, self._likeness(node.args), self._likeness(tuple(node.kwargs.items()))

    def _computed(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._operand)
        operator: Any = node.target
        if (known := told(self.mode, operator, args, kwargs)) is not None:
            return known
        # As the tracer does: some operators have symbolic shapes in Python alone (baddbmm, of a bias it broadcasts).
        # Without torch's memo of operators, which takes longer to write than it saves below the memo of these.
        with disable_fake_tensor_cache(self.mode), self.mode, torch.no_grad(), enable_python_dispatcher():
            return operator(*args, **kwargs)

    def _operand(self, node: fx.Node) -> Any:
        """An operand's fake value; of an inner graph (the body of a no-grad region, say) the graph itself."""
        return node.meta["val"] if "val" in node.meta else self.root.get_submodule(str(node.target))

    def _likeness(self, value: Any) -> Any:
        """The part of an argument that determines an operator's fake result, as something hashable."""
        if isinstance(value, fx.Node):
            return self._likeness(self._operand(value))
        if isinstance(value, (list, tuple)):
            return tuple(self._likeness(item) for item in value)
        return likeness(value)


def likeness(value: Any) -> Any:
    """What two fake values, sizes or plain ones have in common when they are alike, as something hashable."""
    if isinstance(value, Tensor):
        sizes = likeness(tuple(value.shape)), likeness(value.stride())
        return sizes, value.dtype, value.device, value.requires_grad
    if isinstance(value, tuple):
        return tuple(likeness(item) for item in value)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr
    return type(value), value
