"""The norm over a residual sum in ONNX Runtime on the CPU: fused, and as Sum and LayerNormalization.

    python -m benchmarks.skip_norms

Six norms in a row with a bias, fp32; ``lorafx.backends.onnx_kernels`` puts them apart in every CPU export. The same for
the norm without a mean, which it leaves fused.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from lorafx.proof.bench import SHAPES
from lorafx.proof.exported import session_options

WIDTHS = (384, 768, 2048)
LAYERS = 6


def chain(width: int, mean: bool, fused: bool) -> ModelProto:
    """A model of norms in a row over (batch, length, width)."""
    simplified, domain = "" if mean else "Simplified", "com.microsoft"
    weights, nodes, value = ["scale", "shift"] if mean else ["scale"], [], "x"
    for layer in range(LAYERS):
        made, total = f"y{layer}", f"total{layer}"
        if fused:
            kind = f"Skip{simplified}LayerNormalization"
            nodes.append(helper.make_node(kind, [value, "skip", *weights, "bias"], [made], domain=domain))
        else:
            nodes.append(helper.make_node("Sum", [value, "skip", "bias"], [total]))
            nodes.append(helper.make_node(f"{simplified}LayerNormalization", [total, *weights], [made], axis=-1))
        value = made
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "l", width]) for name in ("x", "skip")]
    result = helper.make_tensor_value_info(value, TensorProto.FLOAT, ["b", "l", width])
    vectors = [numpy_helper.from_array(np.ones(width, np.float32), name) for name in (*weights, "bias")]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(domain, 1)]
    graph = helper.make_graph(nodes, "chain", given, [result], vectors)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def seconds(models: tuple[ModelProto, ModelProto], shape: tuple[int, int], width: int, repeats: int) -> list[float]:
    """The median time of one norm in each model; the models take turns."""
    values = np.random.default_rng(0).normal(size=(2, *shape, width)).astype(np.float32)
    feed = dict(zip(("x", "skip"), values, strict=True))
    open_, options, cpu = onnxruntime.InferenceSession, session_options(os.cpu_count() or 1), ["CPUExecutionProvider"]
    sessions = [open_(model.SerializeToString(), options, providers=cpu) for model in models]
    times: list[list[float]] = [[], []]
    for _ in range(repeats):
        for session, own in zip(sessions, times, strict=True):
            session.run(None, feed)  # warm again after the other
            started = time.perf_counter()
            session.run(None, feed)
            own.append((time.perf_counter() - started) / LAYERS)
    return [statistics.median(own) for own in times]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each model")
    repeats = parser.parse_args().repeats
    print("| norm | width | shape | fused (µs) | apart (µs) | ratio |\n|---|--:|---|--:|--:|--:|")
    for mean in (True, False):
        for width in WIDTHS:
            models = chain(width, mean, fused=True), chain(width, mean, fused=False)
            for shape in SHAPES:
                fused, apart = seconds(models, shape, width, repeats)
                name = "LayerNorm" if mean else "RMSNorm"
                sizes = "x".join(map(str, shape))
                print(f"| {name} | {width} | {sizes} | {fused * 1e6:.0f} | {apart * 1e6:.0f} | {fused / apart:.1f} |")


if __name__ == "__main__":
    main()
