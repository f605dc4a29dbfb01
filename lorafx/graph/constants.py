"""Constant subgraphs: values that operators compute from tensors of the program alone."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from .effects import written
from .operands import node_at, operator_of
from .site import WEIGHT_OPS
from .tree import get_tensor, has_tensor, tensor_hash


def is_pure(node: fx.Node) -> bool:
    """Whether the operator gives the same value each time it runs, and changes nothing else."""
    if node.target is operator.getitem:  # one of an operator's results
        return True
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not random and not node.target._schema.is_mutable


T = TypeVar("T", bound=Hashable)
V = TypeVar("V")


def operands_first(target: T, operands: Callable[[T], Iterable[T]], known: Collection[T] = ()) -> Iterator[T]:
    """``target`` and all it is made of, each once and after its operands; without what is ``known``.

    Without recursion: a graph is deeper than the stack of calls.
    """
    stack, done = [target], set()
    while stack:
        node = stack[-1]
        settled = node in done or node in known
        waiting = [] if settled else [part for part in operands(node) if part not in done and part not in known]
        stack += waiting
        if not waiting:
            stack.pop()
            if not settled:
                done.add(node)
                yield node


def computed(target: T, operands: Callable[[T], Iterable[T]], compute: Callable[[T, Mapping[T, V]], V]) -> V:
    """The value of ``target``: ``compute(node, values)`` of all it is made of, each once, operands first.

    A value is dropped when it was read for the last time.
    """
    order = list(operands_first(target, operands))
    left = Counter(part for node in order for part in set(operands(node)))
    values: dict[T, V] = {}
    for node in order:
        values[node] = compute(node, values)
        for part in set(operands(node)):
            left[part] -= 1
            if not left[part]:
                del values[part]
    return values[target]


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
        self._keys: dict[fx.Node, Hashable] = {}
        self._known: dict[Hashable, Hashable] = {}

    def reads(self, node: fx.Node) -> frozenset[str] | None:
        """Names of the tensors that ``node`` is computed from; None when it is not constant."""
        for behind in operands_first(node, _operands, self._reads):
            self._reads[behind] = self._find(behind)
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
        if use is not None and (self._reads[node_at(node, use.input)] or frozenset()) & self.activations:
            return None
        found: frozenset[str] = frozenset()
        for value in node.all_input_nodes:
            read = self._reads[value]
            if read is None:
                return None
            found |= read
        return found

    def value(self, node: fx.Node, dtype: torch.dtype | None = None) -> Tensor:
        """The value of a constant node; computed on floating tensors converted to ``dtype``, when one is given."""

        def compute(node: fx.Node, values: Mapping[fx.Node, Tensor]) -> Tensor:
            if node.op == "get_attr":
                result: Any = get_tensor(self.root, str(node.target)).detach()
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                with torch.no_grad():
                    result = operator_of(node)(*args, **kwargs)
            floating = dtype is not None and isinstance(result, Tensor) and result.is_floating_point()
            return result.to(dtype) if floating else result

        return computed(node, _operands, compute)

    def key(self, value: object) -> Hashable:
        """What a constant operand is made of: equal keys are equal values. Short, however much it is made of."""
        if not isinstance(value, fx.Node):
            return repr(value)
        for node in operands_first(value, _operands, self._keys):
            self._keys[node] = (
                self._held(str(node.target)) if node.op == "get_attr" else self.short(self._made_of(node))
            )
        return self._keys[value]

    def short(self, key: Hashable) -> Hashable:
        """Another key for ``key``, the same for equal ones: keys of keys stay flat."""
        return self._known.setdefault(key, ("made of", len(self._known)))

    def _held(self, name: str) -> Hashable:
        """A parameter is known by its name; a buffer by its values, as a tracer lifts one constant from each use."""
        value = get_tensor(self.root, name) if has_tensor(self.root, name) else None
        if value is None or value.is_meta or isinstance(value, nn.Parameter):
            return name
        return self.short((value.dtype, tuple(value.shape), tensor_hash(value)))

    def _made_of(self, node: fx.Node) -> Hashable:
        def plain(value: object) -> Hashable:
            return self._keys[value] if isinstance(value, fx.Node) else repr(value)

        kwargs = sorted((name, plain(item)) for name, item in node.kwargs.items())
        return str(node.target), tuple(map(plain, node.args)), tuple(kwargs)


def _operands(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes
