"""Folding a large decoder beside PEFT's merge and a plain copy of the files: seconds, processor time, peak memory.

Run as ``python -m benchmarks.fold --billions 0.7 --rounds 3``. A random bf16 checkpoint of Llama's shape is made in
``--work`` (by default a temporary folder that goes away), with a LoRA adapter of rank 16 on every linear weight,
written once for PEFT and once as a lorafx run. Then lorafx, PEFT and the copy take turns, each in a process of its own.
At the end the tensors that lorafx and PEFT wrote are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import lorafx
from lorafx.passes.lora import Lora

#: Hidden size, layers and feed-forward width of Llama-shaped decoders, by billions of parameters.
SHAPES = {
    0.03: (512, 8, 1536),
    0.7: (1536, 20, 4096),
    1.2: (2048, 20, 5632),
    3.0: (3072, 26, 8192),
    8.0: (4096, 32, 14336),
}
RANK = 16
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def checkpoint(folder: Path, billions: float) -> None:
    """A random decoder, written layer by layer so that no more than a shard is in memory."""
    import transformers as hf
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    hidden, layers, wide = SHAPES[billions]
    config = hf.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=wide, num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512), vocab_size=128256 if billions >= 1 else 32000, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = hf.LlamaForCausalLM(config).bfloat16().state_dict()
    plan = split_torch_state_dict_into_shards(state, max_shard_size="1GB")
    chance = torch.Generator().manual_seed(0)
    for file, names in plan.filename_to_tensors.items():
        values = {name: _values(state[name].shape, chance) for name in names}
        save_file(values, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _values(shape: torch.Size, chance: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:  # norms
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=chance) * 0.02).to(torch.bfloat16)


def adapters(base: Path, run: Path, adapter: Path) -> None:
    """One LoRA adapter with random values, as a lorafx run and as PEFT has it."""
    program = lorafx.rewrite(lorafx.capture(base, meta=True), [Lora(rank=RANK, targets="all-linear")])
    chance = torch.Generator().manual_seed(1)
    for name in program.names("adapter"):
        program.tensor(name).data.normal_(std=0.02, generator=chance)
    program.save(run)
    # A run of plain LoRA is a PEFT adapter already.
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / name, adapter / name)


#: Runs a command and says what it took. A process begins with the peak memory of the one that starts it, which has to
#: be small, therefore.
_LAUNCHER = """
import json, os, subprocess, sys, time
report, *command = sys.argv[1:]
started = time.perf_counter()
process = subprocess.Popen(command)
_, status, used = os.wait4(process.pid, 0)
found = [time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9]
with open(report, "w") as file:
    json.dump(found, file)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def spent(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and the peak resident memory in GB of a process that ends well."""
    quiet = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    with tempfile.NamedTemporaryFile() as report:
        launch = [sys.executable, "-S", "-c", _LAUNCHER, report.name, *command]
        done = subprocess.run(launch, env=quiet, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise SystemExit(f"{command[:4]} failed:\n{done.stdout.decode()[-2000:]}")
        wall, processor, peak = json.load(report)
    return wall, processor, peak


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint, one at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as held:
            for name in held.keys():  # noqa: SIM118  (the file's method, not a mapping's)
                yield name, held.get_tensor(name)


def compare(ours: Path, theirs: Path) -> str:
    """How many numbers differ between two checkpoints, and by how much at most."""
    other = dict(tensors(theirs))
    differing, total, largest = 0, 0, 0.0
    for name, value in tensors(ours):
        apart = (value.float() - other[name].float()).abs()
        differing, total = differing + int((apart > 0).sum()), total + value.numel()
        largest = max(largest, float(apart.max()))
    return f"{differing / total:.2%} of the numbers differ from PEFT's, by {largest:.2g} at most (PEFT rounds twice)"


def measure(work: Path, billions: float, rounds: int) -> None:
    """Print the table for one size."""
    base, run, adapter = work / "base", work / "run", work / "adapter"
    if not base.exists():
        checkpoint(base, billions)
        adapters(base, run, adapter)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    tool = [str(Path(sys.executable).with_name("lorafx")), "fold"]
    commands: dict[str, list[str]] = {
        "lorafx fold": [*tool, str(run), "--stream", "-o", str(work / "ours")],
        "lorafx fold --no-check": [*tool, str(run), "--stream", "--no-check", "-o", str(work / "unchecked")],
        "PEFT": [sys.executable, "-c", PEFT, str(base), str(adapter), str(work / "theirs")],
        "cp": ["cp", "-r", str(base), str(work / "copy")],
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            shutil.rmtree(command[-1], ignore_errors=True)
            found[name].append(spent(command))
            if name not in ("lorafx fold", "PEFT"):  # which are compared at the end
                shutil.rmtree(command[-1])
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {size / 1e9:.2f} GB of bf16, median of {rounds}"
    )
    print("| | seconds | beside PEFT | processor s | beside PEFT | peak GB |\n|---|--:|--:|--:|--:|--:|")
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    for name, (wall, processor, peak) in medians.items():
        against = wall / medians["PEFT"][0], processor / medians["PEFT"][1]
        print(f"| {name} | {wall:.1f} | {against[0]:.2f} | {processor:.1f} | {against[1]:.2f} | {peak:.2f} |")
    print(compare(work / "ours", work / "theirs"))


def main() -> None:
    """Make the checkpoint if it is not there, measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--billions", type=float, default=0.7, choices=sorted(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where to keep the checkpoints (default: a temporary folder)")
    given: Any = parser.parse_args()
    place = given.work or Path(tempfile.gettempdir())
    place.mkdir(parents=True, exist_ok=True)
    made = given.work is not None and (given.work / "base").exists()
    needed, free = given.billions * 2e9 * (3.1 if made else 4.1), shutil.disk_usage(place).free
    if free < needed:
        print(f"skipped: {needed / 1e9:.0f} GB of disk are needed in {place}, {free / 1e9:.0f} GB are free")
        return
    if given.work:
        measure(given.work, given.billions, given.rounds)
    else:
        with tempfile.TemporaryDirectory() as work:
            measure(Path(work), given.billions, given.rounds)


if __name__ == "__main__":
    main()
