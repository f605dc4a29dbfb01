"""How long weights and attention take on this machine, in ONNX Runtime: the table that a budget of latency reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from ..channels.costs import ATTENTION, CALL, shape_name
from ..errors import UsageError
from ..graph.operands import value_of
from ..parity.runner import PROVIDERS
from ..public import Program
from .exported import session_options

aten = torch.ops.aten

#: Shares of a weight's outputs, or of the heads, that are timed; the line through the times gives the price.
_WIDTHS = (0.25, 0.5, 0.75, 1.0)
_OPSET, _CONTRIB = 17, "com.microsoft"


def latency_table(
    program: Program, *, batch: int = 8, length: int = 64, threads: int | None = None, repeats: int = 15
) -> dict[str, float]:
    """Seconds that one number of a weight costs, by shape (``384x1536``, in x out), and one channel of attention.

    Times single operators at several widths, in turn, and fits a line: what a smaller width saves, and, under the same
    name with ``-call``, what a call costs that has no width at all.

    Args:
        program: whose weights and attention, inside its blocks
        batch, length: of the texts
        threads: CPU threads; torch's number without
        repeats: timed calls of each width

    Raises:
        UsageError: a program without linear layers or attention in its blocks
    """
    inside = [site for site in program.sites() if site.block is not None and site.kind in ("linear", "addmm")]
    shapes = {shape_name(site): (site.in_features, site.out_features) for site in inside}
    attention = program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    if not shapes or not attention:
        raise UsageError(f"{program.name}: no linear layers and attention in blocks, so there is nothing to time")
    threads = threads or torch.get_num_threads()
    table: dict[str, float] = {}
    for name, (ins, outs) in shapes.items():
        calls = [_product(batch * length, ins, n, threads) for n in _sizes(outs)]
        slope, table[name + CALL] = _line(calls, _sizes(outs), repeats)
        table[name] = slope / ins
    heads, width = (int(value_of(attention[0].args[0]).shape[dim]) for dim in (1, 3))
    calls = [_attention(batch, length, n, width, threads) for n in _sizes(heads)]
    slope, table[ATTENTION + CALL] = _line(calls, _sizes(heads), repeats)
    return {**table, ATTENTION: slope / width}


def _sizes(full: int) -> list[int]:
    return sorted({max(1, round(full * share)) for share in _WIDTHS})


def _line(calls: Sequence[Callable[[], Any]], sizes: Sequence[int], repeats: int) -> tuple[float, float]:
    """Seconds for each unit of size, and for a call of size 0: a line through the median times; never below 0."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        for own, call in zip(times, calls, strict=True):
            started = time.perf_counter()
            call()
            own.append(time.perf_counter() - started)
    middle = [median(own[1:]) for own in times]  # the first call allocates
    if len(sizes) == 1:
        return middle[0] / sizes[0], 0.0
    slope, start = np.polyfit(sizes, middle, 1)
    return max(0.0, float(slope)), max(0.0, float(start))


def _product(tokens: int, ins: int, outs: int, threads: int) -> Callable[[], Any]:
    """A linear layer of these sizes, ready to run."""
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((ins, outs), np.float32), "weight")
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    return _session([node], {"x": (tokens, ins)}, [weight], threads)


def _attention(batch: int, length: int, heads: int, width: int, threads: int) -> Callable[[], Any]:
    """Attention of that many heads, ready to run."""
    from onnx import helper

    node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["y"], domain=_CONTRIB, num_heads=heads)
    return _session([node], dict.fromkeys("qkv", (batch, length, heads * width)), [], threads)


def _session(
    nodes: list[Any], inputs: dict[str, tuple[int, ...]], weights: list[Any], threads: int
) -> Callable[[], Any]:
    import onnxruntime
    from onnx import TensorProto, helper

    declared = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "timed", declared, [result], weights)
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(threads), providers=[PROVIDERS["cpu"]]
    )
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape, np.float32) for name, shape in inputs.items()}
    return lambda: session.run(None, values)
