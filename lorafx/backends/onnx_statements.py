"""What an ONNX file says beside the graph: nothing that its tensors contradict, nothing of the machine it was made on.

Converters leave behind what was true at an earlier stage, and runtimes forgive it; ``onnx.checker``, shape inference
and the quantisers built on it do not.
"""

from __future__ import annotations

import onnx_ir as ir

#: Where in the author's files a node came from, as torch's converter notes it.
_TRACE = "pkg.torch.onnx.stack_trace"


def leave_out(model: ir.Model) -> None:
    """Drop types and shapes stated of constants, which the constants say themselves, and traces of files; in place.

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
