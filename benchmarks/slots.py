"""What slots cost: a base in ONNX without, with empty ones, and with an adapter of rank 8 in them.

    python -m benchmarks.slots                # MiniLM, 1 thread
    python -m benchmarks.slots --rounds 40
    python -m benchmarks.slots --decoder      # SmolLM2 in onnxruntime-genai: three adapters in turn, token by token

The three take turns over one shape, so that what else the machine does meets all alike; processor time (which all
threads add to), its medians, and the median of the ratios within a round. Prints the size of an adapter's file beside
that of its numbers, too. ``--decoder`` asks for every token that genai says whether the adapter's own folded program
says it, too; exits with 1 where one does not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import lorafx
from benchmarks.clients import Question, genai
from examples.assets import minilm, smollm2
from lorafx.backends.slots import slot_values
from lorafx.formats.slots import ADAPTER, model_file, read_slots
from lorafx.models.tokenizers import find_tokenizer
from lorafx.passes.lora import Lora
from lorafx.passes.prilora import Prilora
from lorafx.passes.tied_lora import TiedLora
from lorafx.proof.decoding import PROMPTS
from lorafx.proof.exported import session_options
from lorafx.proof.slots import Filled, load_adapter
from lorafx.public import Program

SHAPES = ((1, 16), (1, 128), (8, 64), (32, 128))
RANK = 8
#: Three methods, each of ranks of its own, at weights of its own.
METHODS = (
    Lora(rank=4, alpha=8.0, targets=("q_proj", "v_proj")),
    TiedLora(rank=3, targets="all-linear"),
    Prilora(rank_first=2, rank_last=6, targets="all-linear"),
)


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
    """Processor seconds of each, ``rounds`` times in turn; each is warm."""
    times: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(rounds):
        for name, call in run.items():
            call(feed)
            started = time.process_time()
            call(feed)
            times[name].append(time.process_time() - started)
    return times


# ---- a decoder


def decoder(folder: Path, new: int) -> int:
    """Three adapters over one folder in genai, in turn and back; how many tokens are not the folded program's."""
    base = lorafx.capture(smollm2())
    tokenizer: Any = find_tokenizer(smollm2())
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    lorafx.export(base, folder / "base", adapters="slots", generate=True, check=False)
    files: list[str | None] = [None]
    for step in METHODS:
        lorafx.export(random(base, step), folder / step.pass_name(), "onnx-adapter", slots=folder / "base", check=False)
        files.append(str(folder / step.pass_name() / ADAPTER))
    order = [*range(len(files)), *reversed(range(len(files)))]
    said = genai([Question(str(folder / "base"), prompts, new, files[number]) for number in order])
    others = 0
    for number, step in enumerate((None, *METHODS)):
        first, again = (texts for at, texts in zip(order, said, strict=True) if at == number)
        program = base if step is None else lorafx.fold(random(base, step), check=False)
        wrong = sum(differing(program, text, len(prompt)) for prompt, text in zip(prompts, first, strict=True))
        changed = sum(a != b for a, b in zip(first, said[0], strict=True))
        name = "no adapter" if step is None else step.pass_name()
        kept = "again alike" if first == again else "otherwise the second time"
        print(f"{name}: {wrong} of {len(prompts) * new} tokens are not the folded program's; said {kept}", flush=True)
        print(f"{name}: {changed} of {len(prompts)} texts are others than the base's", flush=True)
        others += wrong + (first != again)
    return others


def random(base: Program, step: Lora | TiedLora | Prilora) -> Program:
    """``base`` with an adapter of random numbers."""
    program = lorafx.rewrite(base, [step], check=False)
    generator = torch.Generator().manual_seed(METHODS.index(step))
    with torch.no_grad():
        for name in program.names("adapter"):
            value = program.tensor(name)  # a vector scales, a matrix is a factor
            value.normal_(std=0.05 if value.dim() > 1 else 1.0, generator=generator)
    return program


def differing(program: Program, text: list[int], start: int) -> int:
    """How many tokens of ``text`` from ``start`` on the program would not say; a tie within rounding counts as said."""
    ids = torch.tensor([text[:-1]])
    with torch.no_grad():
        logits = program.module().eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, start - 1 :]
    logits[:, program.config.eos_token_id] = -torch.inf  # no text ends
    best, said = logits.max(-1).values, logits.gather(1, torch.tensor(text[start:])[:, None])[:, 0]
    return int((best - said > 1e-5 * best.abs().max()).sum())


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--decoder", action="store_true", help="SmolLM2 in onnxruntime-genai instead")
    parser.add_argument("--new", type=int, default=32, help="tokens after each prompt (--decoder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.decoder:
            return int(decoder(Path(name), options.new) > 0)
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
