"""What the tests of the training methods share: recipes, towers of plain linears, and values that open and close."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx.base import Method, Pass
from lorafx.errors import LorafxError
from lorafx.graph import program as data
from lorafx.graph.program import P
from lorafx.graph.state import MethodState, method_state
from lorafx.graph.tree import get_tensor
from lorafx.passes.finegates import Finegates
from lorafx.passes.prilora import Prilora
from lorafx.passes.rose_lora import RoseLora
from lorafx.passes.salora import Salora
from lorafx.passes.tied_lora import TiedLora
from lorafx.public import Program
from lorafx.training.module import RewrittenModel
from tests.captures import shared

#: Every method, and every combination the project lists; ranks that models of width 32 hold.
RECIPES: dict[str, tuple[Pass, ...]] = {
    "prilora": (Prilora(rank_first=2, rank_last=4, interval=2),),
    "salora": (Salora(rank=6, alpha=3.0),),
    "tied-lora": (TiedLora(rank=3),),
    "finegates": (Finegates(),),  # of T5 less cannot close: its heads share a bias by position
    "finegates, apart": (Finegates(couple=False),),
    "rose-lora": (RoseLora(rank=3, alpha=6.0, density=0.3, start=2, end=5),),
    "tied-lora + finegates": (TiedLora(rank=3), Finegates(couple=False)),
    "salora + finegates": (Salora(rank=6, alpha=3.0), Finegates()),
    "prilora + rose-lora": (
        Prilora(rank_first=2, rank_last=4, fraction=0.0),
        RoseLora(adapters="existing", density=0.3, start=2, end=5),
    ),
}
#: Those whose training forward draws no random numbers, so that the same rows give the same gradients however split.
NOISELESS = ("prilora", "tied-lora", "rose-lora", "prilora + rose-lora")


TOKENS = 30
#: Every linear of a tower's blocks.
EVERY = ("query", "key", "value", "up_proj", "down_proj")


# ---- towers


class Block(nn.Module):
    """Four linears with the names transformers give them; ``down`` has no bias."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.up_proj, self.down_proj = nn.Linear(width, inner), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.tanh(self.query(x)) * torch.sigmoid(self.key(x)) + self.value(x)
        return x + self.down_proj(torch.tanh(self.up_proj(mixed)))


class Tower(nn.Module):
    """Blocks over tokens that do not see each other, and the mean of the tokens the mask lets through."""

    def __init__(self, blocks: int, width: int, inner: int):
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, width)
        self.layers = nn.ModuleList(Block(width, inner) for _ in range(blocks))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        mask = attention_mask.to(x.dtype).unsqueeze(-1)
        return (x * mask).sum(1) / mask.sum(1)


@shared
def tower(blocks: int = 2, width: int = 12, inner: int = 20, dtype: torch.dtype = torch.float32) -> Program:
    """The captured tower, made once; rewrites of it have storage of their own for what they train."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return lorafx.capture(Tower(blocks, width, inner).to(dtype), inputs=batch(2, 3))


def batch(rows: int, length: int, seed: int = 0, padding: int = 0) -> dict[str, Tensor]:
    """Random tokens; every second row is padded on the right with the token ``padding``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, TOKENS, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, length // 2 + 1 :] = 0
    return {"input_ids": torch.where(mask.bool(), ids, padding), "attention_mask": mask}


# ---- values


def stirred(program: P, seed: int = 1) -> P:
    """``program`` as training may leave it: adapters full of holes that do something, gates open, shut and between."""
    generator = torch.Generator().manual_seed(seed)
    for name in program.names("adapter", "gate"):
        value = program.tensor(name)
        drawn = torch.randn(value.shape, generator=generator)
        if program.roles[name] == "gate":
            drawn = 2.5 * drawn
        elif value.dim() > 1:
            drawn = 0.3 * drawn * (torch.rand(value.shape, generator=generator) < 0.5)
        program.load({name: drawn})
    return program


def state_of(model: RewrittenModel, index: int = -1) -> MethodState:
    """What one method of the history sees now."""
    applied = [applied for applied in model.program.history if isinstance(applied.step, Method)][index]
    return method_state(applied, lambda name: get_tensor(model, name), int(model.clock), model.total_steps)


# ---- training


def optimiser(model: RewrittenModel, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameter_groups(**{"lr": 1e-2, "weight_decay": 0.0, **settings}))


def square(outputs: Tensor) -> Tensor:
    """A loss of a plain module's outputs: the square of their distance from a fixed ramp."""
    return (outputs - torch.linspace(-1, 1, outputs.shape[-1], dtype=outputs.dtype)).square().mean()


def fit(
    model: RewrittenModel,
    batches: Iterable[dict[str, Tensor]],
    optimizer: torch.optim.Optimizer | None = None,
    before: Callable[[], object] = lambda: None,
) -> None:
    """The plain loop, one batch a step; ``before`` sees the gradients before the methods do."""
    optimizer = optimizer or optimiser(model)
    model.train()
    for inputs in batches:
        (square(model(**inputs)) + (model.penalty() or 0)).backward()
        before()
        model.before_step()
        optimizer.step()
        model.after_step()
        optimizer.zero_grad()


def inputs_of(program: data.Program, run: Callable[[nn.Module], object]) -> dict[str, Tensor]:
    """What entered each module of the eager model while ``run`` called it, by module path."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for name, module in program.source.model.named_modules():

        def note(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            if args and isinstance(args[0], Tensor):
                seen[name] = args[0].detach()

        hooks.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        run(program.source.model)
    for hook in hooks:
        hook.remove()
    return seen


# ---- ready to train


def rewritten(*passes: Pass, base: Program | None = None, seed: int = 1) -> Program:
    """The tower under ``passes``, with initial values fixed by ``seed``."""
    base = base or tower()
    torch.manual_seed(seed)
    return lorafx.rewrite(base, passes)


def training(
    *passes: Pass, base: Program | None = None, total_steps: int | None = 100, seed: int = 1
) -> RewrittenModel:
    """Its module, told how many steps there will be."""
    model = rewritten(*passes, base=base, seed=seed).module()
    model.total_steps = total_steps
    return model


def refused(kind: type[LorafxError], passes: tuple[Pass, ...], base: Program | None = None) -> str:
    """The message of the refusal, which is one line."""
    with pytest.raises(kind) as caught:
        rewritten(*passes, base=base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


class Layer(nn.Module):
    """One block of one linear without a bias, whose weight is a number times the identity."""

    def __init__(self, value: float):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16, bias=False)])
        self.layers[0].weight.data = value * torch.eye(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def layer(value: float, step: Pass) -> RewrittenModel:
    """It under a method."""
    return training(step, base=lorafx.capture(Layer(value), inputs={"x": torch.ones(3, 5, 16)}))
