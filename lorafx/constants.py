"""Constant subgraphs: values that operators compute from tensors of the program alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from .effects import written
from .site import WEIGHT_OPS
from .tree import get_tensor, has_tensor


def is_pure(node: fx.Node) -> bool:
    """Whether the operator gives the same value each time it runs, and changes nothing else."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not random and not node.target._schema.is_mutable


class Constants:
    """Which nodes are constant, what they read, and their values.

    Args:
        root: where the tensors are
        activations: names of tensors from which a weight operator computes an activation, though a constant one (a
            table of relative positions that goes through the query projection, say); its result is no constant then
    """

    def __init__(self, root: nn.Module, activations: frozenset[str] = frozenset()):
        self.root = root
        self.activations = activations
        self._reads: dict[fx.Node, frozenset[str] | None] = {}
        self._changing: dict[fx.Graph, frozenset[fx.Node]] = {}

    def reads(self, node: fx.Node) -> frozenset[str] | None:
        """Names of the tensors that ``node`` is computed from; None when it is not constant."""
        if node not in self._reads:
            self._reads[node] = self._find(node)
        return self._reads[node]

    def _is_changed(self, node: fx.Node) -> bool:
        """Whether something in the graph writes to the node's value."""
        if node.graph not in self._changing:
            self._changing[node.graph] = written(node.graph)
        return node in self._changing[node.graph]

    def _find(self, node: fx.Node) -> frozenset[str] | None:
        if self._is_changed(node):
            return None
        if node.op == "get_attr":
            name = str(node.target)  # a name without a tensor stands for an inner graph
            return frozenset([name]) if has_tensor(self.root, name) else None
        if not is_pure(node):
            return None
        use = WEIGHT_OPS.get(node.target)
        if use is not None and (self.reads(node.args[use.input]) or frozenset()) & self.activations:  # type: ignore
            return None
        found: frozenset[str] = frozenset()
        for value in node.all_input_nodes:
            read = self.reads(value)
            if read is None:
                return None
            found |= read
        return found

    def value(self, node: fx.Node, dtype: torch.dtype | None = None) -> Tensor:
        """The value of a constant node; computed on floating tensors converted to ``dtype``, when one is given."""

        def convert(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

        if node.op == "get_attr":
            return convert(get_tensor(self.root, str(node.target)).detach())
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.value(n, dtype))
        with torch.no_grad():
            result: Any = node.target(*args, **kwargs)  # type: ignore[operator]
        return convert(result)

    def key(self, value: object) -> object:
        """What a constant operand is made of: equal keys are equal values."""
        if not isinstance(value, fx.Node):
            return repr(value)
        if value.op == "get_attr":
            return str(value.target)
        kwargs = sorted((name, self.key(item)) for name, item in value.kwargs.items())
        return (str(value.target), tuple(map(self.key, value.args)), tuple(kwargs))
