"""Features on several axes: what folds into a weight before or after it, and what is no map of rows."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lorafx
from lorafx.pipeline import to_eval
from lorafx.public import Program


class Net(nn.Module):
    """A module from a function of its tensors, by name, and its input; all in fp64."""

    def __init__(self, function: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(0)
        self.values = nn.ParameterDict(
            {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **self.values)


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def folded(model: nn.Module, x: Tensor, dynamic: bool = False) -> tuple[Program, Program]:
    """The model captured, and folded to the same function."""
    program = to_eval(lorafx.capture(model.eval(), inputs={"x": x}, dynamic=dynamic))
    result = lorafx.fold(program)
    sizes = (len(x), 2 * len(x)) if dynamic else (len(x),)
    for size in sizes:
        inputs = {"x": torch.cat([x, x])[:size]}
        with torch.no_grad():
            want, got = model(**inputs), result.module().eval()(**inputs)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    return program, result


def operators(program: Program) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function" and "sym_size" not in str(n.target)]


def blocks(x: Tensor, r: Tensor) -> Tensor:
    """``x`` times a block-diagonal matrix."""
    n, i, _ = r.shape
    return torch.einsum("...nk,nkc->...nc", x.reshape(*x.shape[:-1], n, i), r).flatten(-2)


def blocks_by_letters(x: Tensor, r: Tensor) -> Tensor:
    n, i, o = r.shape
    b, s, _ = x.shape
    return torch.einsum("bsnk, nkc -> bsnc", x.view(b, s, n, i), r).reshape(b, s, n * o)


def blocks_by_bmm(x: Tensor, r: Tensor) -> Tensor:
    n, i, o = r.shape
    b, s, _ = x.shape
    return torch.bmm(x.reshape(-1, n, i).transpose(0, 1), r).transpose(0, 1).reshape(b, s, n * o)


def blocks_by_matmul(x: Tensor, r: Tensor) -> Tensor:
    n, i, _ = r.shape
    return (x.reshape(*x.shape[:-1], n, 1, i) @ r).squeeze(-2).flatten(-2)


def blocks_from_the_left(x: Tensor, r: Tensor) -> Tensor:
    n, i, _ = r.shape
    return (r.transpose(1, 2) @ x.reshape(*x.shape[:-1], n, i, 1)).flatten(-3)


def one_block(x: Tensor, r: Tensor) -> Tensor:
    return (x.reshape(*x.shape[:-1], -1, r.shape[1]) @ r[0]).flatten(-2)


def butterfly(x: Tensor, r: Tensor) -> Tensor:
    """Two block-diagonal products and a permutation in between."""
    n, i, _ = r.shape
    first = torch.einsum("...nk,nkc->...nc", x.reshape(*x.shape[:-1], n, i), r)
    return blocks(first.transpose(-1, -2).reshape(x.shape), r)


def groups(x: Tensor, r: Tensor) -> Tensor:
    """Sums of groups of features, beside their differences."""
    n, i, _ = r.shape
    spread = x.reshape(*x.shape[:-1], n, i)
    sums = spread.sum(-2) - spread.mean(-2)
    return torch.cat([sums] * 1 + [spread[..., k, :] * r[k, 0] for k in range(1, n)], dim=-1)


def pairs(x: Tensor, r: Tensor) -> Tensor:
    """A rotation of pairs, the rows and the pairs' groups on one axis."""
    spread = x.reshape(-1, 2, r.shape[-1])
    first, second = spread[:, 0, :], spread[:, 1, :]
    return x * r.flatten()[: x.shape[-1]] + torch.stack([-second, first], dim=1).reshape(x.shape)


def circular(x: Tensor, r: Tensor) -> Tensor:
    """A circular convolution, through complex numbers."""
    n, i, _ = r.shape
    waves = torch.fft.ifft(x.reshape(*x.shape[:-1], n, i)) * torch.fft.fft(r[:, 0])
    return torch.fft.fft(waves).real.flatten(-2)


SPREAD = [
    *(blocks, blocks_by_letters, blocks_by_bmm, blocks_by_matmul, blocks_from_the_left, one_block),
    *(butterfly, groups, pairs, circular),
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "free"])
@pytest.mark.parametrize("spread", SPREAD, ids=lambda function: function.__name__)
def test_before_a_weight(spread: Callable[[Tensor, Tensor], Tensor], dynamic: bool) -> None:
    model = Net(lambda x, r, w, b: functional.linear(spread(x, r), w, b), r=(4, 2, 2), w=(5, 8), b=(5,))
    _, result = folded(model, values(2, 3, 8), dynamic)
    assert operators(result) == ["aten.linear.default"]
    assert set(result.roles) == {"values.w", "values.b"}


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "free"])
@pytest.mark.parametrize("spread", SPREAD, ids=lambda function: function.__name__)
def test_after_a_weight(spread: Callable[[Tensor, Tensor], Tensor], dynamic: bool) -> None:
    model = Net(lambda x, r, w, b: spread(functional.linear(x, w, b), r), r=(4, 2, 2), w=(8, 5), b=(8,))
    _, result = folded(model, values(2, 3, 5), dynamic)
    assert operators(result) == ["aten.linear.default"]
    assert set(result.roles) == {"values.w", "values.b"}


def test_blocks_of_any_shape_beside_a_weight() -> None:
    """A branch through blocks that are not square, as low-rank adapters of blocks have."""
    model = Net(
        lambda x, w, a, b: functional.linear(x, w) + 0.5 * blocks(blocks(x, a), b), w=(6, 8), a=(2, 4, 1), b=(2, 1, 3)
    )
    _, result = folded(model, values(2, 3, 8))
    assert operators(result) == ["aten.linear.default"]


def test_an_embedding_in_blocks() -> None:
    model = Net(lambda x, r, w: blocks(functional.embedding(x, w), r), r=(4, 2, 2), w=(11, 8))
    _, result = folded(model, torch.tensor([[1, 4, 8], [0, 3, 3]]))
    assert operators(result) == ["aten.embedding.default"]


# ---- what is no map of rows; sizes agree where they have no reason to

NO_MAP: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "a matrix for each row": (lambda x, r: torch.einsum("bsk,bkc->bsc", x, r), (4, 4, 4)),
    "a matrix for each row, by matmul": (lambda x, r: x @ r, (4, 4, 4)),
    "a factor for each row": (lambda x, r: (x.reshape(4, 4, 2, 2) * r).flatten(-2), (4, 2, 2)),
    "a view across rows": (lambda x, r: (x.transpose(0, 1).reshape(4, 4, 2, 2) @ r).flatten(-2), (2, 2)),
    "rows that change places": (lambda x, r: (x.reshape(4, 4, 2, 2) @ r).transpose(0, 1).flatten(-2), (2, 2)),
    "a sum of rows": (lambda x, r: (x.reshape(4, 4, 2, 2) @ r).sum(1).reshape(4, 1, 4), (2, 2)),
    "one row": (lambda x, r: (x.reshape(4, 4, 2, 2) @ r)[:, 0].reshape(4, 1, 4), (2, 2)),
    "some rows": (lambda x, r: (x.reshape(4, 4, 2, 2) @ r)[:, 1:3].reshape(4, 2, 4), (2, 2)),
    "a square": (lambda x, r: torch.einsum("bnk,bnk->bnk", [(y := x * r[0]), y]), (4, 4)),
    "a product of two": (lambda x, r: ((y := x.reshape(4, 4, 2, 2)) @ r * y).flatten(-2), (2, 2)),
    "a diagonal": (lambda x, r: torch.einsum("bsnn->bsn", x.reshape(4, 4, 2, 2)) @ r, (2, 4)),
    "an offset": (lambda x, r: torch.cat([x, r.expand(4, 4, 4)], dim=-1)[..., 2:6], (4,)),
}


@pytest.mark.parametrize("case", NO_MAP)
def test_what_is_no_map_of_rows_stays(case: str) -> None:
    function, shape = NO_MAP[case]
    for model in (
        Net(lambda x, r, w: functional.linear(function(x, r), w), r=shape, w=(4, 4)),
        Net(lambda x, r, w: function(functional.linear(x, w), r), r=shape, w=(4, 4)),
    ):
        folded(model, values(4, 4, 4))


def test_an_inner_value_that_is_read_elsewhere() -> None:
    def function(x: Tensor, r: Tensor, w: Tensor) -> Any:
        inner = torch.einsum("...nk,nkc->...nc", x.reshape(*x.shape[:-1], 4, 2), r)
        return functional.linear(inner.flatten(-2), w).sum() + inner.sum()

    program, result = folded(Net(function, r=(4, 2, 2), w=(5, 8)), values(2, 3, 8))
    assert len(operators(result)) == len(operators(program))


def step(x: Tensor, source: random.Random, tensors: Callable[..., Tensor]) -> Tensor:
    """Any operator; mostly on the features' axes, else on any, so that it mixes rows."""
    lead = 2 if tuple(x.shape[:2]) == (2, 2) and source.random() < 0.9 else 0
    axis = source.randrange(lead, x.dim()) if x.dim() > lead else -1
    kind = source.choice(
        ["view", "view", "view", "permute", "sum", "scale", "matmul", "cat", "select", "slice", "stack"]
    )
    if kind == "view":
        sizes = [2] * (x[(0,) * lead].numel().bit_length() - 1)
        while len(sizes) > source.randint(1, 3):
            sizes.insert(source.randrange(len(sizes)), sizes.pop() * sizes.pop())
        return x.reshape(*x.shape[:lead], *sizes)
    if kind == "permute":
        return x.permute(*range(lead), *source.sample(range(lead, x.dim()), x.dim() - lead))
    if kind == "sum" and x.dim() > 2 and x.numel() > 32:
        return x.sum(axis, keepdim=source.random() < 0.5)
    if kind == "scale":
        return x * tensors(*(size if source.random() < 0.5 else 1 for size in x.shape[axis:]))
    if kind == "matmul":
        batch = [size if source.random() < 0.5 else 1 for size in x.shape[axis:-2]]
        return x @ tensors(*batch, x.shape[-1], 4)
    if kind == "cat" and x.numel() < 200:
        return torch.cat([x, -x], dim=axis)
    if kind == "stack" and x.numel() < 200 and x.dim() < 5:
        return torch.stack([x, x * 0.5], dim=axis)
    if kind == "select" and x.dim() > 2 and x.numel() > 32:
        return x.select(axis, 0)
    if kind == "slice" and x.shape[axis] % 2 == 0 and x.numel() > 32:
        return x.narrow(axis, 0, x.shape[axis] // 2)
    return x


class Chain(nn.Module):
    """A linear, operators drawn at random on powers of two, and a linear."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.parameters_ = seed, nn.ParameterList()
        self.first, self.last = (nn.Linear(8, 8, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        source, used = random.Random(self.seed), iter(list(self.parameters_))

        def tensors(*shape: int) -> Tensor:
            found = next(used, None)
            if found is None:
                self.parameters_.append(nn.Parameter(values(*shape)))
                found = self.parameters_[-1]
            return found

        value = self.first(x)
        for _ in range(source.randint(2, 6)):
            value = step(value, source, tensors)
        whole = value.numel() % 32 == 0
        return self.last(value.reshape(2, -1, 8) if whole else value.sum().expand(2, 8))


@pytest.mark.parametrize("seed", range(60))
def test_operators_on_any_axes(seed: int) -> None:
    x, model = values(2, 2, 8), Chain(seed)
    with torch.no_grad():
        model(x)
    folded(model, x)
