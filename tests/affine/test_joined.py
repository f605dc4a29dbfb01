"""Features joined, put elsewhere and beside rows that are all alike: what folds into a weight, and what stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.affine.test_spread import Net, folded, operators, values

linear = functional.linear
PLACES = torch.tensor([4, 1, 0, 3])


def wide(x: Tensor, *parts: Tensor) -> Tensor:
    return torch.cat([x, *parts], dim=-1)


def ones(x: Tensor) -> Tensor:
    return torch.ones(*x.shape[:-1], 1, dtype=x.dtype)


def base(x: Tensor, size: int = 5) -> Tensor:
    return torch.zeros(*x.shape[:-1], size, dtype=x.dtype)


def put(x: Tensor, value: Tensor, places: Tensor = PLACES, under: Tensor | None = None) -> Tensor:
    index = places.expand(*value.shape[:-1], -1)
    return (base(x) if under is None else under).scatter(-1, index, value)


#: What is added to ``linear(x, w, b)``, and with what of its own.
BESIDE: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]]]] = {
    "one more feature": (lambda x, a: linear(wide(x, ones(x)), a), {"a": (5, 5)}),
    "a row of a number": (lambda x, a: linear(wide(torch.full_like(x, 0.3), x), a), {"a": (5, 8)}),
    "a row of a tensor": (lambda x, a, c: linear(wide(x, c.expand(*x.shape[:-1], -1)), a), {"a": (5, 6), "c": (2,)}),
    "subspaces with offsets": (
        lambda x, a, c, d: wide(linear(x, a, c), linear(x, d)), {"a": (2, 4), "c": (2,), "d": (3, 4)},
    ),
    "places over zeros": (lambda x, a: put(x, linear(x, a)), {"a": (4, 4)}),
    "places over a row": (
        lambda x, a, c: put(x, linear(x, a), under=c.expand(*x.shape[:-1], -1)), {"a": (4, 4), "c": (5,)},
    ),
    "the input itself put elsewhere": (lambda x, a: put(x, x * a), {"a": (1, 4)}),
    "subspaces in any order": (
        lambda x, n, a, b, c, d: put(
            x, wide(linear(z := linear(wide(x, ones(x)), n), a @ b), linear(z, c @ d)), torch.tensor([4, 1, 0, 3, 2])
        ),
        {"n": (4, 5), "a": (2, 1), "b": (1, 4), "c": (3, 1), "d": (1, 4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "free"])
@pytest.mark.parametrize("case", BESIDE)
def test_beside_a_weight(case: str, dynamic: bool) -> None:
    function, shapes = BESIDE[case]
    model = Net(lambda x, w, bias, **own: linear(x, w, bias) + function(x, **own), w=(5, 4), bias=(5,), **shapes)
    _, result = folded(model, values(2, 3, 4), dynamic)
    assert operators(result) == ["aten.linear.default"]
    assert set(result.roles) == {"values.w", "values.bias"}


def test_zeros_bring_no_bias() -> None:
    model = Net(lambda x, w, a: linear(x, w) + put(x, wide(linear(x, a), base(x, 1))), w=(5, 4), a=(3, 4))
    _, result = folded(model, values(2, 3, 4), dynamic=True)
    assert set(result.roles) == {"values.w"}


def test_a_weight_whose_features_change_places() -> None:
    order = torch.tensor([2, 0, 3, 1])
    model = Net(lambda x, w, a: put(x, linear(x, w), order, base(x, 4)) * a, w=(4, 4), a=(1, 4))
    _, result = folded(model, values(2, 3, 4), dynamic=True)
    assert operators(result) == ["aten.linear.default"]


def test_channels_joined_beside_a_convolution() -> None:
    conv = functional.conv2d
    model = Net(
        lambda x, w, a, b: conv(x, w) + torch.cat([conv(x, a), conv(x, b)], dim=1),
        w=(5, 3, 2, 2), a=(2, 3, 2, 2), b=(3, 3, 2, 2),
    )  # fmt: skip
    _, result = folded(model, values(2, 3, 4, 4))
    assert operators(result) == ["aten.conv2d.default"]


#: What is no map of each row; sizes agree where they have no reason to.
NO_MAP: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "two written to one place": lambda x, a: put(x, linear(x, a), torch.tensor([1, 1, 0, 3]), base(x, 4)),
    "a place for each row": lambda x, a: base(x, 4).scatter(-1, torch.arange(16).reshape(4, 4) % 4, linear(x, a)),
    "places of rows": lambda x, a: base(x, 4).scatter(
        0, torch.tensor([1, 0, 3, 2])[:, None].expand(4, 4), linear(x, a)
    ),
    "a part of the rows": lambda x, a: base(x, 4).scatter(-1, torch.arange(4).expand(2, 4), linear(x, a)),
    "a part of the features": lambda x, a: base(x, 4).scatter(-1, torch.tensor([1, 2]).expand(4, 2), linear(x, a)),
    "over itself": lambda x, a: x.scatter(-1, torch.tensor([1, 2, 0, 3]).expand(4, 4), linear(x, a)),
    "a row for each row": lambda x, a: linear(wide(x, a[:, :1]), a.repeat(1, 2)[:, :5]),
    "rows joined": lambda x, a: torch.cat([linear(x[:2], a), linear(x[2:], a)]),
    "a square among them": lambda x, a: wide(linear(x, a[:2]), (x * x)[:, :2]),
    "one of another value": lambda x, a: wide(linear(x, a[:2]), linear(x.tanh(), a[2:])),
}


@pytest.mark.parametrize("case", NO_MAP)
def test_what_is_no_map_stays(case: str) -> None:
    """Right whatever becomes of it; and something of it is still there."""
    model = Net(lambda x, w, a: linear(x, w) + NO_MAP[case](x, a), w=(4, 4), a=(4, 4))
    _, result = folded(model, values(4, 4))
    assert len(operators(result)) > 1


def test_a_row_that_others_read_stays() -> None:
    def function(x: Tensor, w: Tensor, a: Tensor) -> Tensor:
        one = ones(x)
        return (linear(x, w) + linear(wide(x, one), a)).tanh() * one

    _, result = folded(Net(function, w=(5, 4), a=(5, 5)), values(2, 3, 4), dynamic=True)
    assert operators(result).count("aten.linear.default") == 1
    assert "aten.ones.default" in operators(result)
