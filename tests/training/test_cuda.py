"""Training on a GPU, where one is: steps hardly wait for the device, and what is learned is what a CPU learns."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

import lorafx
from lorafx.graph.precision import recast, relaid
from lorafx.graph.tree import get_tensor
from lorafx.passes.finegates import FineGates
from lorafx.passes.lora import Lora
from lorafx.passes.salora import SaLoRA
from lorafx.training.module import RewrittenModel
from tests import zoo
from tests.methods import RECIPES, Tower, batch, optimiser, state_of, stirred
from tests.small import captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

#: Steps, more than any recipe's interval of pruning.
STEPS = 5
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


@contextmanager
def waits() -> Iterator[list[warnings.WarningMessage]]:
    """The operations for which the CPU waited for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # which may itself warn that it is a prototype
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode("default")
    caught[:] = [one for one in caught if "synchronizing" in str(one.message)]


def made(recipe: str) -> RewrittenModel:
    torch.manual_seed(0)
    program = lorafx.capture(Tower(2, 12, 20), inputs=batch(2, 3))
    model = lorafx.rewrite(program, RECIPES[recipe]).module()
    stirred(model.program)
    model.total_steps = STEPS + 2
    return model.train()


def step(model: RewrittenModel, rows: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
    loss = (model(**rows) - 1.0).square().mean()
    penalty = model.penalty()
    loss = loss if penalty is None else loss + penalty
    loss.backward()
    model.before_step()
    optimizer.step()
    model.after_step()
    optimizer.zero_grad()
    return loss.detach()


@every_recipe
def test_a_step_waits_for_the_device_once_at_most(recipe: str) -> None:
    """Methods of gates read the share that is open, to steer by it; others read nothing."""
    model = made(recipe).cuda()
    rows = {name: value.cuda() for name, value in batch(4, 6).items()}
    optimizer = optimiser(model, fused=True)
    step(model, rows, optimizer)  # tensors are made and moved once
    for name in model.program.names("gate"):  # all open: nothing has closed too early
        get_tensor(model, name).data.fill_(4.0)
    steered = sum(isinstance(step, (FineGates, SaLoRA)) for step in RECIPES[recipe])
    for _ in range(STEPS):
        with waits() as found:
            loss = step(model, rows, optimizer)
        assert len(found) == steered, [f"{one.filename}:{one.lineno}" for one in found]
        assert torch.isfinite(loss)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "salora" not in name and "finegates" not in name])
def test_a_gpu_learns_what_a_cpu_learns(recipe: str) -> None:
    """Recipes that draw random numbers in training draw others on another device."""
    here, there = made(recipe), made(recipe).cuda()
    rows = batch(4, 6)
    moved = {name: value.cuda() for name, value in rows.items()}
    first, second = optimiser(here), optimiser(there)
    for _ in range(STEPS):
        # Products in fp32 (no TF32) in another order, through AdamW.
        torch.testing.assert_close(step(there, moved, second).cpu(), step(here, rows, first), rtol=1e-4, atol=1e-5)


@every_recipe
def test_bf16_under_autocast_trains(recipe: str) -> None:
    model = made(recipe).cuda()
    rows = {name: value.cuda() for name, value in batch(4, 6).items()}
    optimizer = optimiser(model)
    with torch.autocast("cuda", torch.bfloat16):
        losses = [step(model, rows, optimizer) for _ in range(STEPS)]
    assert all(torch.isfinite(loss) for loss in losses)


def test_a_model_split_by_fsdp2_trains_like_one(tmp_path: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        program = lorafx.rewrite(captured(), RECIPES["prilora"])
        plain, split = program.module().cuda().train(), copy.deepcopy(program.module()).cuda().train()
        for block in split.blocks():
            fully_shard(block)
        fully_shard(split)
        ids = torch.randint(5, 40, (4, 8), device="cuda")
        rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
        losses = []
        for model in (plain, split):
            model.total_steps, optimizer = STEPS, optimiser(model)
            losses.append([_step_with_loss(model, rows, optimizer) for _ in range(STEPS)])
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    finally:
        distributed.destroy_process_group()


def _step_with_loss(model: RewrittenModel, rows: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> float:
    loss = model(**rows).loss
    loss.backward()
    model.before_step()
    optimizer.step()
    model.after_step()
    optimizer.zero_grad()
    return loss.item()


def test_training_leaves_programs_where_they_were() -> None:
    base = zoo.captured("bert")
    gates = FineGates(budget=0.5, sublayers=True)
    program = lorafx.rewrite(base, [Lora(rank=2), gates])
    teacher = lorafx.rewrite(base, [Lora(rank=2)])
    rows = [{**{k: v[0] for k, v in base.example.items()}, "labels": torch.tensor(n % 2)} for n in range(8)]
    lorafx.train(program, rows, teacher=teacher, distill=0.5, epochs=1, batch_size=4, progress=False)
    assert program.device.type == teacher.device.type == "cpu"
    assert lorafx.verify(program, lorafx.fold(program)).ok


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_what_lies_on_the_gpu_folds_as_what_does_not(model: str) -> None:
    here = lorafx.rewrite(zoo.captured(model), [FineGates(sublayers=True)])
    sites = state_of(here.module()).sites
    for site in sites:
        site["gate"].data[:1] = -1.0
    sites[0]["gate_sublayer"].data.fill_(-1.0)
    there = relaid(here)  # with tensors of its own
    there.root.to("cuda")  # as a trainer does: the example and the graph stay behind
    ours, theirs = lorafx.fold(here), lorafx.fold(there)
    assert theirs.device.type == "cuda"
    assert [str(site) for site in ours.sites()] == [str(site) for site in theirs.sites()]
    assert len(ours.sites()) < len(here.sites())
    assert lorafx.verify(ours, recast(theirs, None, torch.device("cpu"))).ok
