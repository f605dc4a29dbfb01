"""What an ONNX file states besides the graph: nothing that its tensors contradict, nothing about the machine it was
made on, and operators by standard names.

Converters leave behind what was true at an earlier stage, and runtimes forgive it; ``onnx.checker``, shape inference
and the quantisers built on it do not.
"""

from __future__ import annotations

import onnx_ir as ir

#: Where in the author's files a node came from, as torch's converter notes it.
_TRACE = "pkg.torch.onnx.stack_trace"
#: The version of ONNX's operators that has ``RMSNormalization``.
_OPSET = 23
#: Operators whose meaning changed since version 21; all others only accept more types.
_CHANGED = "GroupNormalization"


def leave_out(model: ir.Model) -> None:
    """Drop types and shapes stated of constants, which the constants say themselves, and traces of files; call norms
    as ONNX does (:func:`name_norms`); in place.

    A tool that puts another tensor under a constant's name (ONNX Runtime's quantisers transpose the weights of
    ``Gemm``) does not look for a second statement of its shape.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            if not value.is_graph_input():
                value.type, value.shape = None, None
                value.metadata_props.clear()
        for node in graph:
            node.metadata_props.pop(_TRACE, None)
    name_norms(model)


def name_norms(model: ir.Model) -> int:
    """Call each ``SimplifiedLayerNormalization`` what ONNX calls it since version 23, ``RMSNormalization``; in place.

    ONNX Runtime keeps the former name, its own, among the standard operators, where no other tool knows it. Both are
    one kernel there. Returns how many; none in a graph that would mean something else by the newer version.

    A norm whose scale is of another dtype than its input keeps its name: ONNX Runtime 1.31 takes the standard one to
    pieces then, and they do not fit together.
    """
    nodes = [node for graph in model.graphs() for node in graph]
    plain = [node for node in nodes if node.op_type == "SimplifiedLayerNormalization" and node.domain == ""]
    plain = [node for node in plain if not any(value.uses() or value.is_graph_output() for value in node.outputs[1:])]
    plain = [node for node in plain if _dtype(node.inputs[0]) in (None, _dtype(node.inputs[1]))]
    if not plain or any(node.op_type == _CHANGED for node in nodes):
        return 0
    for node in plain:
        node.op_type = "RMSNormalization"
        node.resize_outputs(1)
    model.opset_imports[""] = max(_OPSET, model.opset_imports.get("", 0))
    return len(plain)


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    constant = None if value is None else value.const_value
    return constant.dtype if constant is not None else value.dtype if value is not None else None
