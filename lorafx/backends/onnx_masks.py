"""Remove what an attention mask computes although the result is known, where launching kernels takes the time.

Transformers' masks come from functions of places: an index that reads a tensor as it lies, a condition that always
holds, an expansion to the shape there is already. On a GPU each costs a microsecond or two of the two hundred that a
small encoder takes. Sizes are the same where they are the same number, or the same symbol of the exporter.
"""

from __future__ import annotations

from typing import TypeGuard

import numpy as np
import onnx_ir as ir

from .onnx_kernels import known_shape, put_instead, weight_of

FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)


def simplify_masks(graph: ir.Graph) -> None:
    """All of this file, in place."""
    read_as_it_lies(graph)
    drop_sure_conditions(graph)
    drop_idle_expansions(graph)
    cast_once(graph)
    choose_once(graph)


def read_as_it_lies(graph: ir.Graph) -> int:
    """Make of each ``GatherND`` that reads all of a tensor, in its order, axes of length one; in place; how many."""
    count = 0
    for node in list(graph):
        axes = _axes_beside(node) if is_a(node, "GatherND") and not node.attributes.get_int("batch_dims", 0) else None
        if axes is not None:
            put(graph, node, ir.node("Unsqueeze", [node.inputs[0], axes_of(graph, axes)]))
            count += 1
    return count


def drop_sure_conditions(graph: ir.Graph) -> int:
    """Take what is always true out of each ``And``, which leaves an expansion if it was larger; in place; how many."""
    count = 0
    for node in reversed(list(graph)):  # what is true of another And is seen before that is taken apart
        sure = [side for side in (0, 1) if _is_true(node.inputs[side])] if is_a(node, "And") else []
        if not sure:
            continue
        true, other, nodes = node.inputs[sure[0]], node.inputs[1 - sure[0]], list[ir.Node]()
        shape = _shape_of(graph, true, nodes)
        if other is not None and shape is not None:
            graph.insert_before(node, nodes)
            put(graph, node, ir.node("Expand", [other, shape]))
            count += 1
    return count


def drop_idle_expansions(graph: ir.Graph) -> int:
    """Take out each ``Expand`` to the shape there is already; in place; how many."""
    count = 0
    for node in list(graph):
        value = node.inputs[0] if is_a(node, "Expand") else None
        if value is None or node.outputs[0].is_graph_output():
            continue
        shape = known_shape(value.shape)
        if shape is not None and shape == known_shape(node.outputs[0].shape):
            node.outputs[0].replace_all_uses_with(value)
            graph.remove(node, safe=True)
            count += 1
    return count


def cast_once(graph: ir.Graph) -> int:
    """Take out casts that change nothing; in place; how many.

    They are those of a truth value by way of another type, and those of a count of truths that is asked whether it is
    below 1: rounded to another floating-point type it is below 1 where it was.
    """
    count = 0
    for node in list(graph):
        if is_a(node, "Cast"):
            source = _truth(node.inputs[0])
            if source is not None:
                node.replace_input_with(0, source)
                count += 1
        elif is_a(node, "Less") and _is_number(node.inputs[1], 1):
            counted = _uncast(node.inputs[0])
            total = producer(counted)
            truths = _truth(total.inputs[0]) if is_a(total, "ReduceSum") else None
            if truths is not None and counted is not node.inputs[0] and _same_type(counted, node.inputs[1]):
                node.replace_input_with(0, counted)
                count += 1
    return count


def choose_once(graph: ir.Graph) -> int:
    """Make of ``Cast(Not(truth)) * c`` a ``Where(truth, 0, c)``; in place; how many."""
    count = 0
    for node in list(graph):
        for side in (0, 1) if is_a(node, "Mul") else ():
            turned, chosen = producer(_truth(node.inputs[side])), node.inputs[1 - side]
            held = number(chosen)
            if is_a(turned, "Not") and held is not None and held.size == 1 and np.isfinite(held).all():
                zero = weight_of(graph, f"zero_{held.dtype}", np.zeros((), held.dtype))
                put(graph, node, ir.node("Where", [turned.inputs[0], zero, chosen]))
                count += 1
                break
    return count


# ---- an index that reads everything


def _axes_beside(node: ir.Node) -> list[int] | None:
    """The axes of length one of what a GatherND gives, if that is all it reads in the order it lies in."""
    data, indices = node.inputs
    joined = producer(indices)
    if data is None or indices is None or indices.shape is None or not is_a(joined, "Concat"):
        return None
    shape, given = known_shape(data.shape), known_shape(node.outputs[0].shape)
    last = joined.attributes.get_int("axis") in (-1, indices.shape.rank() - 1)
    if shape is None or given is None or not last or len(joined.inputs) != len(shape):
        return None
    found = [_counted_along(value) for value in joined.inputs]
    axes = [axis for axis in found if axis is not None]
    if len(axes) < len(found) or axes != sorted(set(axes)) or [given[axis] for axis in axes] != list(shape):
        return None
    ones = [axis for axis in range(len(given)) if axis not in axes]
    return ones if all(given[axis] == 1 for axis in ones) else None


def _counted_along(value: ir.Value | None) -> int | None:
    """The axis of a value that is how far along it a place lies, from 0: a range that was given axes and expanded."""
    node = producer(value)
    if value is None or value.shape is None or value.shape[-1] != 1 or not is_a(node, "Unsqueeze"):
        return None
    expanded = producer(node.inputs[0])
    source = expanded.inputs[0] if is_a(expanded, "Expand") else None
    shape, given = None if source is None else known_shape(source.shape), known_shape(value.shape)
    if shape is None or given is None or _range(source) is None or len(shape) != len(given) - 1:
        return None
    long = [axis for axis, size in enumerate(shape) if size != 1]
    return long[0] if len(long) == 1 and shape[long[0]] == given[long[0]] else None


def _range(value: ir.Value | None) -> ir.Node | None:
    """The ``Range`` of 0, 1, 2, … that a value is, axes of length one apart."""
    node = producer(value)
    while is_a(node, "Unsqueeze"):
        node = producer(node.inputs[0])
    counts = is_a(node, "Range") and _is_number(node.inputs[0], 0) and _is_number(node.inputs[2], 1)
    return node if counts else None


# ---- a condition that always holds


def _is_true(value: ir.Value | None) -> bool:
    """Whether a value is known to be true everywhere: a constant, or that places are at least 0."""
    held, node = number(value), producer(value)
    if held is not None:
        return bool(held.dtype == np.bool_ and held.all())
    if is_a(node, "And"):
        return all(_is_true(side) for side in node.inputs)
    if not is_a(node, "GreaterOrEqual"):
        return False
    least = number(node.inputs[1])
    return least is not None and least.size == 1 and bool((least <= 0).all()) and _range(node.inputs[0]) is not None


def _shape_of(graph: ir.Graph, value: ir.Value | None, nodes: list[ir.Node]) -> ir.Value | None:
    """The shape of a true value, from the length of the range it was made from; ``nodes`` get what computes it."""
    shape = None if value is None else known_shape(value.shape)
    symbols = {size for size in shape or () if isinstance(size, str)}
    counted = _ranges(value)
    if shape is None or len(symbols) > 1 or (symbols and len(counted) != 1):
        return None
    if not shape:
        return weight_of(graph, "shape_of_one", np.array([], np.int64))
    sizes: dict[int | str, ir.Value] = {size: size_of(graph, size) for size in shape if isinstance(size, int)}
    if symbols:
        length = ir.node("Reshape", [counted[0].inputs[1], size_of(graph, -1)])
        nodes.append(length)
        sizes[symbols.pop()] = length.outputs[0]
    nodes.append(ir.node("Concat", [sizes[size] for size in shape], {"axis": 0}))
    for node in nodes:
        node.outputs[0].dtype = ir.DataType.INT64
    return nodes[-1].outputs[0]


def _ranges(value: ir.Value | None) -> list[ir.Node]:
    """The ranges that a true value is made from."""
    node = producer(value)
    if is_a(node, "And"):
        return [found for side in node.inputs for found in _ranges(side)]
    found = _range(node.inputs[0]) if is_a(node, "GreaterOrEqual") else None
    return [] if found is None else [found]


# ---- casts


def _truth(value: ir.Value | None) -> ir.Value | None:
    """The truth value that a number was cast from."""
    node = producer(value)
    source = node.inputs[0] if is_a(node, "Cast") and value is not None and value.dtype in FLOATS else None
    return source if source is not None and source.dtype is ir.DataType.BOOL else None


def _uncast(value: ir.Value | None) -> ir.Value | None:
    """What a value was before casts between floating-point types."""
    node = producer(value)
    while value is not None and value.dtype in FLOATS and is_a(node, "Cast"):
        if node.inputs[0] is None or node.inputs[0].dtype not in FLOATS:
            break
        value = node.inputs[0]
        node = producer(value)
    return value


def _is_number(value: ir.Value | None, wanted: int) -> bool:
    held = number(value)
    return held is not None and held.size == 1 and bool((held == wanted).all())


def _same_type(first: ir.Value | None, second: ir.Value | None) -> bool:
    return first is not None and second is not None and first.dtype is second.dtype


# ---- graphs


def producer(value: ir.Value | None) -> ir.Node | None:
    """The node that gives a value."""
    return None if value is None else value.producer()


def is_a(node: ir.Node | None, kind: str, domain: str = "") -> TypeGuard[ir.Node]:
    """Whether a node is there and of this operator."""
    return node is not None and node.op_type == kind and node.domain == domain


def number(value: ir.Value | None) -> np.ndarray | None:
    """A constant's value."""
    held = None if value is None else value.const_value
    return None if held is None else held.numpy()


def axes_of(graph: ir.Graph, axes: list[int]) -> ir.Value:
    """Numbers of axes, as operators take them."""
    return weight_of(graph, "axes_" + "_".join(map(str, axes)), np.array(axes, np.int64))


def size_of(graph: ir.Graph, size: int) -> ir.Value:
    """A size as a shape of one number."""
    return weight_of(graph, f"size_{size}", np.array([size], np.int64))


def put(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """``new`` for ``old``, of one result each."""
    put_instead(graph, old, [new], new.outputs)
