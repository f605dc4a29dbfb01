"""One process of data-parallel trainings by every method, started by tests/processes.py.

Writes what its rank ended with, and how Tied-LoRA's tensors were shared inside the wrapper.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

import lorafx
from lorafx.public import Program
from lorafx.training.fit import train
from lorafx.training.module import RewrittenModel
from tests.methods import RECIPES, optimiser, state_of
from tests.processes import join_group
from tests.small import captured, learned, table, words

STEPS, MICRO = 4, 2
#: Recipes that HF Trainer also trains, and with what.
TRAINED = ("prilora + rose-lora", "salora + finegates")
OPTIONS: dict[str, Any] = {"epochs": 2.0, "learning_rate": 1e-2, "max_grad_norm": 0.5, "progress": False}
ROWS = 48


def started(recipe: str, seed: int = 1) -> Program:
    """A tiny BERT under a recipe, with initial values fixed by ``seed``."""
    base = captured()  # before the seed: a first capture draws random numbers
    torch.manual_seed(seed)
    return lorafx.rewrite(base, RECIPES[recipe])


def rows_of(step: int, micro: int, rank: int) -> dict[str, Tensor]:
    """Two rows for one process, one micro-batch and one step; the second is padded."""
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    ids = torch.randint(5, 45, (2, 6), generator=generator)
    ids[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": ids.ne(0).long(), "labels": ids[:, 0] % 2}


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


Rows: TypeAlias = "Callable[[int, int], dict[str, Tensor]]"


def loop(model: RewrittenModel, micro: int, rows: Rows, wrapped: Any = None) -> None:
    """``STEPS`` steps of the plain loop, clipped, over ``micro`` micro-batches that ``rows(step, number)`` gives."""
    model.total_steps = STEPS
    optimizer = optimiser(model)
    weights = [value for value in model.parameters() if value.requires_grad]
    for step in range(STEPS):
        for number in range(micro):
            # Gradients are reduced once a step, as HF Trainer does it.
            apart = wrapped.no_sync if wrapped is not None and number < micro - 1 else contextlib.nullcontext
            with apart():
                loss = (wrapped or model)(**rows(step, number)).loss + (model.penalty() or 0)
                (loss / micro).backward()
        nn.utils.clip_grad_norm_(weights, 0.5)
        model.before_step()
        optimizer.step()
        model.after_step()
        optimizer.zero_grad()


def main() -> None:
    out = Path(sys.argv[1])
    rank = join_group(out)
    for recipe in RECIPES:
        program = started(recipe)
        model = program.module()
        wrapped = nn.parallel.DistributedDataParallel(model)
        torch.manual_seed(rank)  # processes draw noise of their own
        loop(model, MICRO, lambda step, number: rows_of(step, number, rank), wrapped)
        save_file(learned(program), out / f"{recipe}-{rank}.safetensors")
        if recipe == "tied-lora":
            inner = wrapped.module
            held = {value.data_ptr() for value in inner.parameters()}
            pointers = {
                short: [site[short].data_ptr() for site in state_of(inner).sites]
                for short in ("lora_A", "lora_B", "lora_u", "lora_v")
            }
            assert all(pointer in held for found in pointers.values() for pointer in found)
            (out / f"ties-{rank}.json").write_text(json.dumps(pointers), encoding="utf-8")
    for recipe in TRAINED:
        program = started(recipe)
        train(program, table(ROWS), tokenizer=words(), output_dir=out / recipe, batch_size=8, **OPTIONS)
        save_file(learned(program), out / f"trainer-{recipe}-{rank}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
