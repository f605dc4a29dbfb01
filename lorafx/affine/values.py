"""The algebra of affine maps, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

#: A matrix (out, in), its diagonal when it is diagonal, or None for the identity; and an offset or None. All fp64.
Value: TypeAlias = "tuple[Tensor | None, Tensor | None]"


def compose(outer: Tensor, inner: Tensor | None) -> Tensor:
    """The matrix product, with a diagonal or identity ``inner`` written as such."""
    if inner is None:
        return outer
    return outer * inner if inner.dim() == 1 else outer @ inner


def dense(matrix: Tensor | None, size: int, device: torch.device) -> Tensor:
    """``matrix`` written out."""
    if matrix is None:
        return torch.eye(size, dtype=torch.float64, device=device)
    return torch.diag(matrix) if matrix.dim() == 1 else matrix


def applied(own: Callable[[], tuple[Tensor, Tensor | None]], inner: Value) -> Value:
    """The map followed by a matrix and a bias."""
    (matrix, bias), (m, c) = own(), inner
    offset = None if c is None else matrix @ c
    if bias is not None:
        offset = bias if offset is None else offset + bias
    return compose(matrix, m), offset


def scaled(factor: Callable[[], Tensor], size: int, inner: Value) -> Value:
    """The map times one number, or one a feature."""
    (m, c), f = inner, factor().reshape(-1).expand(size)
    product = f if m is None else m * f if m.dim() == 1 else f[:, None] * m
    return product, None if c is None else c * f


def shifted(shift: Callable[[], Tensor], size: int, sign: float, inner: Value) -> Value:
    """The map plus one number, or one a feature."""
    m, c = inner
    s = sign * shift().reshape(-1).expand(size)
    return m, s if c is None else c + s


def added(size: int, sign: float, device: torch.device, left: Value, right: Value) -> Value:
    """The sum of two maps, or their difference."""
    (m1, c1), (m2, c2) = left, right
    first, second = dense(m1, size, device), dense(m2, size, device)
    matrix = first + second if sign > 0 else first - second
    if c2 is None:
        return matrix, c1
    return matrix, sign * c2 if c1 is None else c1 + sign * c2


def repeated(times: int, inner: Value) -> Value:
    """A factor for each channel, for patches of the channels, each of this many numbers. It has no offset."""
    m, _ = inner
    return None if m is None else m.repeat_interleave(times), None


def block_diagonal(blocks: Tensor, count: int) -> Tensor:
    """The matrix with ``count`` blocks on its diagonal, given one below the other."""
    return blocks if count == 1 else torch.block_diag(*blocks.chunk(count))


def diagonal_blocks(matrix: Tensor, count: int) -> Tensor:
    """The blocks on the diagonal of a matrix that is zero elsewhere, one below the other."""
    if count == 1:
        return matrix
    return torch.cat([row.chunk(count, 1)[index] for index, row in enumerate(matrix.chunk(count))])


def joined(
    rows: Sequence[Callable[[], Tensor] | None], sizes: Sequence[int], device: torch.device, *maps: Value
) -> Value:
    """Maps of one value side by side; where there is a row of constants, it stands there instead of the next map."""
    left = iter(maps)
    parts: list[Value] = []
    for row, size in zip(rows, sizes, strict=True):
        m, c = next(left) if row is None else (None, row())
        parts.append((dense(m, size, device) if row is None else None, c))
    width = next(m.shape[-1] for m, _ in parts if m is not None)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    filled = list(zip(sizes, parts, strict=True))
    matrix = torch.cat([zeros(size, width) if m is None else m for size, (m, _) in filled])
    if all(c is None for _, c in parts):
        return matrix, None
    return matrix, torch.cat([zeros(size) if c is None else c.to(device) for size, (_, c) in filled])


def placed(under: Callable[[], Tensor], places: Callable[[], Tensor], shifts: bool, inner: Value) -> Value:
    """The map whose features are written over a row of constants, each at its place."""
    (m, c), offset, index = inner, under(), places()
    whole = dense(m, len(index), index.device)
    matrix = torch.zeros(len(offset), whole.shape[-1], dtype=torch.float64, device=index.device)
    matrix = matrix.index_copy(0, index, whole)
    if not shifts:
        return matrix, None
    return matrix, offset.to(index.device).index_copy(0, index, torch.zeros_like(whole[:, 0]) if c is None else c)
