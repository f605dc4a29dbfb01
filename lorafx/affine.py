"""Affine regions: parts of a graph that compute ``y = M x + c`` from one tensor, however many operators they take.

Adapters, gates and scalings around a linear layer are such regions, so merging them needs no knowledge of any method.
An embedding is affine in its one-hot index and a convolution in its patches, which makes all weights one case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from .site import WEIGHT_OPS, is_tensor_node
from .tree import get_tensor

aten = torch.ops.aten

#: A matrix (out, in), its diagonal when it is diagonal, or None for the identity; and an offset or None. All fp64.
Value = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Origin:
    """What a region is affine in: a node's value, its one-hot encoding, or its convolution patches."""

    kind: str
    node: fx.Node
    geometry: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Region:
    """A node's value as an affine map of an origin.

    Attributes:
        root: the node whose value this is
        origin: what it is affine in
        axis: the feature axis of the value: -1, or 1 (channels) after a convolution
        nodes: the operators of the region
        reads: names of the tensors it reads
        carrier: the operator that applies a full weight, which can take over the whole map; None when there is none
        bypass: operators on the carrier's way that become identities, each with the operand that stays
        key: what the map is made of; equal keys are equal maps
        evaluate: composes the map, in fp64
        shifts: whether the map has an offset
    """

    root: fx.Node
    origin: Origin
    axis: int
    nodes: frozenset[fx.Node]
    reads: frozenset[str]
    carrier: fx.Node | None
    bypass: tuple[tuple[fx.Node, fx.Node], ...]
    key: tuple[Any, ...]
    evaluate: Callable[[], Value]
    shifts: bool = False


def _origin(node: fx.Node, kind: str, axis: int, geometry: tuple[Any, ...] = ()) -> Region:
    """The identity map of an origin."""
    origin = Origin(kind, node, geometry)
    return Region(node, origin, axis, frozenset(), frozenset(), None, (), (kind,), lambda: (None, None))


def compose(outer: Tensor, inner: Tensor | None) -> Tensor:
    """The matrix product, with a diagonal or identity ``inner`` written as such."""
    if inner is None:
        return outer
    return outer * inner if inner.dim() == 1 else outer @ inner


def dense(matrix: Tensor | None, size: int) -> Tensor:
    """``matrix`` written out."""
    if matrix is None:
        return torch.eye(size, dtype=torch.float64)
    return torch.diag(matrix) if matrix.dim() == 1 else matrix


class AffineAnalysis:
    """Finds, for any node of a graph, the affine regions that end in it; nearest origin first."""

    #: A region never needs more nested origins than this; deeper ones could only be larger.
    depth = 8

    def __init__(self, root: nn.Module):
        self.root = root
        self._known: dict[fx.Node, list[Region]] = {}

    def regions(self, node: fx.Node) -> list[Region]:
        """The regions ending in ``node``: the same value as maps of ever more distant origins."""
        if node not in self._known:
            rule = _RULES.get(node.target)
            value = node.meta.get("val")
            float_tensor = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0
            found = list(rule(self, node))[: self.depth] if rule is not None and float_tensor else []
            self._known[node] = found
        return self._known[node]

    def inputs(self, node: fx.Node, axis: int) -> Iterator[Region]:
        """``node`` itself as an origin (features last), then the regions behind it with features on ``axis``."""
        if axis == -1:
            yield _origin(node, "value", axis)
        for region in self.regions(node):
            if region.axis == axis:
                yield region

    def constant(self, value: object) -> Callable[[], Tensor] | None:
        """A reader of a constant operand in fp64 (a number, or a tensor of the program); None when it is no constant."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return lambda: torch.tensor(float(value), dtype=torch.float64)
        if not is_tensor_node(value):
            return None
        assert isinstance(value, fx.Node)
        try:
            tensor = get_tensor(self.root, str(value.target))
        except KeyError:
            return None
        return (lambda: tensor.detach().double()) if tensor.is_floating_point() else None


def _name(value: object) -> tuple[Any, ...]:
    return (str(value.target),) if isinstance(value, fx.Node) else (value,)


def _reads(*values: object) -> frozenset[str]:
    return frozenset(str(value.target) for value in values if is_tensor_node(value))  # type: ignore[union-attr]


def _extend(region: Region, node: fx.Node, *operands: object, evaluate: Callable[[], Value]) -> Region:
    """``region`` followed by an elementwise ``node`` with constant ``operands``: the carrier's way goes straight on."""
    key = (str(node.target), *[part for value in operands for part in _name(value)], region.key)
    bypass = (*region.bypass, (node, region.root)) if operands else region.bypass
    nodes, reads = region.nodes | {node}, region.reads | _reads(*operands)
    return replace(region, root=node, nodes=nodes, reads=reads, bypass=bypass, key=key, evaluate=evaluate)


def _per_feature(node: fx.Node, operand: object, axis: int) -> bool:
    """Whether a constant operand is one number, or one number a feature, broadcast over everything else."""
    if not isinstance(operand, fx.Node):
        return True
    shape = operand.meta["val"].shape
    features = node.meta["val"].shape[axis]
    if shape.numel() == 1:
        return True
    distance = 1 if axis == -1 else node.meta["val"].dim() - axis
    return shape.numel() == features and len(shape) >= distance and shape[-distance] == features


# ---- one rule per operator; each yields the regions that end in the node


def _weight(analysis: AffineAnalysis, node: fx.Node) -> Iterator[Region]:
    use = WEIGHT_OPS[node.target]
    weight, value = node.args[use.weight], node.args[use.input]
    bias = node.args[use.bias] if use.bias is not None and len(node.args) > use.bias else None
    if node.kwargs or not is_tensor_node(weight) or not (bias is None or is_tensor_node(bias)):
        return
    read = analysis.constant(weight)
    if read is None or not isinstance(value, fx.Node):
        return
    geometry = tuple(node.args[3:]) if use.kind.startswith("conv") else ()
    own = partial(_matrix, use.kind, read, analysis.constant(bias))
    key = (use.kind, *_name(weight), *_name(bias))
    reads = _reads(weight, bias)
    if use.kind == "embedding":
        origins = iter([_origin(value, "onehot", -1)])
    elif use.kind.startswith("conv"):
        origins = _patches(analysis, node, value, weight, geometry)
    else:
        origins = analysis.inputs(value, -1)
    axis = 1 if use.kind.startswith("conv") else -1
    for inner in origins:
        carrier = inner.carrier or node
        bypass = (*inner.bypass, (node, value)) if inner.carrier is not None else inner.bypass
        yield Region(
            node,
            inner.origin,
            axis,
            inner.nodes | {node},
            inner.reads | reads,
            carrier,
            bypass,
            (*key, geometry, inner.key),
            partial(_apply, own, inner.evaluate),
            inner.shifts or bias is not None,
        )


def _patches(
    analysis: AffineAnalysis, node: fx.Node, value: fx.Node, weight: Any, geometry: tuple[Any, ...]
) -> Iterator[Region]:
    kernel = tuple(weight.meta["val"].shape[2:])
    groups = geometry[3] if len(geometry) > 3 else 1
    if groups != 1:
        return
    settings = (kernel, *[tuple(part) if isinstance(part, (list, tuple)) else part for part in geometry])
    yield _origin(value, "patches", 1, settings)
    pointwise = all(size == 1 for size in kernel) and all(_is(part, 1) for part in geometry[0:1])
    if pointwise and all(_is(part, 0) for part in geometry[1:2]):
        yield from (region for region in analysis.regions(value) if region.axis == 1)


def _is(part: Any, value: int) -> bool:
    return all(item == value for item in part) if isinstance(part, (list, tuple)) else part == value


def _matrix(kind: str, weight: Callable[[], Tensor], bias: Callable[[], Tensor] | None) -> tuple[Tensor, Tensor | None]:
    matrix = weight()
    if kind in ("addmm", "embedding"):
        matrix = matrix.t()
    return matrix.flatten(1), bias() if bias is not None else None


def _apply(own: Callable[[], tuple[Tensor, Tensor | None]], inner: Callable[[], Value]) -> Value:
    (matrix, bias), (m, c) = own(), inner()
    offset = None if c is None else matrix @ c
    if bias is not None:
        offset = bias if offset is None else offset + bias
    return compose(matrix, m), offset


def _scaled(factor: Callable[[], Tensor], inner: Callable[[], Value], size: int) -> Value:
    (m, c), f = inner(), factor().reshape(-1)
    if m is None:
        m = f.expand(size).clone()
    else:
        m = m * f if m.dim() == 1 else f[:, None] * m if f.numel() > 1 else m * f
    return m, None if c is None else c * f


def _shifted(shift: Callable[[], Tensor], inner: Callable[[], Value], size: int, sign: float) -> Value:
    m, c = inner()
    s = sign * shift().reshape(-1).expand(size)
    return m, s if c is None else c + s


def _multiply(analysis: AffineAnalysis, node: fx.Node) -> Iterator[Region]:
    first, second = node.args[:2]
    commutes = node.target in (aten.mul.Tensor, aten.mul.Scalar)
    for value, operand in ((first, second), (second, first)) if commutes else ((first, second),):
        read = analysis.constant(operand)
        if read is None or not isinstance(value, fx.Node) or is_tensor_node(value):
            continue
        factor = read if commutes else partial(_reciprocal, read)
        for axis in (-1, 1):
            for region in analysis.inputs(value, axis):
                if _same_shape(node, value) and _per_feature(node, operand, axis):
                    size = _features(node, axis)
                    scaled = partial(_scaled, factor, region.evaluate, size)
                    yield _extend(region, node, operand, evaluate=scaled)
        return


def _reciprocal(read: Callable[[], Tensor]) -> Tensor:
    return read().reciprocal()


def _features(node: fx.Node, axis: int) -> int:
    size = node.meta["val"].shape[axis]
    return size if isinstance(size, int) else 0


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return str(tuple(a.meta["val"].shape)) == str(tuple(b.meta["val"].shape))


def _add(analysis: AffineAnalysis, node: fx.Node) -> Iterator[Region]:
    first, second = node.args[:2]
    sign = -1.0 if node.target == aten.sub.Tensor else 1.0
    if node.kwargs or not isinstance(first, fx.Node):
        return
    if analysis.constant(first) is not None and sign > 0:
        first, second = second, first
    read = analysis.constant(second)
    if read is not None and isinstance(first, fx.Node):
        for axis in (-1, 1):
            for region in analysis.inputs(first, axis):
                if _same_shape(node, first) and _per_feature(node, second, axis):
                    shifted = partial(_shifted, read, region.evaluate, _features(node, axis), sign)
                    yield replace(_extend(region, node, second, evaluate=shifted), shifts=True)
        return
    if isinstance(first, fx.Node) and isinstance(second, fx.Node) and _same_shape(first, second):
        for left in analysis.regions(first):
            for right in analysis.regions(second):
                if left.origin == right.origin and left.axis == right.axis:
                    yield _sum(node, left, right, sign)


def _sum(node: fx.Node, left: Region, right: Region, sign: float) -> Region:
    # The carrier is the operand that applies its weight in one step; a low-rank branch's first factor is no carrier.
    size = _features(node, left.axis)
    sides = [r for r in (left, right) if r.carrier is not None and carrier_features(r.carrier) == size]
    sides.sort(key=lambda r: len(r.nodes))
    carrier = sides[0] if sides and not (sign < 0 and sides[0] is right) else None
    return Region(
        node,
        left.origin,
        left.axis,
        left.nodes | right.nodes | {node},
        left.reads | right.reads,
        carrier.carrier if carrier else None,
        (*carrier.bypass, (node, carrier.root)) if carrier else (),
        (str(node.target), left.key, right.key),
        partial(_added, left.evaluate, right.evaluate, size, sign),
        left.shifts or right.shifts,
    )


def carrier_features(carrier: fx.Node) -> int:
    """How many features a weight operator gives."""
    use = WEIGHT_OPS[carrier.target]
    weight = carrier.args[use.weight]
    assert isinstance(weight, fx.Node)
    return use.size(weight.meta["val"].shape)[0]


def _added(left: Callable[[], Value], right: Callable[[], Value], size: int, sign: float) -> Value:
    (m1, c1), (m2, c2) = left(), right()
    matrix = dense(m1, size) + sign * dense(m2, size)
    if c2 is None:
        return matrix, c1
    return matrix, sign * c2 if c1 is None else c1 + sign * c2


def _transparent(analysis: AffineAnalysis, node: fx.Node) -> Iterator[Region]:
    """Casts, copies and views of the leading axes: the map stays what it was."""
    value = node.args[0]
    if not isinstance(value, fx.Node) or not node.meta["val"].is_floating_point():
        return
    same = _same_shape(node, value)
    if not same and str(node.meta["val"].shape[-1]) != str(value.meta["val"].shape[-1]):
        return
    for axis in (-1, 1) if same else (-1,):
        for region in analysis.inputs(value, axis):
            yield _extend(region, node, evaluate=region.evaluate)


_RULES: dict[Any, Callable[[AffineAnalysis, fx.Node], Iterator[Region]]] = {
    **{op: _weight for op, use in WEIGHT_OPS.items() if use.kind in ("linear", "addmm", "embedding", "conv2d")},
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar), _multiply),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _add),
    **dict.fromkeys(
        (aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.alias.default)
        + (aten.view.default, aten.reshape.default, aten._unsafe_view.default),
        _transparent,
    ),
}
