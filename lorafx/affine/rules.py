"""How each operator changes an affine map: one rule per operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.operands import rank_of, same_size
from ..graph.site import WEIGHT_OPS, WeightOp, is_tensor_node
from .joined import join, scatter
from .regions import AffineAnalysis, Bypass, Operand, Origin, Region, Rule, origin
from .spread import spread
from .spread_rules import LAYOUTS, VIEWS
from .values import Value, added, applied, block_diagonal, repeated, scaled, shifted

aten = torch.ops.aten

#: Operators that cast their operand; that return it unchanged; products with a factor.
CASTS = (aten.to.dtype, aten._to_copy.default)
SAME = (*CASTS, aten.clone.default, aten.contiguous.default, aten.alias.default)
MULTIPLIED = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


def _extend(region: Region, node: fx.Node, operand: Operand | None, compose: Callable[[Value], Value]) -> Region:
    """``region`` followed by ``node``, with or without a constant operand; without, the node may stay between origin
    and carrier."""
    return replace(
        region,
        root=node,
        nodes=region.nodes | {node},
        reads=region.reads | operand.reads if operand else region.reads,
        bypass=_passed(region.bypass, node, region.root) if operand else region.bypass,
        key=(str(node.target), operand and operand.key, region.key),
        parts=(region,),
        compose=compose,
    )


def _passed(bypass: Bypass, node: fx.Node, kept: fx.Node) -> Bypass:
    """The bypass of a region extended by ``node``."""
    place = next(index for index, value in enumerate(node.args) if value is kept)
    return None if bypass is None else (*bypass, (node, node, place))


def _per_feature(node: fx.Node, operand: object, axis: int) -> bool:
    """Whether a constant operand is one number, or one number for each feature, broadcast over everything else."""
    if not isinstance(operand, fx.Node) or operand.meta["val"].numel() == 1:
        return True
    if node.meta["val"].dim() <= axis:
        return False
    shape = operand.meta["val"].shape
    features = node.meta["val"].shape[axis]
    if not isinstance(features, int):
        return False
    distance = 1 if axis == -1 else node.meta["val"].dim() - axis
    return shape.numel() == features and len(shape) >= distance and shape[-distance] == features


# ---- one rule per operator; each yields the regions that end in the node


def _weight(analysis: AffineAnalysis, node: fx.Node) -> Iterator[Region]:
    use = WEIGHT_OPS[node.target]
    weight, value = node.args[use.weight], node.args[use.input]
    bias = node.args[use.bias] if use.bias is not None and len(node.args) > use.bias else None
    read, shift = analysis.constant(weight), analysis.constant(bias)
    if node.kwargs or read is None or (bias is not None and shift is None) or not isinstance(value, fx.Node):
        return
    if isinstance(bias, fx.Node) and tuple(bias.meta["val"].shape) != (_features(node, _axis(use.kind)),):
        return  # an addmm may add a matrix, too
    geometry, groups = _geometry(node, weight), groups_of(node)
    if use.kind == "embedding":
        origins = iter([origin(value, "onehot", -1)])
    elif geometry:
        origins = _patches(analysis, value, geometry, groups)
    else:
        origins = analysis.inputs(value, -1)
    own = partial(_matrix, use, groups, read.value, shift and shift.value)
    for inner in origins:
        # It must stand where the map begins: what comes before it has to go, and no other kind of weight fits there.
        fits = not inner.nodes or (inner.origin.kind != "onehot" and inner.origin.geometry == geometry)
        first = inner.carrier is None and inner.bypass is not None and fits
        takes_over = first and is_tensor_node(weight)  # only a weight that is one tensor can become another
        yield Region(
            node,
            inner.origin,
            _axis(use.kind),
            inner.nodes | {node},
            inner.reads | read.reads | (shift.reads if shift else frozenset()),
            node if takes_over else inner.carrier,
            inner.bypass if takes_over else _passed(inner.bypass, node, value),
            (use.kind, read.key, shift and shift.key, geometry, groups, inner.key),
            (inner,),
            partial(applied, own),
            inner.shifts or bias is not None,
            math.gcd(groups, inner.groups),
        )


def _axis(kind: str) -> int:
    return 1 if kind.startswith("conv") else -1


def _product(analysis: AffineAnalysis, node: fx.Node) -> Iterator[Region]:
    """``x @ C`` with a constant matrix: a linear map that is not a weight of the model."""
    value, matrix = node.args[:2]
    read = analysis.constant(matrix)
    if read is None or not isinstance(value, fx.Node) or rank_of(matrix) != 2:
        return
    own = partial(_matrix, WEIGHT_OPS[aten.addmm.default], 1, read.value, None)
    for inner in analysis.inputs(value, -1):
        yield replace(_extend(inner, node, read, partial(applied, own)), groups=1)


def groups_of(node: fx.Node) -> int:
    """How many equal diagonal blocks a weight operator's matrix has: a convolution's groups."""
    last = node.args[6] if WEIGHT_OPS[node.target].kind.startswith("conv") and len(node.args) > 6 else 1
    return last if isinstance(last, int) else 1


def _geometry(node: fx.Node, weight: Any) -> tuple[Any, ...]:
    """Which patches a convolution sees: kernel, stride, padding and dilation along each axis; () of other operators."""
    if not WEIGHT_OPS[node.target].kind.startswith("conv"):
        return ()
    kernel = tuple(weight.meta["val"].shape[2:])
    given = (*node.args[3:6], *(1, 0, 1)[max(len(node.args) - 3, 0) :])
    spans = (part if isinstance(part, (list, tuple)) else [part] for part in given)
    return kernel, *(tuple(part) * (len(kernel) if len(part) == 1 else 1) for part in spans)


def _patches(
    analysis: AffineAnalysis, value: fx.Node, geometry: tuple[tuple[int, ...], ...], groups: int
) -> Iterator[Region]:
    """The patches of a value; of what it is a factor a channel of; and a value itself, if that is all a patch sees."""
    kernel, stride, padding, _ = geometry
    if rank_of(value) != len(kernel) + 2:
        return  # an image without a batch has its channels elsewhere
    for inner in _channels(analysis, value):
        seen = partial(repeated, math.prod(kernel))
        patches = Origin("patches", inner.origin.node, geometry)
        yield replace(inner, origin=patches, key=("patches", inner.key), parts=(inner,), compose=seen)
    if {*kernel, *stride} == {1} and {*padding} == {0}:
        yield from (region for region in analysis.regions(value) if region.axis == 1)


def _channels(analysis: AffineAnalysis, value: fx.Node) -> Iterator[Region]:
    """``value`` by itself, then as a factor a channel of what it was before operators multiplied it."""
    yield origin(value, "value", 1)
    if value.target in MULTIPLIED:
        for before, read, factor in _factors(analysis, value):
            if _per_feature(value, read, 1):
                for inner in _channels(analysis, before):
                    yield _extend(inner, value, factor, partial(scaled, factor.value, _features(value, 1)))
    elif value.target in SAME and isinstance(value.args[0], fx.Node) and _same_shape(value, value.args[0]):
        for inner in _channels(analysis, value.args[0]):
            yield _extend(inner, value, None, lambda same: same)


def _matrix(
    use: WeightOp, groups: int, weight: Callable[[], Tensor], bias: Callable[[], Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    matrix = use.matrix(weight())
    return block_diagonal(matrix, groups), bias() if bias is not None else None


def _factors(analysis: AffineAnalysis, node: fx.Node) -> Iterator[tuple[fx.Node, object, Operand]]:
    """What a product multiplies, which operand is the factor, and the factor."""
    first, second = node.args[:2]
    commutes = node.target in (aten.mul.Tensor, aten.mul.Scalar)
    for value, operand in ((first, second), (second, first)) if commutes else ((first, second),):
        read = analysis.constant(operand)
        if read is not None and isinstance(value, fx.Node) and _same_shape(node, value):
            yield value, operand, read if commutes else replace(read, value=partial(_reciprocal, read.value))


def _multiply(analysis: AffineAnalysis, node: fx.Node) -> Iterator[Region]:
    for value, operand, factor in _factors(analysis, node):
        for axis in (-1, 1):
            if _per_feature(node, operand, axis):
                for region in analysis.inputs(value, axis):
                    yield _extend(region, node, factor, partial(scaled, factor.value, _features(node, axis)))


def _reciprocal(read: Callable[[], Tensor]) -> Tensor:
    return read().reciprocal()


def _features(node: fx.Node, axis: int) -> int:
    size = node.meta["val"].shape[axis]
    return size if isinstance(size, int) else 0


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    left, right = a.meta.get("val"), b.meta.get("val")
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return False
    return left.dim() == right.dim() and all(map(same_size, left.shape, right.shape))


def _add(analysis: AffineAnalysis, node: fx.Node) -> Iterator[Region]:
    first, second = node.args[:2]
    sign = -1.0 if node.target == aten.sub.Tensor else 1.0
    if node.kwargs or not isinstance(first, fx.Node):
        return
    # Two constants may be two maps of one constant, as when relative positions go through a projection.
    sums = list(_sums(analysis, node, first, second, sign))
    yield from sums
    if not sums:
        yield from _shifts(analysis, node, first, second, sign)
        if sign > 0:
            yield from _shifts(analysis, node, second, first, sign)


def _shifts(analysis: AffineAnalysis, node: fx.Node, value: Any, operand: Any, sign: float) -> Iterator[Region]:
    read = analysis.constant(operand)
    if read is None or not isinstance(value, fx.Node) or not _same_shape(node, value):
        return
    for axis in (-1, 1):
        if _per_feature(node, operand, axis):
            for region in analysis.inputs(value, axis):
                sum_ = partial(shifted, read.value, _features(node, axis), sign)
                yield replace(_extend(region, node, read, sum_), shifts=True)


def _sums(analysis: AffineAnalysis, node: fx.Node, first: Any, second: Any, sign: float) -> Iterator[Region]:
    if not isinstance(second, fx.Node) or not _same_shape(first, second):
        return
    for left in analysis.regions(first):
        for right in analysis.regions(second):
            if left.origin == right.origin and left.axis == right.axis:
                for way in _ways(left, right, _features(node, left.axis), sign):
                    yield _sum(analysis, node, left, right, sign, way)


def _ways(left: Region, right: Region, size: int, sign: float) -> list[Region | None]:
    """The operands that may carry a sum: those that apply a weight in one step, which a low-rank branch's first factor
    does not; this analysis does not know which of two is the base's. Without one, what follows may take over, if it
    comes past one side."""
    sides = [r for r in (left, right) if r.carrier is not None and carrier_features(r.carrier) == size]
    sides = [r for r in sides if sign > 0 or r is not right]
    return [*sides] or [next((r for r in (left, right) if r.carrier is None), None)]


def _sum(
    analysis: AffineAnalysis, node: fx.Node, left: Region, right: Region, sign: float, way: Region | None
) -> Region:
    size = _features(node, left.axis)
    return Region(
        node,
        left.origin,
        left.axis,
        left.nodes | right.nodes | {node},
        left.reads | right.reads,
        way.carrier if way else None,
        _passed(way.bypass, node, way.root) if way else None,
        (str(node.target), left.key, right.key),
        (left, right),
        partial(added, size, sign, analysis.device),
        left.shifts or right.shifts,
        math.gcd(left.groups, right.groups),
    )


def carrier_features(carrier: fx.Node) -> int:
    """How many features a weight operator gives."""
    use = WEIGHT_OPS[carrier.target]
    weight = carrier.args[use.weight]
    assert isinstance(weight, fx.Node)
    return use.size(weight.meta["val"].shape)[0]


def _zeros(analysis: AffineAnalysis, node: fx.Node) -> Iterator[Region]:
    """Zeros of a value's shape, which a sum may start from: the value times 0."""
    value, zero = node.args[0], analysis.constant(0.0)
    if isinstance(value, fx.Node) and _same_shape(node, value) and zero is not None:
        for axis in (-1, 1):
            for region in analysis.inputs(value, axis):
                yield _extend(region, node, zero, partial(scaled, zero.value, _features(node, axis)))


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
            yield _extend(region, node, None, lambda inner: inner)


def _view(analysis: AffineAnalysis, node: fx.Node) -> Iterator[Region]:
    yield from _transparent(analysis, node)
    yield from spread(analysis, node)


def _join(analysis: AffineAnalysis, node: fx.Node) -> Iterator[Region]:
    yield from spread(analysis, node)
    yield from join(analysis, node)


#: What the analysis knows of operators. Anything else ends a region.
RULES: dict[Any, Rule] = {
    **dict.fromkeys(LAYOUTS, spread),
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(WEIGHT_OPS, _weight),
    **dict.fromkeys(MULTIPLIED, _multiply),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _add),
    **dict.fromkeys((aten.matmul.default, aten.mm.default), _product),
    **dict.fromkeys(SAME, _transparent),
    aten.cat.default: _join,
    aten.scatter.src: scatter,
    aten.zeros_like.default: _zeros,
}
