"""A step of LoRA by lorafx beside the same step by PEFT: wall time, processor time and peak memory.

    python -m benchmarks.train --rounds 7 --cases smollm2 bert

LoRA of rank 16 on every linear layer, AdamW, a plain loop; SmolLM2-135M on 4 × 256 random tokens and an encoder of
BERT-base's size with random weights, each without and with activation checkpointing. Both sides are one process each,
start from the same values, and take turns step by step; the losses they see are compared. The peak is what a process
held at most while it stepped, weights included; it grows over the first steps as the allocator's heap gets holes, so
compare runs of as many rounds. Cases already in ``--out`` are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

RANK, ALPHA, RATE = 16, 16, 1e-4
CASES = ("smollm2", "smollm2 checkpointing", "bert", "bert checkpointing")
SIDES = ("lorafx", "peft")


# ---- one side, in a process of its own


def base_model(case: str) -> Any:
    """The model to train, as transformers has it."""
    import torch
    import transformers as hf

    if case.startswith("smollm2"):
        from examples import assets

        return hf.AutoModelForCausalLM.from_pretrained(assets.smollm2())
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig())  # of two labels


def batch_of(model: Any, case: str, rows: int, length: int) -> dict[str, Any]:
    """Random tokens, and what is to be learned from them."""
    import torch

    ids = torch.randint(5, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids if case.startswith("smollm2") else ids[:, 0] % 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def by_lorafx(model: Any, case: str) -> tuple[Any, Callable[[], None]]:
    """lorafx's LoRA, and what its loop does before the optimiser's step."""
    import lorafx
    from lorafx.passes.lora import Lora

    rewritten = lorafx.rewrite(lorafx.capture(model), [Lora(rank=RANK, alpha=ALPHA)]).module()
    return rewritten, rewritten.before_step


def by_peft(model: Any, case: str) -> tuple[Any, Callable[[], None]]:
    """PEFT's LoRA."""
    from peft import LoraConfig, TaskType, get_peft_model

    task = TaskType.CAUSAL_LM if case.startswith("smollm2") else TaskType.SEQ_CLS
    settings = LoraConfig(task_type=task, r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(model, settings), lambda: None


def fill(model: Any) -> int:
    """Give every A the values that its module's name decides, the same on both sides; how many numbers train."""
    import zlib

    import torch

    for name, value in model.named_parameters():
        if "lora_A" in name:
            module = name.partition(".lora_A")[0].removeprefix("base_model.model.")
            chance = torch.Generator().manual_seed(zlib.crc32(module.encode()))
            value.data.normal_(std=0.02, generator=chance)
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


def status(field: str) -> float:
    """A line of ``/proc/self/status``, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def serve(side: str, case: str, rows: int, length: int) -> None:
    """Make the model; then do one step for every line that comes in, and answer with what it took."""
    import gc

    import torch

    model = base_model(case)
    batch = batch_of(model, case, rows, length)
    model, before = (by_lorafx if side == "lorafx" else by_peft)(model, case)
    model.train()
    if "checkpointing" in case:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainable = fill(model)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=RATE)
    gc.collect()
    print(json.dumps({"trainable": trainable, "torch": torch.__version__}), flush=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    for line in sys.stdin:
        torch.manual_seed(int(line))  # the same dropout on both sides
        wall, used = time.perf_counter(), time.process_time()
        loss = model(**batch).loss
        loss.backward()
        before()
        optimizer.step()
        if side == "lorafx":
            model.after_step()
        optimizer.zero_grad()
        took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - used}
        print(json.dumps({**took, "peak": status("VmHWM"), "loss": loss.item()}), flush=True)


# ---- both sides, in turn


def measure(case: str, rounds: int, rows: int, length: int) -> dict[str, Any]:
    """What ``rounds`` steps took on both sides, after one that is not counted."""
    command = [sys.executable, "-m", "benchmarks.train", "--rows", str(rows), "--length", str(length)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = {side: subprocess.Popen([*command, "--serve", side, case], **pipes) for side in SIDES}
    try:
        found: dict[str, Any] = {side: {**_answer(child), "steps": []} for side, child in children.items()}
        for number in range(rounds + 1):
            for side in SIDES if number % 2 else reversed(SIDES):
                stdin = children[side].stdin
                assert stdin is not None
                stdin.write(f"{number}\n")
                stdin.flush()
                found[side]["steps"].append(_answer(children[side]))
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    return found


def _answer(child: subprocess.Popen[str]) -> dict[str, Any]:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise SystemExit("one side ended before its time; what it said is above")
    return json.loads(line)


def row(case: str, found: dict[str, Any]) -> str:
    """One line of the table: medians of both sides, and the medians of the steps' ratios."""
    ours, theirs = (found[side]["steps"][1:] for side in SIDES)
    cells = [case, str(found["lorafx"]["trainable"] == found["peft"]["trainable"])]
    for key in ("wall", "cpu"):
        ratio = statistics.median(a[key] / b[key] for a, b in zip(ours, theirs, strict=True))
        medians = (statistics.median(step[key] for step in steps) for steps in (ours, theirs))
        cells += [*(f"{value:.2f}" for value in medians), f"{ratio:.3f}"]
    peaks = [steps[-1]["peak"] for steps in (ours, theirs)]
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(*(found[side]["steps"] for side in SIDES), strict=True))
    cells += [*(f"{peak:.2f}" for peak in peaks), f"{peaks[0] / peaks[1]:.3f}", f"{apart:.1g}"]
    return "| " + " | ".join(cells) + " |"


HEAD = """\
| | same size | wall s | PEFT | ratio | CPU s | PEFT | ratio | peak GB | PEFT | ratio | losses apart |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"""


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=7, help="steps of each side that count")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("out/train.json"), help="where measured cases are kept")
    parser.add_argument("--serve", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        side, case = options.serve
        serve(side, case, options.rows, options.length)
        return
    kept: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    print(HEAD)
    for case in options.cases:
        key = f"{case}, {options.rows} × {options.length}"
        if len(kept.get(key, {}).get("lorafx", {}).get("steps", ())) <= options.rounds:
            kept[key] = measure(case, options.rounds, options.rows, options.length)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        print(row(key, kept[key]), flush=True)


if __name__ == "__main__":
    main()
