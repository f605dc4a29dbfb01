"""Capture leaves the caller's model and random state as they were, and training changes one program alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx.errors import CaptureError
from lorafx.passes.lora import Lora
from lorafx.passes.tidy import Tidy
from tests import small, zoo


class Remembers(nn.Module):
    """Writes into everything a module can hold."""

    def __init__(self, fails: bool = False):
        super().__init__()
        self.layer, self.fails, self.calls, self.last = nn.Linear(4, 4), fails, 0, None
        self.seen: list[Any] = []
        self.by_name: dict[str, Any] = {"first": 0}
        self.notes, self.nested = SimpleNamespace(count=0), {"inner": [1]}
        self.plain, self.frozen = torch.zeros(4), nn.Parameter(torch.zeros(4), requires_grad=False)
        self.register_buffer("table", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        self.seen.append(x.shape[0])
        self.by_name["later"] = x
        self.notes.count = self.calls
        self.nested["inner"].append(2)
        self.frozen.requires_grad_(True)
        self.extra = nn.Linear(4, 4)
        self.layer.register_forward_hook(lambda *_: None)
        self.table = self.table + 1
        if self.fails and bool(x.sum() > 0):
            return x
        self.drawn = (random.random(), np.random.rand(), torch.rand(1))
        return self.layer(x)


def state(model: Remembers) -> Any:
    names = [name for name, _ in model.named_modules()]
    plain = (
        model.calls,
        model.last,
        list(model.seen),
        dict(model.by_name),
        model.notes.count,
        copy.deepcopy(model.nested),
    )
    tensors = {name: value.tolist() for name, value in [*model.state_dict().items(), ("plain", model.plain)]}
    hooks, flags = len(model.layer._forward_hooks), [module.training for module in model.modules()]
    return names, plain, tensors, hooks, flags, model.frozen.requires_grad, sorted(vars(model))


@pytest.mark.parametrize("fails", [False, True])
def test_everything_that_tracing_leaves_in_a_model_is_taken_out_again(fails: bool):
    model = Remembers(fails)
    model.layer.eval()
    before, chance = state(model), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    with pytest.raises(CaptureError) if fails else nullcontext():
        lorafx.capture(model, inputs={"x": torch.ones(2, 4)})
    assert state(model) == before
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert torch.equal(chance[0], after[0])
    assert chance[1:] == after[1:]


def test_a_config_is_put_back():
    model = zoo.build("qwen3")
    config: Any = model.config
    before = copy.deepcopy(config.to_dict())
    lorafx.capture(model)
    assert config.to_dict() == before
    assert "forward" not in vars(model)


class Keeps(nn.Module):
    """An embedding that shortens its rows as they are read, in evaluation too, and a norm with running statistics."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 4, max_norm=0.5)
        self.norm = nn.InstanceNorm1d(4, track_running_stats=True)
        self.norm(torch.randn(4, 4, 8) * 3 + 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.table(ids).transpose(1, 2))


def test_weights_and_statistics_that_a_run_changes_are_put_back():
    model, ids = Keeps().eval(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    before = copy.deepcopy(model.state_dict())
    program = lorafx.capture(model, inputs={"ids": ids})
    module = program.module()
    for mode in (module.eval(), module.train()):
        mode(ids=ids)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    again = lorafx.capture(model, inputs={"ids": ids}).module().eval()(ids=ids)
    assert torch.equal(again, model(ids)), "evaluation normalises by the running statistics"


# ---- training


@pytest.mark.parametrize("steps", [[], [Tidy()], [Lora(rank=2)]])
def test_training_a_program_changes_no_other(steps: list[Any]):
    model = small.llama()
    before = copy.deepcopy(model.state_dict())
    base = lorafx.capture(model)
    program = lorafx.rewrite(base, steps)
    later = lorafx.rewrite(program, [Tidy()])
    others = {name: later.tensor(name).detach().clone() for name in program.trainable()}
    inputs = {name: value % small.VOCABULARY for name, value in zoo.text(2, 7).items()}
    module = program.module()
    optimizer = torch.optim.SGD(module.parameter_groups(lr=1.0))
    for _ in range(2):
        module(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = [name for name, value in program.trainable().items() if not torch.equal(value, others[name])]
    assert len(trained) >= len(others) // 2, "the program itself is trained"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "the user's model"
        assert torch.equal(base.tensor(name), before[name]), "the program it came from"
    assert all(torch.equal(later.tensor(name), value) for name, value in others.items()), "one made of it"


# ---- the normal form


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y.gt_(0.0),
        lambda y: y.eq_(0.0),
        lambda y: y.logical_not_(),
        lambda y: (y.half() * 1).add_(torch.ones(4)),
        lambda y: y.add_(1),
    ],
)
def test_what_is_written_over_keeps_its_dtype(write: Callable[[Tensor], Tensor]):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(write(self.layer(x)).float())

    model, x = Writes().eval(), torch.randn(3, 4)
    program = lorafx.capture(model, inputs={"x": torch.randn(2, 4)})
    assert not any("_." in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert torch.equal(program.module().eval()(x=x), model(x))


class Branching(nn.Module):
    """Leaves a branch on values to the graph."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.first, self.second, (x,))


def test_a_model_with_operators_over_functions_is_judged_and_still_runs():
    model = Branching().double().eval()
    x = torch.rand(2, 4, dtype=torch.float64)
    want = model(x), model(-x)
    program = lorafx.capture(model, inputs={"x": x})
    assert all(torch.equal(model(given), value) for given, value in zip((x, -x), want, strict=True))
    graph = program.module().eval()
    for given, value in zip((x, -x), want, strict=True):
        torch.testing.assert_close(graph(x=given), value)


class Traced(nn.Module):
    """Takes nothing but a tracer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            raise RuntimeError("not here")
        return self.linear(x)


def test_a_model_that_does_not_run_on_its_example_is_refused():
    with pytest.raises(CaptureError, match=r"does not run on its example inputs.*: not here; give inputs"):
        lorafx.capture(Traced(), inputs={"x": torch.rand(2, 4)})
    unchecked = lorafx.capture(Traced(), inputs={"x": torch.rand(2, 4)}, check=False)
    assert unchecked.module().eval()(x=torch.rand(2, 4)).shape == (2, 3)
