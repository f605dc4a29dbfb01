"""What it costs to rewrite a Llama-3-8B-sized model from its config alone, beside PEFT on a size it can hold.

    python -m benchmarks.rewrite

lorafx captures on the meta device and inserts LoRA (rank 16, every linear layer, adapters initialised) without the
weights. PEFT wraps modules: of a model in memory, and, for completeness, of the 8B model on the meta device, where its
adapters have no values either. Every row is a process of its own; the table shows the fastest of the repeats. CPU
seconds are those of the measured part: on a busy machine they say more than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

RANK = 16
LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "dtype": "bfloat16",
    "architectures": ["LlamaForCausalLM"],
}
#: As large as PEFT is asked to hold in memory here: about a billion parameters.
LLAMA_1B = {**LLAMA_3_8B, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12}

ROWS = {
    "lorafx": ("lorafx: capture and rewrite, meta device", LLAMA_3_8B),
    "peft": ("PEFT: get_peft_model, weights in memory", LLAMA_1B),
    "peft-meta": ("PEFT: get_peft_model, meta device", LLAMA_3_8B),
}


def rewrite_with_lorafx(folder: Path) -> dict[str, Any]:
    """Capture and rewrite; what it took."""
    started = time.perf_counter()
    import transformers.exporters.exporter_dynamo  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    import lorafx
    from lorafx.frontend.capture import capture
    from lorafx.graph.program import parameter_count
    from lorafx.passes.lora import Lora
    from lorafx.proof.memory import peak_memory

    imported, busy = time.perf_counter(), time.process_time()
    program = capture(folder, meta=True)
    captured = time.perf_counter()
    program = lorafx.rewrite(program, [Lora(rank=RANK)])
    ended, busy = time.perf_counter(), time.process_time() - busy
    trainable = program.trainable().values()
    if any(value.is_meta for value in trainable):
        raise SystemExit("adapters without values")
    base = parameter_count(program.source.model.parameters())
    note = f"capture {captured - imported:.1f} s, rewrite {ended - captured:.1f} s"
    counts = {"parameters": base, "trainable": parameter_count(trainable)}
    return {**counts, **_measured(started, imported, ended, busy), "peak": peak_memory(), "note": note}


def wrap_with_peft(folder: Path, *, meta: bool) -> dict[str, Any]:
    """Build the model, wrap it; what the wrapping took, and what the process took in memory."""
    started = time.perf_counter()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from lorafx.graph.program import parameter_count
    from lorafx.proof.memory import peak_memory

    importing = time.perf_counter() - started
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    torch.set_default_dtype(torch.float32)
    if not meta:
        model = model.to_empty(device="cpu")
        for value in model.parameters():
            value.data.fill_(0.01)  # so that the memory is really there, as loaded weights are
    base = parameter_count(model.parameters())
    before, busy = time.perf_counter(), time.process_time()
    wrapped = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    ended, busy = time.perf_counter(), time.process_time() - busy
    trainable = parameter_count(value for value in wrapped.parameters() if value.requires_grad)
    note = "adapters have no values" if meta else "building the model not counted"
    counts = {"parameters": base, "trainable": trainable}
    return {**counts, **_measured(before - importing, before, ended, busy), "peak": peak_memory(), "note": note}


def _measured(started: float, imported: float, ended: float, busy: float) -> dict[str, float]:
    return {"seconds": ended - imported, "cpu": busy, "with_imports": ended - started}


def measure(kind: str) -> dict[str, Any]:
    """One row, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_type": "llama", **ROWS[kind][1]}
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.rewrite", "--row", kind, "--folder", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{kind}: {done.stderr.strip()}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def line(kind: str, row: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    peak = f"{row['peak'] / 1e9:.2f}" if row["peak"] else ""
    share = f"{row['peak'] / row['parameters']:.2f}" if row["peak"] else ""
    cells = (
        ROWS[kind][0],
        f"{row['parameters'] / 1e9:.2f} G",
        f"{row['trainable'] / 1e6:.1f} M",
        f"{row['seconds']:.1f}",
        f"{row['cpu']:.1f}",
        f"{row['with_imports']:.1f}",
        peak,
        f"{row['seconds'] / row['parameters'] * 1e9:.2f}",
        share,
        row["note"],
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure every row and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="processes for each row")
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        ours = options.row == "lorafx"
        row = (
            rewrite_with_lorafx(options.folder) if ours else wrap_with_peft(options.folder, meta="meta" in options.row)
        )
        print(json.dumps(row))
        return
    rounds = [{kind: measure(kind) for kind in ROWS} for _ in range(options.repeats)]
    print(f"LoRA, rank {RANK}, every linear layer, bf16 base.\n")
    columns = ["", "parameters", "trainable", "s", "CPU s", "s with imports", "peak GB", "s per G parameters"]
    print(f"| {' | '.join([*columns, 'bytes per parameter', ''])} |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|---|")
    for kind in ROWS:
        print(line(kind, min((entry[kind] for entry in rounds), key=lambda row: row["seconds"])))


if __name__ == "__main__":
    main()
