"""One process of trainings whose tensors FSDP2 splits, started by tests/processes.py. Writes what its rank saw."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import lorafx
from lorafx.base import Pass
from lorafx.passes.lora import Lora
from lorafx.public import Program
from lorafx.training.fit import train
from lorafx.training.module import RewrittenModel
from lorafx.training.sharding import is_sharded
from lorafx.training.trainer import rewritten_model
from tests.method_ddp_worker import joined, rows_of
from tests.methods import RECIPES, optimiser
from tests.processes import join_group
from tests.small import captured, learned, table, words
from tests.zoo import build

STEPS, MICRO = 4, 2
#: LoRA, the five methods, and what combines them.
LOOPS: dict[str, tuple[Pass, ...]] = {"lora": (Lora(rank=3, targets="all-linear"),), **RECIPES}
#: One block that runs several times, and two stacks of blocks, the first of which computes a bias for the others.
FAMILIES = ("albert", "t5")
#: What HF Trainer trains as well: a method that prunes by what it measured, and factors that blocks share.
TRAINED = ("prilora + rose-lora", "tied-lora")
ROWS, SAVED, HELD_OUT = 48, 3, 32
OPTIONS: dict[str, Any] = {
    "epochs": 2.0, "learning_rate": 1e-2, "max_grad_norm": 0.5, "progress": False, "log_steps": 1, "save_steps": SAVED,
}  # fmt: skip
SHARDED: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}}


def started(recipe: str, seed: int = 1) -> Program:
    """A tiny BERT under a recipe, with initial values fixed by ``seed``."""
    base = captured()  # before the seed: a first capture draws random numbers
    torch.manual_seed(seed)
    return lorafx.rewrite(base, LOOPS[recipe])


def everyone(step: int, micro: int) -> dict[str, Tensor]:
    """What both processes together take for one micro-batch."""
    return joined([rows_of(step, micro, rank) for rank in range(2)])


def loop(
    model: RewrittenModel, rows: Callable[[int, int], dict[str, Tensor]], sync: Callable[[bool], None] | None = None
) -> list[float]:
    """``STEPS`` steps of the plain loop, clipped, with noise that only step and micro-batch decide; the losses."""
    model.total_steps = STEPS
    optimizer = optimiser(model)
    weights = [value for value in model.parameters() if value.requires_grad]
    losses = []
    for step in range(STEPS):
        for micro in range(MICRO):
            if sync is not None:
                sync(micro == MICRO - 1)  # gradients are reduced once a step, as HF Trainer does it
            torch.manual_seed(10 * step + micro)
            loss = model(**rows(step, micro)).loss
            (loss / MICRO).backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(weights, 0.5)
        model.before_step()
        optimizer.step()
        model.after_step()
        optimizer.zero_grad()
    return losses


def split_in_two(model: RewrittenModel) -> Any:
    for block in model.blocks():
        fully_shard(block)
    return fully_shard(model)


def sharded(recipe: str, rank: int, out: Path) -> None:
    """The plain loop over a model split block by block, every second recipe with activation checkpointing."""
    program = started(recipe)
    model = program.module()
    if list(LOOPS).index(recipe) % 2:
        model.gradient_checkpointing_enable()
    wrapped = split_in_two(model)
    assert len(model.blocks()) == 2
    assert all(isinstance(value, DTensor) for value in model.parameters())
    losses = loop(model, lambda step, micro: rows_of(step, micro, rank), wrapped.set_requires_gradient_sync)
    model.eval()
    with torch.no_grad():
        logits = model(**rows_of(9, 0, 0)).logits
    model.gather()
    save_file({**learned(program), "logits": logits}, out / f"{recipe}-{rank}.safetensors")
    (out / f"{recipe}-{rank}.json").write_text(json.dumps(losses), encoding="utf-8")


class Split(TrainerCallback):
    """Notes at the end of a training whether its model was split, block by block."""

    found = False

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        blocks = list((rewritten_model(model).units or {}).values())
        # The root may be whole yet from an evaluation.
        inside = [value for block in blocks for value in block.parameters()]
        self.found = bool(inside) and is_sharded(model) and all(isinstance(value, DTensor) for value in inside)


def family_program(name: str) -> Program:
    """A random model of ``tests.zoo``, without dropout, under LoRA."""
    torch.manual_seed(0)
    base = lorafx.capture(build(name, dropout=0.0))
    torch.manual_seed(1)
    return lorafx.rewrite(base, [Lora(rank=2)])


def family_loop(model: RewrittenModel, rank: int | None) -> list[float]:
    """Two steps on both rows of the example (``rank`` None), or on one of them: the mean square of what comes out."""
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    losses = []
    for _ in range(2):
        example = model.program.example
        rows = slice(None) if rank is None else slice(rank, rank + 1)
        outputs = model(**{name: value[rows] for name, value in example.items()})
        loss = next(value for value in outputs.values() if isinstance(value, Tensor)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def shard_on_cpu() -> None:
    """Let accelerate split models here: it does so on accelerators alone, by the kind of device it found."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def begin_as_on_accelerators(self: Any, *args: Any, **kwargs: Any) -> None:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        begin(self, *args, **kwargs)

    AcceleratorState.__init__ = begin_as_on_accelerators


def main() -> None:
    out = Path(sys.argv[1])
    rank = join_group(out)
    for recipe in LOOPS:
        sharded(recipe, rank, out)
    for name in FAMILIES:
        program = family_program(name)
        model = program.module()
        split_in_two(model)
        losses = family_loop(model, rank)
        model.gather()
        save_file({**learned(program), "losses": torch.tensor(losses)}, out / f"{name}-{rank}.safetensors")
    for name, trainer in (("ddp", {}), ("fsdp", SHARDED)):
        if trainer:
            shard_on_cpu()
        for recipe in TRAINED:
            program, split = started(recipe), Split()
            result = train(
                program, table(ROWS), eval_data=table(HELD_OUT, seed=1), tokenizer=words(),
                output_dir=out / f"{name}-{recipe}", batch_size=8, trainer=trainer, callbacks=[split], **OPTIONS,
            )  # fmt: skip
            assert split.found == bool(trainer)
            save_file(learned(program), out / f"{name}-{recipe}-{rank}.safetensors")
            (out / f"{name}-{recipe}-{rank}.json").write_text(json.dumps(result.to_json()), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
