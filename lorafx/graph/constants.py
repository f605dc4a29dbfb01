"""Constant subgraphs: values that operators compute from tensors of the program alone."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .effects import writers, writes
from .inner import body, inner_graph, interpret
from .operands import node_at, operator_of
from .site import WEIGHT_OPS
from .tree import get_tensor, has_tensor, tensor_hash

_WITHOUT_GRADIENTS = torch.ops.higher_order.wrap_with_set_grad_enabled
#: Two computations of one fp64 value, relative to the largest: some thousand roundings, each of 1e-16.
_ROUNDING = 1e-12


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
    """``target`` and everything it is computed from, each once and after its operands, leaving out what is ``known``.

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
    """The value of ``target``: ``compute(node, values)`` for everything it is computed from, each once, operands first.

    A value is dropped after its last use.
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
            table of relative positions that goes through the query projection, say); its result is not a constant then
    """

    def __init__(self, root: nn.Module, activations: frozenset[str] = frozenset()):
        self.root = root
        self.activations = activations
        self._reads: dict[fx.Node, frozenset[str] | None] = {}
        self._writers: dict[fx.Graph, dict[fx.Node, list[fx.Node]]] = {}
        self._keys: dict[fx.Node, Hashable] = {}
        self._known: dict[Hashable, Hashable] = {}

    def reads(self, node: fx.Node) -> frozenset[str] | None:
        """Names of the tensors that ``node`` is computed from; None when it is not constant."""
        for behind in operands_first(node, _operands, self._reads):
            self._reads[behind] = self._find(behind)
        return self._reads[node]

    def _changing(self, node: fx.Node) -> dict[fx.Node, list[fx.Node]]:
        """What the graph around ``node`` changes in place, and by which nodes."""
        if node.graph not in self._writers:
            self._writers[node.graph] = writers(self.root, node.graph)
        return self._writers[node.graph]

    def _find(self, node: fx.Node) -> frozenset[str] | None:
        changing = self._changing(node)
        if node in changing and not self._is_overwritten(changing, node):
            return None
        if node.op == "get_attr":
            name = str(node.target)
            if has_tensor(self.root, name):
                return frozenset([name])
            return None if inner_graph(self.root, node) is None else frozenset()
        if not is_pure(node) and not self._is_region(node):
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
        return found if is_pure(node) or not writes(self.root, node) or self._is_steady(node) else None

    def _is_region(self, node: fx.Node) -> bool:
        """Whether the node runs a region without gradients whose operators all give the same each time."""
        called = body(self.root, node)
        if called is None or node.target is not _WITHOUT_GRADIENTS:
            return False
        calls = [inside for inside in called.module.graph.nodes if inside.op not in ("placeholder", "output")]
        return all(_is_repeatable(inside) for inside in calls)

    def _is_overwritten(self, changing: Mapping[fx.Node, list[fx.Node]], node: fx.Node) -> bool:
        """Whether the memory of a node is a tensor's that a region without gradients overwrites, and that is read by
        nothing else: operators after it read what that region gives."""
        (last, *others) = changing[node]
        alike = [other for other in changing if changing[other] is changing[node]]
        tensors = [other for other in alike if other.op == "get_attr"]
        return not others and self._is_region(last) and all(set(tensor.users) == {last} for tensor in tensors)

    def _is_steady(self, node: fx.Node) -> bool:
        """Whether a region that overwrites a tensor maps its own result to itself, up to rounding (a projection, say).
        Then its first result is that of every evaluation."""
        called = body(self.root, node)
        assert called is not None, "only regions are asked"
        given = [self.value(v, torch.float64) if isinstance(v, fx.Node) else v for _, v in called.operands]
        tensors = [value for value in given if isinstance(value, Tensor)]
        # Nothing is known about values on the meta device or computed later.
        if any(value.is_meta or type(value) not in (Tensor, nn.Parameter) for value in tensors):
            return False
        given = [value.clone() if isinstance(value, Tensor) else value for value in given]
        runs = []
        for _ in range(2):
            result = interpret(called.module.graph, given, partial(_converted, torch.float64))
            runs.append([value.clone() for value in pytree.tree_leaves((result, given)) if isinstance(value, Tensor)])
        return all(map(_same, *runs))

    def value(self, node: fx.Node, dtype: torch.dtype | None = None) -> Tensor:
        """The value of a constant node; computed on floating tensors converted to ``dtype``, when one is given."""

        def compute(node: fx.Node, values: Mapping[fx.Node, Tensor]) -> Tensor:
            module = inner_graph(self.root, node)
            if node.op == "get_attr":
                result: Any = get_tensor(self.root, str(node.target)).detach() if module is None else module
            elif called := body(self.root, node):
                given = [fx.map_arg(operand, values.__getitem__) for _, operand in called.operands]
                if writes(self.root, node):
                    given = [value.clone() if isinstance(value, Tensor) else value for value in given]
                result = interpret(called.module.graph, given, partial(_converted, dtype))
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                with torch.no_grad():
                    result = operator_of(node)(*args, **kwargs)
            return _converted(dtype, result)

        return computed(node, _operands, compute)

    def key(self, value: object) -> Hashable:
        """A key for a constant operand: equal keys are equal values. Short, however much the operand is computed
        from."""
        if not isinstance(value, fx.Node):
            return repr(value)
        for node in operands_first(value, _operands, self._keys):
            self._keys[node] = (
                self._held(str(node.target)) if node.op == "get_attr" else self.short(self._made_of(node))
            )
        return self._keys[value]

    def short(self, key: Hashable) -> Hashable:
        """A short key for ``key``, the same for equal ones, so that keys of keys stay flat."""
        return self._known.setdefault(key, ("made of", len(self._known)))

    def _held(self, name: str) -> Hashable:
        """A parameter is identified by its name; a buffer by its values, as a tracer lifts a constant at each use."""
        value = get_tensor(self.root, name) if has_tensor(self.root, name) else None
        if value is None or value.is_meta or isinstance(value, nn.Parameter):
            return name
        return self.short((value.dtype, tuple(value.shape), tensor_hash(value)))

    def _made_of(self, node: fx.Node) -> Hashable:
        def plain(value: object) -> Hashable:
            return self._keys[value] if isinstance(value, fx.Node) else repr(value)

        kwargs = sorted((name, plain(item)) for name, item in node.kwargs.items())
        return str(node.target), tuple(map(plain, node.args)), tuple(kwargs)


def _converted(dtype: torch.dtype | None, value: Any) -> Any:
    floating = dtype is not None and isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


def _is_repeatable(node: fx.Node) -> bool:
    """As :func:`is_pure`, or changes values in place, which :mod:`lorafx.graph.effects` follows."""
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded not in node.target.tags
    return is_pure(node)


def _same(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=0.0, atol=_ROUNDING * float(a.abs().max() if a.numel() else 0.0))


def _operands(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes
