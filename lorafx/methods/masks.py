"""Exact masks: a stated number of entries of every group, ties by index; never "all above a threshold"."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from ..errors import UsageError

_N_OF_M = re.compile(r"(\d+):(\d+)")


def lowest(score: Tensor, count: int) -> Tensor:
    """A mask of the ``count`` lowest entries of each row (the last dimension); ties go to the lower index."""
    order = score.argsort(dim=-1, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def highest(score: Tensor, count: int) -> Tensor:
    """A mask of the ``count`` highest entries of each row (the last dimension); ties go to the lower index."""
    order = score.argsort(dim=-1, stable=True, descending=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def kept(fraction: float, size: int) -> int:
    """⌈fraction · size⌉, robust against rounding of the product."""
    return math.ceil(fraction * size - 1e-9 * size)


def dropped(fraction: float, size: int) -> int:
    """⌊fraction · size⌋, robust against rounding of the product."""
    return math.floor(fraction * size + 1e-9 * size)


def check_group(group: str, columns: int, where: str) -> None:
    """UsageError, saying ``where``, unless rows of ``columns`` entries can be pruned by ``group``."""
    if group in ("row", "matrix"):
        return
    found = _N_OF_M.fullmatch(group)
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise UsageError(f"{where}: group {group!r}: write row, matrix or n:m with n below m, e.g. 2:4")
    if columns % int(found[2]):
        raise UsageError(f"{where}: group {group!r}: rows of {columns} entries are not a multiple of {found[2]}")


def lowest_by_group(score: Tensor, fraction: float, group: str) -> Tensor:
    """A mask of the lowest ``fraction`` of every group of a matrix.

    Args:
        score: (rows, columns)
        fraction: of each group; exactly ⌊fraction · size⌋ entries
        group: ``row``, ``matrix``, or ``n:m`` (n of every m neighbours in a row, whatever ``fraction`` is); one that
            :func:`check_group` allows
    """
    if group == "row":
        return lowest(score, dropped(fraction, score.shape[1]))
    if group == "matrix":
        return lowest(score.reshape(1, -1), dropped(fraction, score.numel())).reshape(score.shape)
    count, size = map(int, group.split(":"))
    return lowest(score.reshape(-1, size), count).reshape(score.shape)


def density(value: Tensor) -> float:
    """The share of entries that are not zero."""
    return int(value.count_nonzero()) / value.numel()
