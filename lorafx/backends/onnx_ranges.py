"""Make an ONNX model refuse sizes that its graph is not right for, as the program it was made from does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..errors import UsageError
from ..graph.domain import Domain, Range


def hold_ranges(model: ir.Model, domain: Domain, limit: int | None) -> int:
    """Make ``model`` fail, with a node whose name says why, on sizes outside the ranges of ``domain``; in place.

    ONNX has no assertion. An index into a table of one zero does: it is 0 within the range and 1 outside, which every
    runtime refuses; the zero is added to the input, so that the node is run. ``limit`` is the number of positions of
    the model, the upper end that every text model has and its own tables hold.

    Returns:
        how many axes are checked

    Raises:
        UsageError: sizes are bound by a relation, or in an input that the model does not have
    """
    if domain.relations:
        raise UsageError(
            f"the graph holds where {domain.readable(domain.relations[0])}, which an ONNX model cannot check; capture "
            "with dynamic=False to export one size"
        )
    inputs = {value.name: value for value in model.graph.inputs}
    count = 0
    for name, allowed in domain.ranges.items():
        high = None if allowed.high == limit else allowed.high
        if allowed.low <= 1 and high is None:
            continue
        place = next((p for p in domain.places(name) if p[0] in inputs), None)
        if place is None:
            raise UsageError(f"the ONNX model has no input to hold {domain.readable(name)} to {allowed}")
        _hold(model.graph, inputs[place[0]], place[1], Range(allowed.low, high))
        count += 1
    return count


def _hold(graph: ir.Graph, value: ir.Value, axis: int, allowed: Range) -> None:
    readers = [(use.node, use.idx) for use in value.uses()]
    prefix = f"lorafx_{value.name}_{axis}"

    def constant(data: np.ndarray, what: str) -> ir.Value:
        made = ir.val(f"{prefix}_{what}", const_value=ir.tensor(data, name=f"{prefix}_{what}"))
        graph.register_initializer(made)
        return made

    nodes = [ir.node("Shape", [value], {"start": axis, "end": axis + 1})]
    outside = [ir.node("Less", [nodes[0].outputs[0], constant(np.array([allowed.low]), "low")])]
    if allowed.high is not None:
        outside.append(ir.node("Greater", [nodes[0].outputs[0], constant(np.array([allowed.high]), "high")]))
        outside.append(ir.node("Or", [node.outputs[0] for node in outside]))
    index = ir.node("Cast", [outside[-1].outputs[0]], {"to": ir.DataType.INT64})
    table = constant(np.zeros(1, dtype=np.int64), "table")
    name = f"dimension {axis} of input {value.name} has to be {allowed}"
    zero = ir.node("Gather", [table, index.outputs[0]], {"axis": 0}, name=name)
    cast = ir.node("Cast", [zero.outputs[0]], {"to": value.dtype})
    operator = "Or" if value.dtype is ir.DataType.BOOL else "Add"
    held = ir.node(operator, [value, cast.outputs[0]])
    held.outputs[0].type, held.outputs[0].shape = value.type, value.shape
    nodes += [*outside, index, zero, cast, held]
    for number, node in enumerate(nodes):
        node.name = node.name or f"{prefix}_{number}"
        for output in node.outputs:
            output.name = f"{prefix}_value_{number}"
    graph.insert_before(next(iter(graph)), nodes)
    for node, position in readers:
        node.replace_input_with(position, held.outputs[0])
