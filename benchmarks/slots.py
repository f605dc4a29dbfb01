"""What slots cost: a base in ONNX without, with empty ones, and with an adapter of rank 8 in them.

    python -m benchmarks.slots                        # MiniLM, 2 threads
    python -m benchmarks.slots --threads 1 --rounds 40

The three take turns over one shape, so that what else the machine does meets all alike; medians, and the median of the
ratios within a round. Prints the size of an adapter's file beside that of its numbers, too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import lorafx
from examples.assets import minilm
from lorafx.backends.slots import slot_values
from lorafx.formats.slots import ADAPTER, model_file, read_slots
from lorafx.passes.lora import Lora
from lorafx.proof.exported import session_options
from lorafx.proof.slots import Filled, load_adapter

SHAPES = ((1, 16), (1, 128), (8, 64), (32, 128))
RANK = 8


def export_all(folder: Path) -> tuple[int, int]:
    """Write the three into ``folder``; the bytes of the adapter's file and of its numbers."""
    base = lorafx.capture(minilm())
    lorafx.export(base, folder / "plain")
    lorafx.export(base, folder / "slots", adapters="slots")
    program = lorafx.rewrite(base, [Lora(rank=RANK)])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in program.names("adapter"):
            program.tensor(name).normal_(std=0.02, generator=generator)
    lorafx.export(program, folder / "adapter", "onnx-adapter", slots=folder / "slots")
    values = slot_values(program, read_slots(folder / "slots"), folder)
    return (folder / "adapter" / ADAPTER).stat().st_size, sum(value.nbytes for value in values.values())


def calls(folder: Path, threads: int) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """What is timed, by name."""

    def session(name: str) -> Any:
        options = session_options(threads)
        return onnxruntime.InferenceSession(model_file(folder / name), options, providers=["CPUExecutionProvider"])

    plain, slots = session("plain"), session("slots")
    filled = Filled(slots, load_adapter(folder / "adapter", folder / "slots"))
    return {
        "no slots": lambda feed: plain.run(None, feed),
        "slots, empty": lambda feed: slots.run(None, feed),
        f"rank {RANK}": lambda feed: filled.run(None, feed),
    }


def timed(run: dict[str, Callable[[dict[str, Any]], Any]], feed: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, ``rounds`` times in turn; each is warm."""
    times: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(rounds):
        for name, call in run.items():
            call(feed)
            started = time.perf_counter()
            call(feed)
            times[name].append(time.perf_counter() - started)
    return times


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        size, numbers = export_all(Path(name))
        print(f"adapter of rank {RANK}: {size} bytes, {size / numbers:.3f} of its numbers'")
        run = calls(Path(name), options.threads)
        print("| batch x length | " + " | ".join(run) + " | empty / none | filled / none |")
        print("|" + "---|" * (len(run) + 3))
        for batch, length in SHAPES:
            ids = np.random.default_rng(0).integers(1000, 20000, (batch, length))
            feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
            plain, *others = timed(run, feed, options.rounds).values()
            ratios = [statistics.median(b / a for a, b in zip(plain, other, strict=True)) for other in others]
            seconds = [f"{1e3 * statistics.median(one):.2f} ms" for one in (plain, *others)]
            print(f"| {batch}x{length} | " + " | ".join([*seconds, *(f"{ratio:.3f}" for ratio in ratios)]) + " |")


if __name__ == "__main__":
    main()
