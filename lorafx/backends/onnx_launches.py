"""Fewer operators for a GPU, where at small batches launching one takes longer than computing it.

What is joined is what ONNX Runtime's CUDA provider has one kernel for, or two for six. ONNX Runtime's own optimiser
joins such when it loads a graph, but only in the forms that older exporters write.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .onnx_kernels import drop_idle_reshapes, known_shape, weight_of
from .onnx_masks import axes_of, is_a, number, producer, put, simplify_masks

_CONTRIB = "com.microsoft"
#: The dtypes for which both operators have kernels.
_KERNELS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
#: Where norms have their shift.
_SHIFT = {"LayerNormalization": 2, "SkipLayerNormalization": 3}


def launch_less(model: ir.Model) -> None:
    """Leave of a graph for CUDA what has to be told: all of this file and of :mod:`.onnx_masks`, in place."""
    drop_idle_reshapes(model)
    for graph in model.graphs():
        simplify_masks(graph)
        move_ones_by_shape(graph)
        join_attentions(graph)
        shift_norms(graph)
        join_norms(graph)
    RemoveUnusedNodesPass()(model)


def join_attentions(graph: ir.Graph) -> int:
    """Make each attention and the packed product of its query, key and value one ``Attention``; in place.

    ``MultiHeadAttention(q + b_q, k + b_k, v + b_v, bias)`` of ``q, k, v = split(x W)`` is ``Attention(x, W, b, bias)``
    with widths of their own for query and key, and for value. Returns how many.
    """
    count = 0
    for node in list(graph):
        found = _projection(node) if is_a(node, "MultiHeadAttention", _CONTRIB) else None
        if found is None:
            continue
        held = {"qkv": found.weight, "qkv_bias": found.shift}
        inputs = [found.source, *(weight_of(graph, f"{found.name}.{key}", value) for key, value in held.items())]
        inputs += [] if found.bias is None else [None, None, found.bias]
        attributes: dict[str, Any] = {"num_heads": node.attributes.get_int("num_heads")}
        attributes["qkv_hidden_sizes"] = found.widths
        if "scale" in node.attributes:
            attributes["scale"] = node.attributes.get_float("scale")
        put(graph, node, ir.node("Attention", inputs, attributes, domain=_CONTRIB, name=node.name))
        count += 1
    return count


def shift_norms(graph: ir.Graph) -> int:
    """Move a vector that is added to what a norm gives, and nothing else reads, into the norm's shift; in place.

    A removed sublayer may leave such a constant. Returns how many.
    """
    count = 0
    for node in list(graph):
        for side in (0, 1) if is_a(node, "Add") else ():
            norm, vector = producer(node.inputs[side]), number(node.inputs[1 - side])
            shift = number(_shift(norm)) if _is_norm(norm) and _read_once(norm) else None
            if norm is None or shift is None or vector is None or node.outputs[0].is_graph_output():
                continue
            if vector.shape[-1:] != shift.shape or vector.size != shift.size or vector.ndim > 3:
                continue
            name = f"{node.name or node.outputs[0].name}.shift"
            norm.replace_input_with(_SHIFT[norm.op_type], weight_of(graph, name, shift + vector.reshape(-1)))
            node.outputs[0].replace_all_uses_with(norm.outputs[0])
            graph.remove(node, safe=True)
            count += 1
            break
    return count


def join_norms(graph: ir.Graph) -> int:
    """Make each ``LayerNormalization`` of the last axis, and the sum it reads, a ``SkipLayerNormalization``; in place.

    Also where the norm is of another, as around a sublayer that is gone, for that operator has the quicker kernel: the
    norm of x is that of x + x with four times the epsilon. Returns how many.
    """
    count = 0
    for node in list(graph):
        value = node.inputs[0] if is_a(node, "LayerNormalization") and len(node.inputs) == 3 else None
        if (
            value is None
            or value.dtype not in _KERNELS
            or node.inputs[1] is None
            or node.inputs[1].dtype != value.dtype
        ):
            continue
        shape = known_shape(value.shape)
        last = node.attributes.get_int("axis", -1) in (-1, 2)
        if shape is None or len(shape) != 3 or not last or len(node.outputs) != 1:
            continue
        parts, factor = _summands(value, shape), 1.0
        if parts is None and _is_norm(producer(value)):  # so that nothing can overflow
            parts, factor = (value, value), 4.0
        if parts is not None:
            attributes = {"epsilon": factor * node.attributes.get_float("epsilon", 1e-5)}
            inputs = [*parts, *node.inputs[1:]]
            put(graph, node, ir.node("SkipLayerNormalization", inputs, attributes, domain=_CONTRIB))
            count += 1
    return count


def move_ones_by_shape(graph: ir.Graph) -> int:
    """Make of each transposition that moves axes of length one alone a change of shape, which moves no data; in place.

    Returns how many.
    """
    count = 0
    for node in list(graph):
        value = node.inputs[0] if is_a(node, "Transpose") else None
        if value is None or value.shape is None or all(size == 1 for size in value.shape):
            continue
        order = list(node.attributes.get_ints("perm", tuple(reversed(range(value.shape.rank())))))
        kept = [axis for axis in order if value.shape[axis] != 1]
        if kept != sorted(kept):
            continue
        gone = [axis for axis in range(len(order)) if value.shape[axis] == 1]
        squeezed = ir.node("Squeeze", [value, axes_of(graph, gone)])
        squeezed.outputs[0].type = value.type
        squeezed.outputs[0].shape = ir.Shape([value.shape[axis] for axis in kept])
        graph.insert_before(node, squeezed)
        back = [place for place, axis in enumerate(order) if value.shape[axis] == 1]
        put(graph, node, ir.node("Unsqueeze", [squeezed.outputs[0], axes_of(graph, back)]))
        count += 1
    return count


# ---- an attention and what it reads


class _Part(NamedTuple):
    """A part of a packed product, and the vector that is added to it."""

    split: ir.Node
    place: int
    shift: np.ndarray | None


class _Projection(NamedTuple):
    """What gives an attention's query, key and value: ``split(source weight) + shift``, in widths of this order.

    ``bias`` is what the attention adds to its scores.
    """

    source: ir.Value
    weight: np.ndarray
    shift: np.ndarray
    widths: list[int]
    name: str
    bias: ir.Value | None


def _projection(node: ir.Node) -> _Projection | None:
    """The packed product that an attention reads; None where it reads others, or does more than ``Attention``."""
    query, key, value, *others = (*node.inputs, *[None] * 6)
    bias = others.pop(2)
    if any(other is not None for other in others) or len(node.outputs) != 1:
        return None
    if node.attributes.get_int("unidirectional", 0) or "mask_filter_value" in node.attributes:
        return None
    parts = [part for part in map(_part, (query, key, value)) if part is not None]
    if sorted(part.place for part in parts) != [0, 1, 2] or len({id(part.split) for part in parts}) != 1:
        return None
    packed = _packed(parts[0].split)
    if packed is None:
        return None
    source, name, columns = packed
    widths = [columns[part.place].shape[1] for part in parts]
    heads = node.attributes.get_int("num_heads")
    if widths[0] != widths[1] or any(width % heads for width in widths):
        return None
    weight = np.concatenate([columns[part.place] for part in parts], axis=1)
    # Zeros where nothing is added: ONNX Runtime 1.31 ends the process on the CPU if an Attention has no shift.
    zeros = (np.zeros(width, weight.dtype) for width in widths)
    shifts = [none if part.shift is None else part.shift for part, none in zip(parts, zeros, strict=True)]
    return _Projection(source, weight, np.concatenate(shifts), widths, name, bias)


def _part(value: ir.Value | None) -> _Part | None:
    """What part of a split in three a value is, with a vector added or without; None for others."""
    node, shift = producer(value), None
    if is_a(node, "Add"):
        vectors = [(side, held) for side in (0, 1) if (held := number(node.inputs[side])) is not None]
        if len(vectors) != 1 or vectors[0][1].ndim != 1:
            return None
        side, shift = vectors[0]
        value = node.inputs[1 - side]
        node = producer(value)
    if value is None or not is_a(node, "Split") or len(node.outputs) != 3:
        return None
    if shift is not None and (value.shape is None or value.shape[-1] != len(shift)):
        return None
    return _Part(node, list(node.outputs).index(value), shift)


def _packed(split: ir.Node) -> tuple[ir.Value, str, list[np.ndarray]] | None:
    """What a product reads that is split along its last axis, its weight's name, and that weight's columns by part."""
    product, sizes = producer(split.inputs[0]), number(split.inputs[1]) if len(split.inputs) > 1 else None
    if sizes is None or not is_a(product, "MatMul"):
        return None
    source, factor = product.inputs
    weight = number(factor)
    if source is None or factor is None or factor.dtype not in _KERNELS or weight is None or weight.ndim != 2:
        return None
    if source.shape is None or source.shape.rank() != 3 or split.attributes.get_int("axis", 0) not in (-1, 2):
        return None
    return source, str(factor.name), np.split(weight, np.cumsum(sizes)[:-1], axis=1)


# ---- norms


def _is_norm(node: ir.Node | None) -> TypeGuard[ir.Node]:
    return is_a(node, "LayerNormalization") or is_a(node, "SkipLayerNormalization", _CONTRIB)


def _shift(norm: ir.Node) -> ir.Value | None:
    place = _SHIFT[norm.op_type]
    return norm.inputs[place] if len(norm.inputs) > place else None


def _read_once(norm: ir.Node) -> bool:
    """Whether a norm's result has one reader, and its other results none."""
    readers = [len(tuple(value.uses())) + value.is_graph_output() for value in norm.outputs]
    return readers[0] == 1 and not any(readers[1:])


def _summands(value: ir.Value, shape: tuple[int | str, ...]) -> tuple[ir.Value, ir.Value] | None:
    """The two values that this is the sum of, if nothing else reads it; the second may be the same for all of a
    batch."""
    node = producer(value)
    if not is_a(node, "Add") or len(tuple(value.uses())) != 1 or value.is_graph_output():
        return None
    left, right = node.inputs
    if left is None or right is None:
        return None
    if known_shape(left.shape) != shape:
        left, right = right, left
    whole = known_shape(left.shape) == shape and known_shape(right.shape) in (shape, (1, *shape[1:]))
    return (left, right) if whole else None
