"""What proof by default costs: fold and export of MiniLM and SmolLM2 with and without, seconds.

Run as ``python -m benchmarks.proof [NAME…]``. Each figure is the median of RUNS; with and without take turns, so that a
machine that gets busier slows both.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import lorafx
from examples import assets
from lorafx.backends.export import Format
from lorafx.passes.lora import Lora
from lorafx.public import Program

RUNS = 3
MODELS: dict[str, Callable[[], Path]] = {"MiniLM": assets.minilm, "SmolLM2": assets.smollm2}


def adapted(folder: Path) -> Program:
    """LoRA of rank 8 on every linear weight, as it might be after training."""
    program = lorafx.rewrite(lorafx.capture(folder), [Lora(rank=8)])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in program.names("adapter"):
            if not program.tensor(name).any():
                program.tensor(name).normal_(std=0.02, generator=generator)
    return program


def seconds(task: Callable[[bool], object], runs: int) -> dict[bool, float]:
    """The median time of ``task(check)``, with and without."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(runs):
        for check, spent in times.items():
            started = time.perf_counter()
            task(check)
            spent.append(time.perf_counter() - started)
    return {check: statistics.median(spent) for check, spent in times.items()}


def main() -> None:
    """Print a row for each model and stage."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {RUNS}, fp32")
    print("| model | stage | without | with |\n|---|---|---|---|")
    for name in sys.argv[1:] or MODELS:
        program = adapted(MODELS[name]())
        folded = lorafx.fold(program, gather="never")
        with tempfile.TemporaryDirectory() as place:

            def write(check: bool, kind: Format, place: str = place, folded: Program = folded) -> object:
                return lorafx.export(folded, f"{place}/{kind}", kind, check=check, overwrite=True)

            stages: dict[str, Callable[[bool], object]] = {
                "fold": lambda check, program=program: lorafx.fold(program, gather="never", check=check),
                "export hf": lambda check: write(check, "hf"),
                "export onnx": lambda check: write(check, "onnx"),
            }
            for stage, task in stages.items():
                spent = seconds(task, RUNS)
                print(f"| {name} | {stage} | {spent[False]:.1f} s | {spent[True]:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
