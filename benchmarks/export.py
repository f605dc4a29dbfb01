"""How long lorafx's ONNX export takes beside transformers' own on the same model, and whether they agree on operators.

    python -m benchmarks.export

MiniLM with LoRA on every linear layer: lorafx folds and converts;
transformers exports the base model. Interleaved, medians of pairs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from examples import assets


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of ``action`` and what it returned."""
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def main() -> None:
    """Measure and print the table."""
    import torch
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    import lorafx
    from lorafx.backends.replay import converted
    from lorafx.models.examples import dynamic_shapes
    from lorafx.passes.lora import Lora

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    base = lorafx.capture(assets.minilm(), task="text-classification", num_labels=2)
    program = lorafx.rewrite(base, [Lora(rank=8)])
    for name in program.names("adapter"):
        torch.nn.init.normal_(program.tensor(name), std=0.02)
    model: Any = base.source.model.eval()
    config = OnnxConfig(dynamic=True, dynamic_shapes=dynamic_shapes(model, base.example), ort_fusions="cpu")

    def ours() -> Any:
        return converted(lorafx.fold(program), "onnx", "cpu", None)

    def theirs() -> Any:
        return OnnxExporter().export(model, dict(base.example), config)

    pairs, operators = [], []
    with redirect_stdout(sys.stderr):
        for action in (ours, theirs):
            action()
        for _ in range(repeats):
            (a, first), (b, second) = timed(ours), timed(theirs)
            pairs.append((a, b))
            operators = [Counter(node.op_type for node in exported.program.graph) for exported in (first, second)]
    lorafx_s, transformers_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print("| lorafx: fold and export (s) | transformers: export (s) | ratio, median of pairs | same operators |")
    print("|---|---|---|---|")
    same = "yes" if operators[0] == operators[1] else "no"
    print(f"| {lorafx_s:.2f} | {transformers_s:.2f} | {ratio:.3f} | {same}: {sum(operators[0].values())} nodes |")


if __name__ == "__main__":
    main()
