"""How far rounding alone moves what a program computes: Monte Carlo arithmetic.

Two correct computations of one function differ by rounding, and some functions amplify it: the deviation of equal rows,
the norm of a constant. Every floating-point value is moved at random within its last bit, several times; within the
range in which an output then moves, no comparison can tell a mistake from rounding.

Source: D. S. Parker, Monte Carlo Arithmetic: exploiting randomness in floating-point arithmetic, 1997.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from .effects import is_view, written
from .program import P

#: How often every value is moved. That four draws all stay below a hundredth of what is usual has odds of 1 to 10⁸.
SAMPLES = 4
#: How many times as far as it was seen to move an output may be. A sum of n terms rounds n times where its operator is
#: moved once, and errors of 10⁴ roundings add up to those of √10⁴.
MARGIN = 100.0


def jittered(program: P, seed: int) -> P:
    """``program``, in evaluation form, with every value it rounds moved at random by up to one unit in the last place.

    Views and values written in place stay; so do integers: masks, counts and zeros involve no rounding.
    """
    result = program.copy()
    held = written(result.root, result.graph)
    *_, last = result.graph.find_nodes(op="placeholder")
    body = last.next
    for number, node in enumerate(list(result.graph.nodes)):
        if node in held or not _rounds(node):
            continue
        with result.graph.inserting_before(body if node.op == "placeholder" else node.next):
            moved = result.graph.call_function(_moved, (node, 1_000_003 * seed + number))
        moved.meta = dict(node.meta)
        node.replace_all_uses_with(moved, delete_user_cb=lambda user, moved=moved: user is not moved)
    return result


def slack(value: Tensor, moved: Iterable[object]) -> Tensor:
    """For each element of ``value`` the difference that rounding explains, from what it was when all was moved."""
    found = torch.zeros_like(value, dtype=torch.float64, device="cpu")
    for other in moved:
        if isinstance(other, Tensor) and other.shape == value.shape:
            gap = (other.detach().cpu().double() - value.detach().cpu().double()).abs()
            found = found.maximum(torch.where(gap.isfinite(), gap, 0.0))
    return MARGIN * found


def _rounds(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and not is_view(node)


def _moved(value: Tensor, seed: int) -> Tensor:
    chance = torch.Generator(value.device).manual_seed(seed)
    bits = torch.randint(0, 2, value.shape, generator=chance, device=value.device, dtype=value.dtype)
    return torch.where(value == value.round(), value, value * (1 - torch.finfo(value.dtype).eps * bits))
