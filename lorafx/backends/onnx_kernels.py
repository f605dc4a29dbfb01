"""Operators of an exported graph that ONNX Runtime computes faster apart than fused, or only apart, or not at all."""

from __future__ import annotations

import math

import onnx_ir as ir


def suit(model: ir.Model, provider: str) -> None:
    """Leave of transformers' fusions what ONNX Runtime computes with ``provider``, as it computes it fastest; in place.

    Of a graph that generates: its step is short, so that a table is worth turning and an idle operator is worth taking
    out.
    """
    unfuse_batch_transposes(model)
    drop_idle_reshapes(model)
    if provider == "cpu":
        unfuse_skip_norms(model)
        turn_tied_heads(model)


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
        for node in reversed(list(graph)):  # what led there and is read by nobody else
            if node.op_type == "Reshape" and not any(out.uses() or out.is_graph_output() for out in node.outputs):
                _remove(graph, node)
                count += 1
    return count


def _remove(graph: ir.Graph, node: ir.Node) -> None:
    """Take out a node that nobody reads, and the constants that only it read."""
    read = [value for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for value in read:
        if value.is_initializer() and not value.uses():
            graph.initializers.pop(value.name or "", None)


def turn_tied_heads(model: ir.Model) -> int:
    """Keep a table of embeddings that is also a last layer's weight as that layer multiplies by it; in place.

    ONNX Runtime packs the factor of a product for the CPU when it loads it, but not one that is to be transposed, and
    the largest product of a small decoder is slower then. So the table is stored transposed, and the few rows that are
    looked up are columns of it. Returns how many tables were turned; one that anything else reads is left as it is.
    """
    count = 0
    for table in list(model.graph.initializers.values()):
        lookups, products = [], []
        for use in table.uses():
            if _looks_up(use.node, use.idx):
                lookups.append(use.node)
            elif _multiplies(use.node, use.idx):
                products.append(use.node)
        if lookups and products and len(lookups) + len(products) == len(table.uses()):
            _turn(model.graph, table, lookups, products)
            count += 1
    return count


def _looks_up(node: ir.Node, index: int) -> bool:
    ids = node.inputs[1] if node.op_type == "Gather" else None
    known = ids is not None and ids.shape is not None
    return known and index == 0 and node.attributes.get_int("axis", 0) == 0


def _multiplies(node: ir.Node, index: int) -> bool:
    """Whether a node is a plain product with its second factor transposed."""
    others = {name: node.attributes.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB")}
    alone = not any(others.values()) and node.attributes.get_float("alpha", 1.0) == 1.0
    return node.op_type == "FusedMatMul" and index == 1 and alone and node.attributes.get_int("transB", 0) == 1


def _turn(graph: ir.Graph, table: ir.Value, lookups: list[ir.Node], products: list[ir.Node]) -> None:
    held = table.const_value
    assert held is not None
    assert table.name is not None
    turned = ir.Value(name=table.name, type=table.type, const_value=ir.tensor(held.numpy().T.copy(), name=table.name))
    turned.shape = ir.Shape(reversed(held.shape.numpy()))
    for node in products:
        plain = ir.node("MatMul", [node.inputs[0], turned], name=node.name)
        _put_instead(graph, node, [plain], plain.outputs[0])
    for node in lookups:
        ids, rank = node.inputs[1], _rank(node)
        columns = ir.node("Gather", [turned, ids], {"axis": 1}, name=node.name)
        columns.outputs[0].type = table.type
        rows = ir.node("Transpose", [columns.outputs[0]], {"perm": [*range(1, rank), 0]})
        _put_instead(graph, node, [columns, rows], rows.outputs[0])
    graph.initializers.pop(table.name)
    graph.register_initializer(turned)


def _rank(lookup: ir.Node) -> int:
    ids = lookup.inputs[1]
    assert ids is not None
    assert ids.shape is not None
    return ids.shape.rank() + 1


def _put_instead(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node], result: ir.Value) -> None:
    old = node.outputs[0]
    result.type, result.shape = old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [old], [result])


def _same_shape_before(node: ir.Node) -> ir.Value | None:
    """The value that a chain of reshapes to ``node`` reads, if its shape is what ``node`` gives; the earliest such."""
    shape, found, value = _reshaped(node), None, node.inputs[0]
    while shape is not None and value is not None:
        if _known(value.shape) == shape:
            found = value
        above = value.producer()
        value = above.inputs[0] if above is not None and above.op_type == "Reshape" and above.domain == "" else None
    return found


def _reshaped(node: ir.Node) -> tuple[int | str, ...] | None:
    """The shape that a Reshape gives: as it is stated, or its input's first axes and numbers for all that is left."""
    value, wanted = node.inputs[0], node.inputs[1]
    stated, given = _known(node.outputs[0].shape), _known(value.shape) if value is not None else None
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


def _known(shape: ir.Shape | None) -> tuple[int | str, ...] | None:
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
    statistics = node.outputs[1:3]
    return (
        scale is not None
        and scale.dtype is ir.DataType.FLOAT
        and not any(value.uses() or value.is_graph_output() for value in statistics)
    )


def _put_apart(node: ir.Node) -> None:
    value, skip, scale, shift, bias = (*node.inputs, None, None)[:5]
    total = ir.node("Sum", [part for part in (value, skip, bias) if part is not None])
    attributes = {"axis": -1, "epsilon": node.attributes.get_float("epsilon", 1e-12)}
    norm = ir.node("LayerNormalization", [total.outputs[0], scale, shift], attributes)
    old, new = [node.outputs[0], *node.outputs[3:4]], [norm.outputs[0], total.outputs[0]]
    for after in new:
        after.type, after.shape = node.outputs[0].type, node.outputs[0].shape
    assert node.graph is not None
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], [total, norm], old, new[: len(old)])
