"""Checking merges of any size: peak memory and processor time of each way, and whether a wrong tensor is found.

    python -m benchmarks.merges                      # 1.19 GB of bf16, in a temporary folder
    python -m benchmarks.merges --billions 0.03      # a small one, in seconds

A random checkpoint of Llama's shape and a LoRA adapter of rank 16 on every linear weight, as in ``benchmarks.fold``.
PEFT merges them, and ``lorafx check-merge`` has to accuse nothing of that; lorafx folds them, and ``lorafx check`` has
to find that whole. Then one weight of PEFT's merge is put back to the base's, which ``check-merge`` has to name, alone.
Exits with 1 where one of them answers otherwise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from benchmarks.fold import PEFT, SHAPES, adapters, checkpoint, spent

#: The weight that is put back.
WEIGHT = "model.layers.1.mlp.down_proj.weight"


def put_back(merged: Path, base: Path) -> None:
    """Let a merge have one weight as the base has it."""
    of_merged, of_base = (_file_of(folder) for folder in (merged, base))
    values = {**load_file(of_merged), WEIGHT: load_file(of_base)[WEIGHT]}
    save_file(values, of_merged, metadata={"format": "pt"})


def _file_of(folder: Path) -> Path:
    """The file of a checkpoint that holds the weight."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return folder / "model.safetensors"
    return folder / json.loads(index.read_text(encoding="utf-8"))["weight_map"][WEIGHT]


def measure(work: Path, billions: float) -> bool:
    """Print the table; whether check-merge named what was put back, and nothing else."""
    base, adapter, theirs, ours = (work / name for name in ("base", "adapter", "theirs", "ours"))
    checkpoint(base, billions)
    adapters(base, work / "run", adapter)
    tool = str(Path(sys.executable).with_name("lorafx"))
    asked = [tool, "check-merge", str(base), str(adapter), str(theirs)]
    commands = {
        "PEFT's merge": [sys.executable, "-c", PEFT, str(base), str(adapter), str(theirs)],
        "`check-merge` of it": asked,
        "`fold --stream`": [tool, "fold", str(base), "--adapter", str(adapter), "--stream", "-o", str(ours)],
        "`check` of that": [tool, "check", str(ours)],
    }
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    print(f"{size / 1e9:.2f} GB of bf16\n\n| | peak MB | processor s |\n|---|--:|--:|", flush=True)
    for name, command in commands.items():
        _, processor, peak = spent(command)  # which ends the run where one fails: what is right is not to be accused
        print(f"| {name} | {peak * 1e3:.0f} | {processor:.1f} |", flush=True)
    put_back(theirs, base)
    answer = subprocess.run([*asked, "--json"], capture_output=True, text=True, check=False)
    faults = {fault["name"]: fault["cause"] for fault in json.loads(answer.stdout)["faults"]}
    print(f"\n{WEIGHT} put back: exit code {answer.returncode}, {faults}")
    return answer.returncode == 4 and faults.keys() == {WEIGHT}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=float, default=0.7, choices=sorted(SHAPES))
    with tempfile.TemporaryDirectory() as work:
        raise SystemExit(not measure(Path(work), parser.parse_args().billions))


if __name__ == "__main__":
    main()
