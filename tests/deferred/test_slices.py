"""What is told of rows and columns is what looking at every number tells, whether the tensor is there or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorafx.deferred import slices, tiles
from lorafx.deferred import tensor as in_memory
from lorafx.deferred.programs import deferring, has_zeros
from lorafx.deferred.slices import nonzero, squares, uniform
from lorafx.deferred.tensor import Deferred, deferred, value
from lorafx.deferred.zeros import zeros_of
from lorafx.graph.tree import put_tensor
from tests.small import captured, llama

CHANCE = torch.Generator().manual_seed(0)
SHAPES = [(9, 14), (14, 9), (6, 5, 3), (1, 7), (7, 1)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "TILE", 20)
    monkeypatch.setattr(tiles, "TILE", 20)


def holed(*shape: int) -> Tensor:
    """Random numbers with rows and columns of zeros, of a constant, and zeros at the beginning of others."""
    value = torch.randn(*shape, generator=CHANCE)
    value[::3] = 0.0
    value[:, 1::4] = 0.0
    value[-1] = 2.5
    value[1:3, :-1] = 0.0
    return value


def expected(value: Tensor, dim: int, among: Tensor) -> Tensor:
    other = 1 if dim == 0 else 0
    return (value.index_select(other, among.nonzero().flatten()) != 0).movedim(dim, 0).flatten(1).any(1)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_what_looking_at_everything_tells(shape: tuple[int, ...], later: bool) -> None:
    value = holed(*shape)
    asked = deferred(value) * 1.0 if later else value
    assert isinstance(asked, Deferred) is later
    for dim in range(len(shape)):
        every = torch.ones(shape[1 if dim == 0 else 0], dtype=torch.bool)
        assert torch.equal(nonzero(asked, dim), expected(value, dim, every))
        for _ in range(4):
            some = torch.rand(len(every), generator=CHANCE) < 0.5
            assert torch.equal(nonzero(asked, dim, some), expected(value, dim, some)), (dim, some)
        flat = value.movedim(dim, 0).flatten(1)
        alike = torch.where((flat == flat[:, :1]).all(1), flat[:, 0].double(), torch.nan)
        assert torch.equal(uniform(asked, dim).nan_to_num(99.0), alike.nan_to_num(99.0))


def given_back(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Bytes of each range of a tensor whose memory is given back, where ``most`` are to be held."""
    sizes: list[int] = []
    monkeypatch.setattr(in_memory, "_HELD", most)
    monkeypatch.setattr(in_memory, "release", lambda address, size: sizes.append(size))
    return sizes


@pytest.mark.parametrize("tell", [nonzero, uniform, lambda tensor, dim: zeros_of(tensor).rows])
def test_rows_are_looked_at_a_range_at_a_time(monkeypatch: pytest.MonkeyPatch, tell: Any) -> None:
    """The first numbers of every row of a mapped file take the pages of all of it."""
    value = torch.randn(64, 8, generator=CHANCE)
    expected = tell(deferred(value), 0)
    sizes = given_back(monkeypatch, 512)
    assert torch.equal(tell(deferred(value), 0).nan_to_num(99.0), expected.nan_to_num(99.0))
    assert max(sizes) <= 512
    assert sum(sizes) >= value.nbytes


@pytest.mark.parametrize("shape", SHAPES)
def test_squares_are_summed_along_every_dimension(shape: tuple[int, ...]) -> None:
    value = holed(*shape)
    found = {name: squares(given) for name, given in (("there", value), ("later", deferred(value) * 1.0))}
    for sums in found.values():
        for dim, total in enumerate(sums):
            flat = value.double().square().movedim(dim, 0).flatten(1)
            assert torch.allclose(total, flat.sum(1), rtol=1e-14, atol=0.0), dim  # in another order
    assert [total.tolist() for total in squares(torch.empty(3, 4, device="meta"))] == [[4.0] * 3, [3.0] * 4]


def test_no_number_and_no_finite_one_is_a_constant() -> None:
    value = torch.tensor([[torch.nan, torch.nan], [torch.inf, torch.inf], [1.0, 1.0], [0.0, torch.nan]])
    assert uniform(value, 0).isnan().tolist() == [True, True, False, True]
    assert uniform(torch.tensor([torch.inf, 3.0]), 0).nan_to_num(99.0).tolist() == [99.0, 3.0]
    assert nonzero(value, 0).tolist() == [True, True, True, True]


def test_zeros_that_only_the_numbers_show_are_found() -> None:
    """The sum of a matrix and its opposite is zero, and no operator says so."""
    value = torch.randn(30, 8, generator=CHANCE)
    gone = value.clone()
    gone[4:9] *= -1.0
    total = deferred(value) + gone
    assert not zeros_of(total).rows.any()
    assert (~nonzero(total, 0)).nonzero().flatten().tolist() == [4, 5, 6, 7, 8]


def test_a_full_matrix_shows_itself_in_its_first_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    plain = slices._chosen

    def watched(parts: tiles.Tiles, part: tiles.Part, inside: Tensor) -> Tensor:
        read.append(part.size)
        return plain(parts, part, inside)

    monkeypatch.setattr(slices, "_chosen", watched)
    a, b = torch.randn(40, 3, generator=CHANCE), torch.randn(3, 30, generator=CHANCE)
    asked = deferred(torch.randn(40, 30, generator=CHANCE)) + deferred(a) @ deferred(b)
    assert nonzero(asked, 1).all()
    assert read == [min(4, 20 // 30 or 1)]
    read.clear()
    assert nonzero(asked, 1).all()
    assert read == [], "what was told is kept"
    gates = torch.ones(30)
    gates[[3, 17]] = 0.0
    assert (~nonzero(asked * gates, 1)).nonzero().flatten().tolist() == [3, 17]
    assert len(read) == 1, "how it is made tells which columns are zero"


def test_no_more_is_computed_for_them_than_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weight as folding composes it, which is viewed in the shape that it has."""
    made: list[int] = []
    plain = tiles.Tiles._compute

    def watched(self: tiles.Tiles, wanted: tiles.Wanted, values: Any) -> Any:
        found = plain(self, wanted, values)
        if wanted.recipe.shape == (40, 30):
            made.append(found.numel())
        return found

    monkeypatch.setattr(tiles.Tiles, "_compute", watched)
    base, a, b = (torch.randn(*shape, generator=CHANCE) for shape in ((40, 30), (2, 30), (40, 2)))
    composed = (deferred(base).double() + deferred(b).double() @ deferred(a).double()).view(40, 30)
    for dim in (0, 1):
        assert nonzero(composed, dim).all()
        assert uniform(composed, dim).isnan().all()
    assert made
    assert max(made) <= 4 * 40


def test_chosen_rows_and_columns_are_zero_where_all_of_them_are() -> None:
    held = deferred(holed(9, 14))
    index = torch.tensor([0, 2, 3, 5])
    for dim in (0, 1):
        found = zeros_of(held.index_select(dim, index))
        assert torch.equal(found[dim], zeros_of(held)[dim][index])
        assert torch.equal(found[1 - dim], zeros_of(held)[1 - dim])


def test_zeros_that_nothing_reads_are_no_dead_channels() -> None:
    """Gates that were folded stay in the tree until it is tidied."""
    program = deferring(captured(llama))
    put_tensor(program.root, "left", torch.zeros(4, dtype=torch.float32))
    assert not has_zeros(program)
    name = "model.layers.1.mlp.down_proj.weight"
    held = value(program.tensor(name)).clone()
    held[:, 3] = 0.0
    put_tensor(program.root, name, torch.nn.Parameter(held))
    assert has_zeros(program)
