"""Whether a graph from which channels were removed computes, operator by operator, what it computed before.

The analysis claims that it does. Here the claim is tried on the example inputs before it is relied on: the
first operator that gives other values than it gave, in the channels that stayed, is the one whose rule was wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import OperatorError
from ..graph.call import flatten
from ..graph.effects import written
from ..graph.operands import operator_of
from ..graph.precision import tolerance
from ..graph.program import Program
from ..graph.rounding import SAMPLES, jittered, slack
from ..models.eager import same_draws
from .axes import Axes
from .axis import Axis
from .removal import Removal

#: Values smaller than this are rounding of what is 0.
_SMALLEST_SCALE = 1e-6


def outputs(program: Program) -> list[Any]:
    """The program's outputs on its example inputs; OperatorError when an operator raises."""
    return pytree.tree_leaves(_run(program, lambda node, value: None))


def alike(program: Program, sliced: Program) -> bool:
    """Whether two programs' outputs are equal up to rounding, on the example inputs."""
    before, after = outputs(program), outputs(sliced)
    if len(before) != len(after):
        return False
    if all(equal(a, b) for a, b in zip(before, after, strict=True)):
        return True
    moved = [outputs(jittered(program, seed)) for seed in range(SAMPLES)]
    return all(equal(a, b, _slack(a, others)) for a, b, *others in zip(before, after, *moved, strict=True))


def first_difference(program: Program, sliced: Program, axes: Axes, removal: Removal) -> str | None:
    """The name of the first operator whose values in ``sliced`` are not those it has in ``program``; None if none.

    Only values that stay are compared, and nothing that experts put in another order.
    """
    wanted = {node.name: node for node in program.graph.nodes}
    before = _values(program)
    moved = [_values(jittered(program, seed)) for seed in range(SAMPLES)]

    def compare(node: fx.Node, value: Any) -> None:
        old = wanted.get(node.name)
        if old is None or node.op != "call_function":
            return
        slack = _slack(before[node.name], [values[node.name] for values in moved])
        if not _agrees(before[node.name], value, axes.known[old], removal, slack):
            raise OperatorError(node.name, f"{node.target} gives other values")

    try:
        _run(sliced, compare)
    except OperatorError as error:
        return error.node if error.node in wanted else None
    return None


def _agrees(before: Any, after: Any, known: Any, removal: Removal, slack: Any) -> bool:
    """Whether a value, or several, is what stays of another, within the slack of its elements."""
    if not isinstance(before, (list, tuple)):
        return equal(_kept(before, known, removal), _flat(after, known), _kept(slack, known, removal))
    parts = known if known and isinstance(known[0], list) else [[] for _ in before]
    return len(before) == len(after) and all(
        _agrees(b, a, own, removal, free) for b, a, own, free in zip(before, after, parts, slack, strict=True)
    )


def _slack(before: Any, moved: list[Any]) -> Any:
    """How far each element of a value, or of several, may be off by rounding; None where it is not a floating-point
    tensor."""
    if isinstance(before, (list, tuple)):
        return [_slack(part, [other[place] for other in moved]) for place, part in enumerate(before)]
    return slack(before, moved) if isinstance(before, Tensor) and before.is_floating_point() else None


def _values(program: Program) -> dict[str, Any]:
    """What every node gives, by its name."""
    found: dict[str, Any] = {}
    _run(program, lambda node, value: found.__setitem__(node.name, value))
    return found


def _run(program: Program, see: Callable[[fx.Node, Any], None]) -> Any:
    """Run the graph on the example inputs, showing every value; OperatorError names the operator that raises.

    Nothing that the program or its example holds is changed, and two runs draw the same random numbers.
    """
    nodes = list(program.graph.nodes)
    changing = written(program.root, program.graph)
    last = {operand: node for node in nodes for operand in node.all_input_nodes}
    inputs = iter(flatten(program, program.example))
    values: dict[fx.Node, Any] = {}
    with torch.no_grad(), same_draws():
        for node in nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                return args[0]
            try:
                value = next(inputs) if node.op == "placeholder" else _value(program, node, args, kwargs)
            except Exception as error:
                raise OperatorError(node.name, f"{node.target}: {error}") from error
            kept = node.op in ("placeholder", "get_attr") and node in changing and isinstance(value, Tensor)
            values[node] = value.clone() if kept else value
            see(node, value)
            for operand in node.all_input_nodes:
                if last[operand] is node:
                    del values[operand]
    raise AssertionError("a graph ends with its output")


def _value(program: Program, node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_function":
        return operator_of(node)(*args, **kwargs)
    return functools.reduce(getattr, str(node.target).split("."), program.root)  # a tensor, or an inner graph


def _kept(value: Any, axes: list[Axis], removal: Removal) -> Any:
    """The part of a value that stays, with the dimensions of every axis flattened into one."""
    if not isinstance(value, Tensor) or not axes:
        return value
    result = _flat(value, axes)
    first = result.dim() - len(axes)
    for place, axis in enumerate(axes):
        stays = np.flatnonzero(removal.stays(axis.data).ravel())
        result = result.index_select(first + place, torch.from_numpy(stays).to(result.device))
    return result


def _flat(value: Any, axes: list[Axis]) -> Any:
    """A value with the dimensions of every axis flattened into one, behind all others."""
    if not isinstance(value, Tensor) or not axes:
        return value
    order = [dim for axis in axes for dim in axis.dims]
    free = [dim for dim in range(value.dim()) if dim not in order]
    sizes = [value.shape[dim] for dim in free]
    widths = [int(np.prod([value.shape[dim] for dim in axis.dims])) for axis in axes]
    return value.permute(*free, *order).reshape(*sizes, *widths)


def equal(a: Any, b: Any, slack: Tensor | None = None) -> bool:
    """Whether two values are equal up to rounding, within the slack of their elements."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    same = (a == b) | (a.isnan() & b.isnan())  # infinities too
    if same.all():
        return True
    scale = a[a.isfinite()].abs().max().item() if a.isfinite().any() else 0.0
    allowed = tolerance(a.dtype) * max(scale, _SMALLEST_SCALE)
    return bool((same | ((a - b).abs() <= (allowed if slack is None else slack.to(a.device) + allowed))).all())
