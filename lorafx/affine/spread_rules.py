"""Which operators compute each row of a value by itself, linearly, and where they leave the axes of the rows."""

from __future__ import annotations

import operator
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from ..graph.operands import argument, dimension

aten = torch.ops.aten

#: The axes of the rows after an operator, given its activations and these axes before; None where it ends a spread.
Layout: TypeAlias = "Callable[[fx.Node, list[fx.Node], tuple[int, ...]], tuple[int, ...] | None]"
Rows: TypeAlias = "tuple[int, ...]"


def shape_of(node: fx.Node) -> Any:
    """The shape of a node's value; None when that is not a tensor."""
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else None


def fixed(sizes: Sequence[Any]) -> bool:
    """Whether all sizes are known numbers."""
    return all(isinstance(size, int) for size in sizes)


def alike(a: Any, b: Any) -> bool:
    """Whether sizes, free ones included, are the same."""
    return list(map(str, a)) == list(map(str, b))


def occurrences(node: fx.Node, values: Sequence[fx.Node]) -> int:
    """How often an operator takes one of ``values``."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda value: found.append(value) or value)
    return sum(value in values for value in found)


def _kept(node: fx.Node, values: list[fx.Node], rows: Rows) -> Rows | None:
    return rows if len(values) == 1 and alike(shape_of(node), shape_of(values[0])) else None


def _cast(node: fx.Node, values: list[fx.Node], rows: Rows) -> Rows | None:
    # Copies and casts alike: between kinds of numbers a cast is not linear.
    before, after = values[0].meta["val"], node.meta["val"]
    return rows if before.dtype == after.dtype or (before.is_floating_point() and after.is_floating_point()) else None


def _permuted(node: fx.Node, values: list[fx.Node], rows: Rows) -> Rows | None:
    count = len(shape_of(node))
    if node.target is aten.permute.default:
        order = [axis % count for axis in argument(node, "dims")]
    else:
        a, b = _axis(node, 1, count), _axis(node, 2, count)
        order = [{a: b, b: a}.get(axis, axis) for axis in range(count)]
    return tuple(order.index(row) for row in rows)


def _axis(node: fx.Node, place: int, count: int) -> int:
    axis = node.args[place] if len(node.args) > place else 0
    assert isinstance(axis, int)
    return axis % count


def _selected(node: fx.Node, values: list[fx.Node], rows: Rows) -> Rows | None:
    axis = _axis(node, 1, len(shape_of(values[0])))
    if axis in rows or not isinstance(node.args[2], int):
        return None
    return tuple(row - (row > axis) for row in rows)


def _sliced(node: fx.Node, values: list[fx.Node], rows: Rows) -> Rows | None:
    start, end, step = (*node.args[2:], *(None, None, 1)[max(len(node.args) - 2, 0) :])
    whole = start in (0, None) and end in (None, sys.maxsize) and step == 1
    if not all(bound is None or isinstance(bound, int) for bound in (start, end, step)):
        return None
    return rows if whole or _axis(node, 1, len(shape_of(node))) not in rows else None


def _split(node: fx.Node, values: list[fx.Node], rows: Rows) -> Rows | None:
    return None if dimension(node, len(shape_of(values[0]))) in rows else rows


def _part(node: fx.Node, values: list[fx.Node], rows: Rows) -> Rows | None:
    return rows if values[0].target in SPLITS else None


def _turned(node: fx.Node, values: list[fx.Node], rows: Rows) -> Rows | None:
    last = len(shape_of(values[0])) - 1
    return tuple(last - row for row in rows)


def _summed(node: fx.Node, values: list[fx.Node], rows: Rows) -> Rows | None:
    count = len(shape_of(values[0]))
    axes = {axis % count for axis in argument(node, "dim") or range(count)}
    if axes & set(rows):
        return None
    stay = len(node.args) > 2 and node.args[2]
    return rows if stay else tuple(row - sum(axis < row for axis in axes) for row in rows)


def _joined(node: fx.Node, values: list[fx.Node], rows: Rows) -> Rows | None:
    """Nothing but activations: a constant part would be an offset."""
    count = len(shape_of(node))
    axis = _axis(node, 1, count)
    if len(argument(node, "tensors")) != len(values):
        return None
    if node.target is aten.stack.default:
        return tuple(row + (row >= axis) for row in rows)
    return None if axis in rows else rows


def _unsqueezed(node: fx.Node, values: list[fx.Node], rows: Rows) -> Rows | None:
    axis = _axis(node, 1, len(shape_of(node)))
    return tuple(row + (row >= axis) for row in rows)


def _squeezed(node: fx.Node, values: list[fx.Node], rows: Rows) -> Rows | None:
    axis = _axis(node, 1, len(shape_of(values[0])))
    if axis in rows:
        return None
    return rows if len(shape_of(node)) == len(shape_of(values[0])) else tuple(row - (row > axis) for row in rows)


def _added(node: fx.Node, values: list[fx.Node], rows: Rows) -> Rows | None:
    return rows if len(values) == 2 else None


def _constant(node: fx.Node, values: list[fx.Node]) -> Any:
    """The other operand of a product; None when both are activations."""
    if len(values) != 1:
        return None
    return next(operand for operand in node.args[:2] if operand is not values[0])


def _repeats(constant: Any, count: int, rows: Rows, axes: int) -> bool:
    """Whether a constant is the same along the rows; its first axes, all but the last ``axes``, are broadcast."""
    if not isinstance(constant, fx.Node):
        return True
    shape = shape_of(constant)
    if shape is None or len(shape) > count:
        return False
    return all(row >= count - axes or row < count - len(shape) or str(shape[row - count]) == "1" for row in rows)


def _scaled(node: fx.Node, values: list[fx.Node], rows: Rows) -> Rows | None:
    constant = _constant(node, values)
    divides = node.target is aten.div.Tensor and node.args[0] is not values[0]
    if constant is None or divides or not _repeats(constant, len(shape_of(values[0])), rows, 0):
        return None
    return rows


def _multiplied(node: fx.Node, values: list[fx.Node], rows: Rows) -> Rows | None:
    constant, count = _constant(node, values), len(shape_of(values[0]))
    if constant is None or len(shape_of(constant)) < 2 or not _repeats(constant, count, rows, 2):
        return None
    contracted = count - 1 if node.args[0] is values[0] else count - 2
    return None if contracted in rows else rows


def _weighted(node: fx.Node, values: list[fx.Node], rows: Rows) -> Rows | None:
    last = len(shape_of(values[0])) - 1
    plain = len(node.args) == 2 and len(values) == 1 and node.args[0] is values[0]
    return rows if plain and last not in rows else None


def _transformed(node: fx.Node, values: list[fx.Node], rows: Rows) -> Rows | None:
    lengths = len(node.args) < 3 and all(isinstance(length, int) for length in node.args[1:])
    return rows if lengths and len(shape_of(node)) - 1 not in rows else None


def _contracted(node: fx.Node, values: list[fx.Node], rows: Rows) -> Rows | None:
    """A product of any axes, in Einstein's notation; the rows' are in the activation and in the result, once."""
    equation, operands = node.args[:2]
    assert isinstance(equation, str)
    assert isinstance(operands, (list, tuple))
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms, place = left.split(","), list(operands).index(values[0])
    if len(values) != 1 or not arrow or len(terms) != len(operands) or len(node.args) > 2:
        return None
    others = "".join(term for index, term in enumerate(terms) if index != place)
    # The axes that dots stand for get letters of their own.
    hidden = len(shape_of(values[0])) - len(terms[place].replace("...", ""))
    dots = "".join(chr(0x3B1 + index) for index in range(hidden))
    mine, given = terms[place].replace("...", dots), result.replace("...", dots)
    if "..." in others or len(mine) != len(shape_of(values[0])) or max(Counter(mine + " ").values()) > 1:
        return None
    letters = [mine[row] for row in rows]
    if any(letter in others or given.count(letter) != 1 for letter in letters):
        return None
    return tuple(given.index(letter) for letter in letters)


#: Operators that change neither the values nor the order of a row's numbers.
PLAIN = (
    *(aten.clone.default, aten.contiguous.default, aten.alias.default),
    *(aten.to.dtype, aten._to_copy.default),
)

#: Operators that give the same numbers other axes.
VIEWS = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default),
    *(aten.flatten.using_ints, aten.unflatten.int),
)

#: Operators that cut a value into several; what they give are its parts.
SPLITS = (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default)

#: What is known of operators. Anything else ends a spread.
LAYOUTS: dict[Any, Layout] = {
    **dict.fromkeys(VIEWS, _kept),
    **dict.fromkeys(PLAIN, _cast),
    **dict.fromkeys((aten.permute.default, aten.transpose.int), _permuted),
    **dict.fromkeys((aten.neg.default, aten.real.default), _kept),
    **dict.fromkeys((aten.stack.default, aten.cat.default), _joined),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _added),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar), _scaled),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default), _multiplied),
    **dict.fromkeys((aten.sum.dim_IntList, aten.mean.dim), _summed),
    **dict.fromkeys((aten.fft_fft.default, aten.fft_ifft.default), _transformed),
    **dict.fromkeys((aten.fft_rfft.default, aten.fft_irfft.default), _transformed),
    **dict.fromkeys(SPLITS, _split),
    operator.getitem: _part,
    aten.t.default: _turned,
    aten.select.int: _selected,
    aten.slice.Tensor: _sliced,
    aten.unsqueeze.default: _unsqueezed,
    aten.squeeze.dim: _squeezed,
    aten.linear.default: _weighted,
    aten.einsum.default: _contracted,
}
