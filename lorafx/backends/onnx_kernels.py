"""Operators of an exported graph that ONNX Runtime computes faster apart than fused, or only apart, or not at all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

#: Norms over a sum, and the norm alone.
_SKIPPING = {
    "SkipLayerNormalization": "LayerNormalization",
    "SkipSimplifiedLayerNormalization": "SimplifiedLayerNormalization",
}


def suit(model: ir.Model, provider: str) -> None:
    """Keep those of transformers' fusions that ONNX Runtime computes with ``provider``, in their fastest form; in
    place. In a graph that generates, a step is short, so idle operators are worth removing too.
    """
    unfuse_batch_transposes(model)
    unfuse_mixed_norms(model)
    drop_idle_reshapes(model)
    if provider == "cpu":
        unfuse_skip_norms(model)
        turn_weights_once(model)


def unfuse_skip_norms(model: ir.Model) -> int:
    """Put each ``SkipLayerNormalization`` in fp32 back apart: ``LayerNormalization(Sum(x, skip, bias))``; in place.

    ONNX Runtime 1.31 takes about three times as long for the fused one on the CPU (``python -m
    benchmarks.skip_norms``). It would fuse an ``Add`` again while loading, a ``Sum`` it leaves alone. The norms without
    a mean (``SkipSimplifiedLayerNormalization``) stay: they gain little or lose.

    Returns:
        how many were put apart; one whose statistics are read is left as it is
    """
    count = 0
    for graph in model.graphs():
        for node in list(graph):
            if node.op_type == "SkipLayerNormalization" and _is_plain(node):
                _put_apart(node)
                count += 1
    return count


def unfuse_mixed_norms(model: ir.Model) -> int:
    """Put each norm over a sum apart whose scale is of another dtype than the sum; in place.

    Such is a norm that a float16 model computes in float32 with a scale that float16 does not hold exactly (Gemma's one
    plus its weight). The norm alone takes both, fused with the sum ONNX Runtime refuses them. Returns how many; one
    whose statistics are read is left as it is.
    """
    count = 0
    for graph in model.graphs():
        for node in list(graph):
            if node.op_type in _SKIPPING and not _reads_statistics(node):
                known = {one.dtype for one in (node.inputs[0], node.inputs[2]) if one is not None} - {None}
                if len(known) > 1:
                    _put_apart(node)
                    count += 1
    return count


def unfuse_batch_transposes(model: ir.Model) -> int:
    """Take the transposition of batches out of each ``FusedMatMul`` that ONNX Runtime refuses with it; in place.

    Its operands have to be of one rank then, three or more; the converter's fusion does not look. Returns how many.
    """
    count = 0
    for graph in model.graphs():
        for node in list(graph):
            ranks = {None if value is None or value.shape is None else value.shape.rank() for value in node.inputs}
            if node.op_type == "FusedMatMul" and (len(ranks) > 1 or ranks <= {None, 1, 2}):
                count += sum(_take_transpose_out(node, side) for side in (0, 1))
    return count


def drop_idle_reshapes(model: ir.Model) -> int:
    """Take out each ``Reshape`` that gives back the shape that a chain of them began with; in place.

    Fusions take heads apart and put them together again around operators that want them together. Nothing is moved by
    it, but every operator costs ONNX Runtime some microseconds, and a decoder's step consists of little else. Sizes are
    the same where they are the same number, or the same symbol of the exporter. Returns how many went.
    """
    count = 0
    for graph in model.graphs():
        for node in list(graph):
            if node.op_type == "Reshape" and node.domain == "" and not node.outputs[0].is_graph_output():
                before = _same_shape_before(node)
                if before is not None:
                    node.outputs[0].replace_all_uses_with(before)
                    _remove(graph, node)
                    count += 1
        for node in reversed(list(graph)):  # what led there and is read by nothing else
            if node.op_type == "Reshape" and not any(out.uses() or out.is_graph_output() for out in node.outputs):
                _remove(graph, node)
                count += 1
    return count


def _remove(graph: ir.Graph, node: ir.Node) -> None:
    """Take out a node whose results are unused, and the constants that only it read."""
    read = [value for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for value in read:
        if value.is_initializer() and not value.uses():
            graph.initializers.pop(value.name or "", None)


def turn_weights_once(model: ir.Model) -> int:
    """Take out of each product the transposition of a weight, for ONNX Runtime to do when it loads the graph; in place.

    Such is a last layer that multiplies by the table of embeddings. ONNX Runtime packs the factor of a product for the
    CPU when it loads it, but not one that the product is to transpose. What depends on weights alone it computes then
    too, so that the turned weight is packed, and tokens are looked up in the table as it is: of a table stored turned
    they would be columns, and a prompt takes a cache line for each number of each token. Returns how many.
    """
    count = 0
    for graph in model.graphs():
        for node in list(graph):
            weight = turned_weight(node)
            if weight is not None and node.op_type == "FusedMatMul":
                turn = ir.node("Transpose", [weight], {"perm": [1, 0]})
                turn.outputs[0].type, shape = weight.type, weight.shape
                turn.outputs[0].shape = None if shape is None else ir.Shape(reversed(tuple(shape)))
                plain = ir.node("MatMul", [node.inputs[0], turn.outputs[0]], name=node.name)
                put_instead(graph, node, [turn, plain], plain.outputs)
                count += 1
    return count


def turned_weight(node: ir.Node) -> ir.Value | None:
    """The matrix among the weights by whose transpose a product multiplies, and does nothing else; None for others."""
    factor = node.inputs[1] if len(node.inputs) > 1 and node.op_type in ("MatMul", "FusedMatMul") else None
    if factor is not None and node.op_type == "MatMul":
        maker = factor.producer()
        perm = None if maker is None or maker.op_type != "Transpose" else maker.attributes.get_ints("perm")
        factor = maker.inputs[0] if maker is not None and tuple(perm or ()) == (1, 0) else None
    elif factor is not None:
        others = {name: node.attributes.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB")}
        alone = not any(others.values()) and node.attributes.get_float("alpha", 1.0) == 1.0
        factor = factor if alone and node.attributes.get_int("transB", 0) == 1 else None
    return factor if factor is not None and factor.is_initializer() and len(factor.shape or ()) == 2 else None


def turn_weights(model: ir.Model) -> None:
    """Multiply by the transpose of each :func:`turned_weight`, computed, for tools that look for weights; in place.

    What else reads a weight reads it as it is.
    """
    for graph in model.graphs():
        for node in list(graph):
            weight = turned_weight(node)
            if weight is not None and weight.const_value is not None:
                held = weight_of(graph, f"{weight.name}.T", weight.const_value.numpy().T)
                plain = ir.node("MatMul", [node.inputs[0], held], name=node.name)
                put_instead(graph, node, [plain], plain.outputs)
                for turn, _ in weight.uses():
                    if turn.op_type == "Transpose" and not any(
                        out.uses() or out.is_graph_output() for out in turn.outputs
                    ):
                        _remove(graph, turn)
                if not weight.uses():
                    graph.initializers.pop(weight.name or "", None)


def weight_of(graph: ir.Graph, name: str, value: np.ndarray) -> ir.Value:
    """A weight of a graph, which has it by that name if it has been asked for before (layers may share one)."""
    if name not in graph.initializers:
        held = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(value), name=name))
        held.dtype, held.shape = ir.DataType.from_numpy(value.dtype), ir.Shape(value.shape)
        graph.register_initializer(held)
    return graph.initializers[name]


def put_instead(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node], results: Sequence[ir.Value]) -> None:
    """Put nodes where ``node`` stands, and their results, of its results' types and shapes, where those are read."""
    for old, new in zip(node.outputs, results, strict=True):
        new.type, new.shape = old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, results)


def _same_shape_before(node: ir.Node) -> ir.Value | None:
    """The value that a chain of reshapes to ``node`` reads, if its shape is what ``node`` gives; the earliest such."""
    shape, found, value = _reshaped(node), None, node.inputs[0]
    while shape is not None and value is not None:
        if known_shape(value.shape) == shape:
            found = value
        above = value.producer()
        value = above.inputs[0] if above is not None and above.op_type == "Reshape" and above.domain == "" else None
    return found


def _reshaped(node: ir.Node) -> tuple[int | str, ...] | None:
    """The shape that a Reshape gives: as it is stated, or its input's first axes and numbers for all that is left."""
    value, wanted = node.inputs[0], node.inputs[1]
    stated, given = known_shape(node.outputs[0].shape), known_shape(value.shape) if value is not None else None
    if stated is not None or given is None or wanted is None or wanted.const_value is None:
        return stated
    target = wanted.const_value.numpy().tolist()
    kept = next((axis for axis, size in enumerate(target) if size), len(target))
    rest, asked = given[kept:], target[kept:]
    sizes = [size for size in rest if isinstance(size, int)]
    if node.attributes.get_int("allowzero", 0) or 0 in asked or not rest or len(sizes) < len(rest):
        return None
    others = math.prod(size for size in asked if size > 0)
    return (*given[:kept], *(math.prod(sizes) // others if size < 0 else size for size in asked))


def known_shape(shape: ir.Shape | None) -> tuple[int | str, ...] | None:
    """A shape whose sizes are all numbers or symbols of the exporter; None for others."""
    sizes = [] if shape is None else [size if isinstance(size, int) else size.value for size in shape]
    named = all(isinstance(size, int) or (size is not None and not size.startswith("unk_")) for size in sizes)
    return tuple(size for size in sizes if size is not None) if shape is not None and named else None


def _take_transpose_out(node: ir.Node, side: int) -> bool:
    name, value = ("transBatchA", "transBatchB")[side], node.inputs[side]
    if not node.attributes.get_int(name, 0) or value is None or value.shape is None:
        return False
    rank = value.shape.rank()
    turn = ir.node("Transpose", [value], {"perm": [*range(1, rank - 1), 0, rank - 1]})
    turn.outputs[0].type = value.type
    turn.outputs[0].shape = ir.Shape([value.shape[axis] for axis in (*range(1, rank - 1), 0, rank - 1)])
    assert node.graph is not None
    node.graph.insert_before(node, turn)
    node.replace_input_with(side, turn.outputs[0])
    node.attributes[name] = ir.AttrInt64(name, 0)
    return True


def _is_plain(node: ir.Node) -> bool:
    scale = node.inputs[2]
    return scale is not None and scale.dtype is ir.DataType.FLOAT and not _reads_statistics(node)


def _reads_statistics(node: ir.Node) -> bool:
    return any(value.uses() or value.is_graph_output() for value in node.outputs[1:3])


def _put_apart(node: ir.Node) -> None:
    centred = node.op_type == "SkipLayerNormalization"
    value, skip, scale, *rest = (*node.inputs, None, None)
    shift, bias = rest[:2] if centred else (None, rest[0])
    total = ir.node("Sum", [part for part in (value, skip, bias) if part is not None])
    attributes = {"axis": -1, "epsilon": node.attributes.get_float("epsilon", 1e-12)}
    norm = ir.node(_SKIPPING[node.op_type], [total.outputs[0], scale, *([shift] if centred else [])], attributes)
    old, new = [node.outputs[0], *node.outputs[3:4]], [norm.outputs[0], total.outputs[0]]
    for after, like in zip(new, (node.outputs[0], value), strict=True):
        after.type, after.shape = like.type if like is not None else None, node.outputs[0].shape
    assert node.graph is not None
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], [total, norm], old, new[: len(old)])
