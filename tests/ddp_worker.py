"""One process of a data-parallel training, started by tests/processes.py. Writes what its rank ended with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed

from lorafx.training.fit import train
from tests.processes import join_group
from tests.small import adapted, learned, table, words

#: Rows of one optimiser step are 16, however they are split over processes and micro-batches.
RUNS: dict[str, dict[str, Any]] = {"plain": {"batch_size": 8}, "accumulated": {"batch_size": 4, "accumulate": 2}}
#: 48 rows make whole batches: to fill up a last one, data-parallel samplers repeat rows.
COMMON: dict[str, Any] = {"epochs": 2.0, "log_steps": 1, "learning_rate": 1e-2, "keep_best": True, "progress": False}
ROWS, HELD_OUT, LOOP_STEPS = 48, 21, 4


def loop_batch(step: int, rank: int) -> dict[str, Tensor]:
    """Four rows for one process and one step."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(5, 45, (4, 6), generator=generator)
    return {"input_ids": ids, "labels": ids[:, 0] % 2}


def loop(rank: int) -> dict[str, Tensor]:
    """The plain loop under DDP: every process takes its own rows."""
    program = adapted()
    model = program.module()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    for step in range(LOOP_STEPS):
        loss = wrapped(**loop_batch(step, rank)).loss + (model.penalty() or 0)
        loss.backward()
        if step == 0:
            for name in program.names("statistic"):
                program.tensor(name)[0] += rank  # processes that saw other rows have other statistics
        model.before_step()
        optimizer.step()
        model.after_step()
        optimizer.zero_grad()
    return learned(program)


def main() -> None:
    out = Path(sys.argv[1])
    rank = join_group(out)
    held_out = table(HELD_OUT, seed=1)
    for name, split in RUNS.items():
        program = adapted()
        options = {**COMMON, **split}
        result = train(program, table(ROWS), eval_data=held_out, tokenizer=words(), output_dir=out / name, **options)
        save_file(learned(program), out / f"{name}-{rank}.safetensors")
        (out / f"{name}-{rank}.json").write_text(json.dumps(result.to_json()), encoding="utf-8")
    save_file(loop(rank), out / f"loop-{rank}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
