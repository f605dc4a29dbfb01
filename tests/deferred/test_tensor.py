"""A deferred tensor is what was computed at once, in tiles of any size; what is zero is told without computing it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lorafx.deferred import tiles
from lorafx.deferred.kept import keep_bits
from lorafx.deferred.tensor import Deferred, deferred, is_deferred, value
from lorafx.deferred.tensor import tiles as in_tiles
from lorafx.deferred.zeros import zeros_of
from lorafx.errors import LorafxError

ROWS, COLUMNS = 60, 48
SOME = torch.tensor([0, 1, 7, 9, 40, 47])
DOWN, UP = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((4, COLUMNS), (ROWS, 4)))
GATE = torch.rand(ROWS, generator=torch.Generator().manual_seed(1)).double()


def weight(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)).to(dtype)


def merged(base: Tensor) -> Tensor:
    """A gated weight with a low-rank update, rounded once: what folding computes."""
    exact = GATE[:, None] * (base.to(torch.float64) + 0.5 * (UP.double() @ DOWN.double()))
    rounded = exact.to(base.dtype)
    return keep_bits(rounded, base.detach()).contiguous()


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "transposed": lambda x: x.t().contiguous(),
    "dimensions swapped": lambda x: x.transpose(-1, 0),
    "permuted": lambda x: x.permute(1, 0),
    "rows chosen": lambda x: x.index_select(0, SOME),
    "columns chosen": lambda x: x.index_select(1, SOME),
    "columns of its transpose chosen": lambda x: x.t().index_select(1, SOME),
    "chosen in another order": lambda x: x.index_select(0, SOME.flip(0)),
    "rows cut out": lambda x: x[5:40],
    "last rows": lambda x: x[-7:],
    "columns cut out": lambda x: x[:, 3:9],
    "every second row": lambda x: x[::2],
    "in heads": lambda x: x.reshape(ROWS, 6, 8),
    "rows in groups": lambda x: x.view(4, 15, COLUMNS).transpose(0, 1),
    "flat": lambda x: x.reshape(-1),
    "widened": lambda x: x.unsqueeze(1).expand(ROWS, 3, COLUMNS),
    "vector times it": lambda x: x.double() @ torch.arange(COLUMNS).double(),
    "twice, one after the other": lambda x: torch.cat([x, x]),
    "twice, side by side": lambda x: torch.cat([x, x.float()], -1),
    "a piece": lambda x: x.chunk(2)[1],
    "normalised": lambda x: x.float().softmax(-1),
    "over its norm": lambda x: x / x.float().norm(dim=0, keepdim=True),
    "a product with itself": lambda x: x.double().t() @ x.double(),
    "products of a stack": lambda x: torch.bmm(x.double().view(4, 15, COLUMNS), x.double().view(4, COLUMNS, 15)),
    "their rows first": lambda x: torch.bmm(x.double().view(4, 15, 48), x.double().view(4, 48, 15)).transpose(0, 1),
    "their columns first": lambda x: torch.bmm(x.double().view(4, 15, 48), x.double().view(4, 48, 15)).transpose(0, 2),
    "masked": lambda x: torch.where(x > 0, x, torch.zeros((), dtype=x.dtype)),
    "in fp16": lambda x: x.to(torch.float16),
    "summed": lambda x: x.double().sum(),
}


@pytest.mark.parametrize("tile", [1, 300, 1 << 20])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_computed_later_is_what_is_computed_now(way: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", tile)
    later, now = (WAYS[way](merged(base)) for base in (deferred(weight()), weight()))
    assert is_deferred(later)
    assert (later.shape, later.dtype, later.device) == (now.shape, now.dtype, now.device)
    found = value(later)
    if now.is_floating_point() and now.dtype == torch.float64:
        # Sums of fp64 products may be taken in another order for other tiles.
        torch.testing.assert_close(found, now, rtol=1e-13, atol=1e-13)
    else:
        assert torch.equal(found, now)


def test_tiles_are_small_and_together_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 5 * COLUMNS)
    parts = list(in_tiles(merged(deferred(weight()))))
    assert max(len(part) for part in parts) == 5
    assert torch.equal(torch.cat(parts), merged(weight()))


def test_no_operator_makes_the_whole_of_what_is_read_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 5 * COLUMNS)
    made: list[int] = []
    plain = tiles._called

    def watched(*args: object) -> Tensor:
        made.append(plain(*args).numel())  # type: ignore[arg-type]
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(tiles, "_called", watched)
    value(merged(deferred(weight())))
    assert made
    assert max(made) <= 5 * COLUMNS


def test_a_question_about_values_is_answered_at_once() -> None:
    later, now = merged(deferred(weight())), merged(weight())
    assert float(later.double().sum()) == float(now.double().sum())
    assert bool((later == 0).any()) == bool((now == 0).any())
    assert torch.equal(later, now)
    assert torch.equal((later > 1).nonzero(), (now > 1).nonzero())


def test_a_parameter_over_it_is_one_and_is_copied_with_it() -> None:
    parameter = nn.Parameter(merged(deferred(weight())), requires_grad=False)
    assert isinstance(parameter, nn.Parameter)
    assert is_deferred(copy.deepcopy(parameter))
    assert torch.equal(value(parameter), merged(weight()))


def test_nothing_writes_to_it() -> None:
    with pytest.raises(LorafxError, match="would write to a weight that is computed later"):
        deferred(weight()).mul_(2)


def test_nothing_random_is_computed_later() -> None:
    with pytest.raises(LorafxError, match="is random"):
        torch.rand_like(deferred(weight()))


def test_several_results_of_one_operator() -> None:
    low, high = torch.aminmax(merged(deferred(weight(torch.float32))), dim=1)
    expected = torch.aminmax(merged(weight(torch.float32)), dim=1)
    assert isinstance(low, Deferred)
    assert torch.equal(value(low), expected.min)
    assert torch.equal(value(high), expected.max)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("zeros", [False, True])
def test_what_is_equal_keeps_its_bits(dtype: torch.dtype, zeros: bool) -> None:
    old, new = weight(dtype), weight(dtype)
    new[::2] += 1.0
    new[1, :2] = old[1, 0] = torch.nan
    if zeros:
        old[3], new[3] = -0.0, 0.0
        old[4], new[4] = 0.0, -0.0
        new[5], new[6] = -0.0, 0.0
    expected = torch.where(new == old, old, new)
    for found in (keep_bits(new, old), keep_bits(new.t(), old.t()).t(), value(keep_bits(deferred(new), old))):
        assert torch.equal(found.contiguous().view(torch.uint8), expected.view(torch.uint8))
    assert bool(keep_bits(new, old)[3].signbit().all()) is zeros


# ---- zeros


def test_zeros_go_through_what_folding_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 3 * COLUMNS)
    base, gate, up, down = weight(), GATE.clone(), UP.clone(), DOWN.clone()
    gate[5] = 0.0  # a closed gate
    base[3], up[3] = 0.0, 0.0  # nothing there, and nothing added
    base[:, 7], down[:, 7] = 0.0, 0.0
    base[9] = 0.0  # nothing there, but something added

    def made(x: Tensor) -> Tensor:
        exact = gate[:, None] * (x.to(torch.float64) + 0.5 * (up.double() @ down.double()))
        rounded = exact.to(x.dtype)
        return keep_bits(rounded, x.detach()).view(ROWS, COLUMNS)

    found = zeros_of(made(deferred(base)))
    assert found.rows.nonzero().flatten().tolist() == [3, 5]
    assert found.columns.nonzero().flatten().tolist() == [7]
    turned = zeros_of(made(deferred(base)).t())
    assert torch.equal(turned.rows, found.columns)
    assert torch.equal(turned.columns, found.rows)


def test_what_only_cancels_is_not_called_zero() -> None:
    base = deferred(weight())
    assert not zeros_of(base - base.clone()).rows.any()


def test_what_an_unknown_operator_makes_is_not_called_zero() -> None:
    base = weight()
    base[3] = 0.0
    assert not zeros_of(deferred(base).float().exp()).rows.any()
    assert not zeros_of(torch.where(deferred(weight()) > 0, deferred(base), deferred(weight()))).rows.any()


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (6, 4), (0, 4)])
def test_zeros_of_a_tensor_that_is_there(shape: tuple[int, ...]) -> None:
    base = torch.randn(shape)
    base[1:2], base[:, 2] = 0.0, 0.0
    found = zeros_of(base)
    assert found.rows.tolist() == [bool((row == 0).all()) for row in base]
    assert found.columns.tolist() == [bool((base[:, column] == 0).all()) for column in range(shape[1])]
