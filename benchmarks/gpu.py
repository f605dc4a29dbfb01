"""Pruned models on a GPU: what ONNX Runtime's CUDA provider makes of them, in fp16, beside LoRA merged and PyTorch.

    python -m benchmarks.prune            # trains the models
    python -m benchmarks.gpu export       # writes their ONNX folders and the logits they owe; needs no GPU
    python -m benchmarks.gpu export --models fine:0.4 fine-coarse:0.4 --trained out/frontier   # benchmarks.frontier's
    python -m benchmarks.gpu time         # on a machine with a GPU; needs no lorafx, only onnxruntime-gpu and torch

Inputs and outputs stay on the GPU (I/O binding). Every model is run as it is and, where ONNX Runtime lets it, replayed
as a CUDA graph, which leaves out the time the CPU takes to launch kernels. PyTorch runs BERT's class on random weights:
times do not depend on them. On the 1,500 held-out sentences logits are compared with those of the trained program, not
folded, in fp32 on the CPU.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = ((1, 64), (8, 64), (32, 128), (128, 128))
#: Rounds of timed calls; a call is as many runs as take some milliseconds, so that the clock's grain does not count.
ROUNDS, CALL_SECONDS = 15, 4e-3
THEIRS = "transformers' export"

Call = Callable[[], None]


def owed(name: str) -> str:
    """Under which name the logits are kept that a model owes."""
    return f"logits {name}"


def bound(session: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Call:
    """A run of an ONNX Runtime session that reads and writes these tensors on the GPU."""
    import torch

    elements = {torch.int64: np.int64, torch.float16: np.float16, torch.float32: np.float32}
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, value in tensors.items():
            bind(name, "cuda", 0, elements[value.dtype], tuple(value.shape), value.data_ptr())

    # The binding holds addresses only; what lies there has to outlive it.
    def run(_alive: tuple[Any, ...] = (inputs, outputs)) -> None:
        session.run_with_iobinding(binding)

    return run


class Model:
    """An ONNX model on the GPU, its inputs and outputs too."""

    def __init__(self, file: Path, graph: bool = False, profile: str = ""):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        settings = {"use_tf32": "0", "enable_cuda_graph": str(int(graph))}
        self.session = onnxruntime.InferenceSession(file, options, providers=[("CUDAExecutionProvider", settings)])
        if self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise SystemExit("ONNX Runtime cannot load its CUDA provider here")

    def call(self, tokens: Any, mask: Any) -> tuple[Call, Any]:
        """A call without arguments on these tensors, and the tensor that then holds its logits."""
        import torch

        given = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": torch.zeros_like(tokens)}
        output = self.session.get_outputs()[0]
        kind = {"tensor(float16)": torch.float16, "tensor(float)": torch.float32}[output.type]
        logits = torch.empty(len(tokens), 2, dtype=kind, device="cuda")
        taken = {entry.name: given[entry.name].contiguous() for entry in self.session.get_inputs()}
        return bound(self.session, taken, {output.name: logits}), logits


def placement(file: Path, tokens: Any, mask: Any) -> dict[str, int]:
    """How many nodes each provider runs."""
    with tempfile.TemporaryDirectory() as folder:
        model = Model(file, profile=f"{folder}/profile")
        model.call(tokens, mask)[0]()
        events = json.loads(Path(model.session.end_profiling()).read_text(encoding="utf-8"))
    nodes = {
        (event["name"], event["args"]["provider"])
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    }
    return dict(collections.Counter(provider.removesuffix("ExecutionProvider") for _, provider in nodes))


def scored(model: Model, rows: Mapping[str, np.ndarray[Any, Any]], name: str) -> tuple[float, float]:
    """Accuracy on the held-out rows, and the largest difference of logits from those owed, of their scale."""
    import torch

    wanted, found = rows[owed(name)], []
    for start in range(0, len(wanted), 100):
        tokens, mask = (torch.tensor(rows[key][start : start + 100]).cuda() for key in ("input_ids", "attention_mask"))
        run, logits = model.call(tokens, mask)
        torch.cuda.synchronize()
        run()
        found.append(logits.float().cpu().numpy())
    logits = np.concatenate(found)
    return float((logits.argmax(1) == rows["labels"]).mean()), float(abs(logits - wanted).max() / abs(wanted).max())


def eager(config: Path, dtype: str, compiled: bool) -> Callable[[Any, Any], Call]:
    """Makes calls of transformers' own class in PyTorch."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    made: Any = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(config))
    made = made.to("cuda", getattr(torch, dtype)).eval()
    model = torch.compile(made, mode="reduce-overhead", dynamic=False) if compiled else made

    def call(tokens: Any, mask: Any) -> Call:
        @torch.no_grad()
        def run() -> None:
            model(input_ids=tokens, attention_mask=mask)
            torch.cuda.synchronize()

        return run

    return call


def seconds(calls: Mapping[str, Call]) -> dict[str, list[float]]:
    """Seconds a run, round by round; the models take turns in another order each round."""
    order, shuffled, times = list(calls), random.Random(0), {name: [] for name in calls}
    runs = {}
    for name, call in calls.items():
        for _ in range(5):
            call()
        start = time.perf_counter()
        call()
        runs[name] = max(1, round(CALL_SECONDS / (time.perf_counter() - start)))
    for _ in range(ROUNDS):
        shuffled.shuffle(order)
        for name in order:
            calls[name]()
            start = time.perf_counter()
            for _ in range(runs[name]):
                calls[name]()
            times[name].append((time.perf_counter() - start) / runs[name])
    return times


def candidates(
    models: Mapping[str, tuple[Path, Model]], tokens: Any, mask: Any, torch_calls: Mapping[str, Any]
) -> dict[str, Call]:
    """Calls of all models at one shape; a model whose CUDA graph ONNX Runtime refuses is there without it."""
    calls: dict[str, Call] = {}
    for name, (file, model) in models.items():
        calls[name] = model.call(tokens, mask)[0]
        try:
            replayed = Model(file, graph=True).call(tokens, mask)[0]
            replayed()
            calls[f"{name}, graph"] = replayed
        except Exception as error:  # ONNX Runtime's own classes
            print(f"{name}: no CUDA graph: {str(error).splitlines()[0][:200]}", file=sys.stderr)
    return {**calls, **{name: make(tokens, mask) for name, make in torch_calls.items()}}


def measure(out: Path, dtype: str, with_torch: bool) -> list[str]:
    """The table of one dtype, as Markdown."""
    import torch

    rows = np.load(out / "rows.npz")
    torch_calls: dict[str, Any] = {}
    if with_torch:
        for compiled in (False, True):
            name = "PyTorch, torch.compile (reduce-overhead)" if compiled else "PyTorch"
            torch_calls[name] = eager(out / "checkpoint", dtype, compiled)
    names = [key.removeprefix(owed("")) for key in rows if key.startswith(owed(""))]
    files = {name: out / dtype / name / "model.onnx" for name in names}
    models = {name: (file, Model(file)) for name, file in files.items() if file.is_file()}
    first_name, cells = next(iter(models)), dict[str, list[str]]()
    for batch, length in SHAPES:
        tokens = torch.randint(1000, 2000, (batch, length), device="cuda")
        mask = torch.ones_like(tokens)
        torch.cuda.synchronize()
        times = seconds(candidates(models, tokens, mask, torch_calls))
        for name, own in times.items():
            ratio = statistics.median(first / second for first, second in zip(times[first_name], own, strict=True))
            cells.setdefault(name, []).append(f"{1e3 * statistics.median(own):.3f} ({ratio:.2f}x)")
    header = " | ".join(f"{batch}x{length} ms" for batch, length in SHAPES)
    lines = [f"| {dtype} | accuracy | logits off by | nodes | {header} |", "|---|--:|--:|---|" + "--:|" * len(SHAPES)]
    tokens = torch.randint(1000, 2000, (2, 16), device="cuda")
    for name, own in cells.items():
        facts = "|  |  |  |"
        if name in models:
            file, model = models[name]
            accuracy, off = scored(model, rows, name)
            placed = ", ".join(
                f"{count} {where}" for where, count in placement(file, tokens, torch.ones_like(tokens)).items()
            )
            facts = f"| {accuracy:.4f} | {off:.1e} | {placed} |"
        lines.append(f"| {name} {facts} {' | '.join(own)} |")
    return lines


def machine() -> str:
    """What the times are of."""
    import torch

    versions = []
    for package in ("torch", "transformers", "onnxruntime-gpu"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(
        [torch.cuda.get_device_name(), *versions, f"Python {platform.python_version()}", time.strftime("%F")]
    )


def main() -> None:
    """Export, or time and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("export", "time"))
    parser.add_argument("--trained", type=Path, default=Path("out/prune"), help="runs of benchmarks.prune")
    parser.add_argument("--models", nargs="+", metavar="ROW:BUDGET", help="models of benchmarks.frontier instead")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="the ONNX folders")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "float32"])
    parser.add_argument("--multiples", nargs="+", type=int, default=[1, 8, 64], help="what widths are multiples of")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    options = parser.parse_args()
    if options.what == "export":
        from benchmarks import gpu_exports

        own = options.trained, options.out, options.dtypes, options.multiples
        gpu_exports.export_frontier(options.models, *own) if options.models else gpu_exports.export(*own)
        return
    print(machine(), flush=True)
    for dtype in options.dtypes:
        print("\n".join(["", *measure(options.out, dtype, not options.no_torch)]), flush=True)


if __name__ == "__main__":
    main()
