"""LoRA trains as PEFT's does: the same losses step for step, and the same gradients, from the same start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lorafx.frontend.capture import capture
from lorafx.passes.lora import Lora
from lorafx.pipeline import rewrite
from lorafx.public import Program
from tests.small import POSITIONS, SPECIAL, VOCABULARY, bert, gpt2, largest_difference, learned, llama

STEPS = 50


def batches(labels: int | None) -> list[dict[str, Tensor]]:
    """Fixed batches of varying length, padded on the right; labels are classes, or the tokens themselves."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for step in range(STEPS):
        ids = torch.randint(len(SPECIAL), VOCABULARY, (8, 4 + step % (POSITIONS - 4)), generator=generator)
        mask = torch.ones_like(ids)
        mask[1::2, -2:] = 0
        ids = ids * mask
        if labels is None:
            target = ids.masked_fill(mask == 0, -100)
        else:
            target = torch.randint(0, labels, (8,), generator=generator)
        result.append({"input_ids": ids, "attention_mask": mask, "labels": target})
    return result


def peft_name(name: str) -> str:
    """The name of one of our trained tensors in a PEFT model."""
    if "lora_" in name:
        return "base_model.model." + name.replace(".weight", ".default.weight")
    module, _, leaf = name.rpartition(".")
    return f"base_model.model.{module}.modules_to_save.default.{leaf}"


def pair(build: Callable[[], nn.Module], task: str, **lora: Any) -> tuple[Program, Any]:
    """The same model adapted by lorafx and by PEFT, starting from PEFT's values."""
    torch.manual_seed(0)
    model = build()
    # A scale that is no power of two: where it is applied shows in the rounding.
    program = rewrite(capture(model), [Lora(rank=4, alpha=6.0)])
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type=task, lora_dropout=0.0, **lora)
    theirs = peft.get_peft_model(model, config)
    values = dict(theirs.named_parameters())
    trained = {peft_name(name): value for name, value in program.trainable().items()}
    assert trained.keys() == {name for name, value in values.items() if value.requires_grad}
    program.load({name: values[peft_name(name)].detach() for name in program.trainable()})
    return program, theirs


CASES = {
    "bert": (bert, "SEQ_CLS", 2, {}),
    "gpt2": (gpt2, "CAUSAL_LM", None, {"fan_in_fan_out": True}),
    "llama": (llama, "CAUSAL_LM", None, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_pefts(name: str) -> None:
    build, task, labels, lora = CASES[name]
    program, theirs = pair(build, task, **lora)
    model = program.module()
    theirs.train()
    # With B = 0, as training starts, A's gradient is zero whatever the graph computes: open the branch first.
    branches = {key: value for key, value in program.trainable().items() if "lora_B" in key}
    values = dict(theirs.named_parameters())
    for key, value in branches.items():
        values[peft_name(key)].data.copy_(nn.init.normal_(value, std=0.1).detach())
    batch = batches(labels)[0]
    model(**batch).loss.backward()
    theirs(**batch).loss.backward()
    assert_same_gradients(program, theirs)
    for adapted in (model, theirs):
        adapted.zero_grad()
    for key, value in branches.items():
        values[peft_name(key)].data.copy_(nn.init.zeros_(value).detach())

    ours, reference = (
        torch.optim.AdamW([value for value in adapted.parameters() if value.requires_grad], lr=1e-3)
        for adapted in (model, theirs)
    )
    start = learned(program)
    for step, batch in enumerate(batches(labels)):
        loss, expected = model(**batch).loss, theirs(**batch).loss
        assert abs(loss.item() - expected.item()) <= 1e-5, step  # the agreed tolerance
        loss.backward()
        expected.backward()
        if step == 0:
            assert_same_gradients(program, theirs)
        for optimizer in (ours, reference):
            optimizer.step()
            optimizer.zero_grad()
    assert largest_difference(start, learned(program)) > 1e-2  # it did train


def assert_same_gradients(program: Program, theirs: nn.Module) -> None:
    values = dict(theirs.named_parameters())
    for key, value in program.trainable().items():
        gradient = values[peft_name(key)].grad
        assert value.grad is not None
        assert gradient is not None
        assert (value.grad - gradient).norm() <= 1e-6 * gradient.norm(), key  # the agreed tolerance
