"""The inputs a graph is right for: sizes with their ranges and relations, as the trace concluded, and fixed values.

Where a model's code branches on a size, a graph holds one branch: it is right for the sizes that take it. A size that
was free in the trace is only right above one, because a tracer silently treats 1 as special; whether it is right at 1
too is found by trying (:mod:`lorafx.models.eager`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree
from torch.utils._sympy import functions
from torch.utils._sympy.printers import PythonPrinter

from ..errors import CaptureError, UsageError

#: The smallest size a trace says anything about.
_TRACED = 2
#: So many values of a size are tried one by one.
_FEW = 1 << 12
#: Arguments that are settings of a transformers model, with defaults from its config; not inputs of its graph.
FLAGS = ("use_cache", "output_attentions", "output_hidden_states", "return_dict", "return_loss")

Leaves = Mapping[str, Any]


def leaves_of(inputs: Mapping[str, Any], is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Every leaf of keyword inputs by its path: ``{"x": …, "pair[0]": …}``."""
    flat: Any = pytree.tree_flatten_with_path(dict(inputs), is_leaf=is_leaf)[0]
    return {path[0].key + pytree.keystr(path[1:]): value for path, value in flat}


def nested(like: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword inputs in the structure of ``like``, with ``leaves`` by their paths; what it lacks is as in ``like``, and
    what ``like`` lacks stands beside it."""
    held, spec = leaves_of(like), pytree.tree_structure(dict(like))
    inputs = pytree.tree_unflatten([leaves.get(path, value) for path, value in held.items()], spec)
    return {**inputs, **{path: value for path, value in leaves.items() if path not in held}}


@dataclass(frozen=True)
class Range:
    """The values a size may have, both ends included; ``high`` is None without an upper end."""

    low: int
    high: int | None = None

    def __contains__(self, size: int) -> bool:
        return size >= self.low and (self.high is None or size <= self.high)

    def within(self, low: Any, high: Any) -> Range:
        """The part that is also between ``low`` and ``high``, in the tracer's numbers."""
        bounded = high.is_number and high < 2**62
        highs = [end for end in (self.high, int(high) if bounded else None) if end is not None]
        return Range(max(self.low, int(low)), min(highs, default=None))

    def __str__(self) -> str:
        if self.high == self.low:
            return str(self.low)
        return f"{self.low} or more" if self.high is None else f"{self.low} to {self.high}"


@dataclass(frozen=True)
class Domain:
    """Which inputs a graph is right for.

    Attributes:
        shapes: the axes of each tensor input: a number, or an expression over the free sizes (mostly just one's name)
        ranges: the free sizes by name
        relations: conditions on the free sizes beyond their ranges, as Python expressions
        values: the value of every other input in the trace
    """

    shapes: Mapping[str, tuple[int | str, ...]]
    ranges: Mapping[str, Range]
    relations: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    _compiled: Mapping[str, Callable[..., Any]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Made at once, not on first use: torch.compile could not trace that.
        texts = {*self.relations, *(size for shape in self.shapes.values() for size in shape if isinstance(size, str))}
        names = ", ".join(self.ranges)
        object.__setattr__(self, "_compiled", {text: _function(text, names) for text in texts - set(self.ranges)})

    def sizes(self, leaves: Leaves) -> dict[str, int]:
        """The free sizes that ``leaves`` determine."""
        found: dict[str, int] = {}
        for name, shape in self.shapes.items():
            value = leaves.get(name)
            if isinstance(value, Tensor) and value.dim() == len(shape):
                for size, given in zip(shape, value.shape, strict=True):
                    if size in self.ranges:
                        found.setdefault(str(size), int(given))
        return found

    def evaluate(self, size: int | str, sizes: Mapping[str, int]) -> Any:
        """An axis or a relation for these free sizes; KeyError when one that it needs is not among them."""
        if isinstance(size, int) or size in self.ranges:
            return size if isinstance(size, int) else sizes[size]
        return self._compiled[size](*(sizes[name] for name in self.ranges))

    def shape(self, name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the input ``name`` for these free sizes; KeyError when they do not determine it."""
        return tuple(int(self.evaluate(size, sizes)) for size in self.shapes[name])

    def bounds(self, name: str, axis: int) -> Range:
        """The values that one axis of an input may have."""
        size = self.shapes[name][axis]
        return Range(size, size) if isinstance(size, int) else self.ranges.get(size, Range(1))

    def allows(self, sizes: Mapping[str, int]) -> bool:
        """Whether the free sizes are all in their ranges and relations."""
        inside = all(size in self.ranges[name] for name, size in sizes.items())
        return inside and all(self.holds(relation, sizes) for relation in self.relations)

    def holds(self, relation: str, sizes: Mapping[str, int]) -> bool:
        """Whether a relation holds for these free sizes; false where it divides by zero."""
        try:
            return bool(self.evaluate(relation, sizes))
        except ZeroDivisionError:
            return False

    def implied(self, relation: str) -> bool:
        """Whether a relation of one size, of few values, holds for each of them."""
        names = self.ranges.keys() & re.findall(r"\w+", relation)
        allowed = self.ranges[next(iter(names))] if len(names) == 1 else Range(1)
        sizes = () if allowed.high is None else range(allowed.low, min(allowed.high, allowed.low + _FEW) + 1)
        return 0 < len(sizes) <= _FEW and all(self.holds(relation, dict.fromkeys(self.ranges, n)) for n in sizes)

    def broken(self, inputs: Mapping[str, Any]) -> str:
        """The first relation between sizes that ``inputs`` violate, for people; empty when there is none."""
        sizes = self.sizes(leaves_of(inputs))
        known = sizes.keys() == self.ranges.keys()
        return next((self.readable(one) for one in self.relations if known and not self.holds(one, sizes)), "")

    def check(self, leaves: Leaves, what: str) -> None:
        """UsageError unless the graph of ``what`` is right for ``leaves``: names the input, the axis and the range."""
        sizes = self.sizes(leaves)
        for name, shape in self.shapes.items():
            value = leaves[name]
            if not isinstance(value, Tensor) or value.dim() != len(shape):
                found = f"{value.dim()} axes" if isinstance(value, Tensor) else type(value).__name__
                raise UsageError(f"{what}: input {name!r} is a tensor of {len(shape)} axes in its graph, not {found}")
            for axis, size in enumerate(shape):
                self._check_axis(name, axis, size, int(value.shape[axis]), sizes, what)
        for relation in self.relations:
            if not self.holds(relation, sizes):
                raise UsageError(
                    f"{what}: the graph holds where {self.readable(relation)}, and {self._given(sizes)}; "
                    "capture it with example inputs of such sizes"
                )
        for name, fixed in self.values.items():
            if not _equal(leaves[name], fixed):
                raise UsageError(
                    f"{what}: input {name!r} is {fixed!r} in its graph, not {leaves[name]!r}; capture it so"
                )

    def _check_axis(
        self, name: str, axis: int, size: int | str, found: int, sizes: Mapping[str, int], what: str
    ) -> None:
        allowed = self.bounds(name, axis)
        if found not in allowed:
            raise UsageError(
                f"{what}: dimension {axis} of input {name!r} is {found}, and the graph holds for {allowed}; "
                "capture it with example inputs of such a size"
            )
        if isinstance(size, str) and found != self.evaluate(size, sizes):
            raise UsageError(
                f"{what}: dimension {axis} of input {name!r} is {found}, and has to be {self.readable(size)}, "
                f"that is {self.evaluate(size, sizes)}"
            )

    def places(self, size: str) -> list[tuple[str, int]]:
        """The inputs, and their axes, that are the free size ``size``."""
        return [(name, axis) for name, shape in self.shapes.items() for axis, held in enumerate(shape) if held == size]

    def dynamic_shapes(self, example: Mapping[str, Any]) -> dict[str, Any] | None:
        """The free sizes as ``torch.export`` takes them, for inputs like ``example``; None when every size is fixed."""
        dims: dict[str, Any] = {}
        for size, allowed in self.ranges.items():
            input_, axis = self.places(size)[0] if self.places(size) else ("", 0)
            usual = "batch" if axis == 0 else "target" if input_.startswith("decoder_") else "sequence"
            name = usual if usual not in [dim.__name__ for dim in dims.values()] else f"size_{len(dims)}"
            dims[size] = Dim(name, min=allowed.low, max=allowed.high)
        if not dims:
            return None
        leaves = [
            {a: dims.get(s, Dim.AUTO) for a, s in enumerate(self.shapes.get(name, ())) if isinstance(s, str)} or None
            for name in leaves_of(example)
        ]
        return pytree.tree_unflatten(leaves, pytree.tree_structure(dict(example)))

    def readable(self, text: str) -> str:
        """An expression with ``input.shape[axis]`` in place of the tracer's names."""
        for size in sorted(self.ranges, key=len, reverse=True):
            if size in text:
                name, axis = self.places(size)[0]
                text = text.replace(size, f"{name}.shape[{axis}]")
        return text

    def _given(self, sizes: Mapping[str, int]) -> str:
        return ", ".join(f"{self.readable(name)} is {size}" for name, size in sizes.items())

    def lowered(self, **lows: int) -> Domain:
        """This domain with other lower ends of free sizes."""
        ranges = {name: Range(low, self.ranges[name].high) for name, low in lows.items()}
        return dataclasses.replace(self, ranges={**self.ranges, **ranges})

    @property
    def untold(self) -> dict[str, int]:
        """The free sizes whose lower end may be the tracer's own doing, which takes every size that it computes with
        (one less for a text shifted by a token) to be two or more; with that end."""
        return {name: allowed.low for name, allowed in self.ranges.items() if 1 < allowed.low <= _TRACED + 2}


def _function(text: str, names: str) -> Callable[..., Any]:
    return eval(f"lambda {names}: {text}", {"__builtins__": {}, "max": max, "min": min, "abs": abs, "bool": bool})


def _equal(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))


# ---- from the tracer's result


def domain_of(exported: ExportedProgram, example: Mapping[str, Any], names: tuple[str, ...], shapes: Any) -> Domain:
    """What a trace concluded.

    Args:
        exported: the trace
        example: the inputs it was made on
        names: those of them that the graph takes
        shapes: the dynamic shapes asked for; axes that were given as one dimension count as one, whether or not the
            trace says so

    Raises:
        CaptureError: a conclusion cannot be checked
    """
    values = [node.meta.get("val") for node in input_nodes(exported)]
    traced = leaves_of({name: example[name] for name in names if name in example})
    if len(traced) != len(values):
        extra = ", ".join(name for name in names if name not in example)
        raise CaptureError(f"transformers computes inputs of its own ({extra}), which a call cannot give")
    found = {
        name: [size if isinstance(size, int) else size.node.expr for size in value.shape]
        for name, value in zip(traced, values, strict=True)
        if isinstance(value, Tensor)
    }
    same = _same_symbols(found, shapes)
    symbols = {same.get(s, s) for sizes in found.values() for size in sizes for s in getattr(size, "free_symbols", ())}
    ranges = {str(symbol): Range(_TRACED) for symbol in sorted(symbols, key=str)}
    for symbol, allowed in exported.range_constraints.items():
        name = str(same.get(symbol, symbol))
        if name in ranges:
            ranges[name] = ranges[name].within(allowed.lower, allowed.upper)
    domain = Domain(
        {name: tuple(_written(size, same) for size in sizes) for name, sizes in found.items()},
        ranges,
        tuple(dict.fromkeys(_relations(values, symbols, same))),
        {name: value for name, value in leaves_of(example).items() if name not in found},
    )
    try:
        domain.check(leaves_of(example), "the trace")
    except (UsageError, KeyError, NameError, TypeError) as error:
        raise CaptureError(f"what the trace concluded about its inputs cannot be checked: {error}") from error
    kept = tuple(relation for relation in domain.relations if not domain.implied(relation))
    return dataclasses.replace(domain, relations=kept)


def _same_symbols(found: Mapping[str, list[Any]], shapes: Any) -> dict[Any, Any]:
    """Symbols of axes that were asked for as one dimension, by that dimension's first symbol."""
    wanted = {path: axes for path, axes in leaves_of(shapes or {}, is_axes).items() if axes}
    first: dict[str, Any] = {}
    same: dict[Any, Any] = {}
    for name, sizes in found.items():
        for axis, dim in wanted.get(name, {}).items():
            if getattr(sizes[axis], "is_symbol", False):
                same[sizes[axis]] = first.setdefault(str(dim.__name__), sizes[axis])
    return {symbol: other for symbol, other in same.items() if symbol is not other}


def is_axes(shape: Any) -> bool:
    """Whether ``shape`` says which axes of one tensor are free."""
    return shape is None or (isinstance(shape, dict) and any(isinstance(axis, int) for axis in shape))


def input_nodes(exported: ExportedProgram) -> list[fx.Node]:
    """The placeholders of the user's inputs, constant ones too, in the order of their leaves."""
    nodes = exported.graph.find_nodes(op="placeholder")
    specs = exported.graph_signature.input_specs
    return [node for node, spec in zip(nodes, specs, strict=True) if spec.kind is InputKind.USER_INPUT]


def _written(size: Any, same: Mapping[Any, Any]) -> int | str:
    size = size if isinstance(size, int) else size.subs(same)
    return int(size) if isinstance(size, int) or size.is_number else PythonPrinter().doprint(size)


def _relations(values: list[Any], symbols: set[Any], same: Mapping[Any, Any]) -> Iterator[str]:
    """The guards of the trace that say more about the inputs' free sizes than their ranges do."""
    environments = [value.fake_mode.shape_env for value in values if hasattr(value, "fake_mode")]
    environment: Any = next(iter(environments), None)
    for guard in getattr(environment, "guards", ()):
        relation = environment.simplify(guard.expr).subs(same)
        # The tracer of torch 2.12 leaves a minimum of two multiples of one size as it is; sympy knows which is less.
        plain = relation.replace(functions.Min, sympy.Min).replace(functions.Max, sympy.Max)
        if plain.free_symbols and plain.free_symbols <= symbols and not _is_bound(relation) and not _always(plain):
            yield PythonPrinter().doprint(relation)


def _always(relation: Any) -> bool:
    """Whether an inequality holds for all sizes (``min(4, n) <= n``, say): sympy does not look into minima."""
    if not isinstance(relation, (sympy.Le, sympy.Ge, sympy.Lt, sympy.Gt)):
        return False
    less: Any = relation.lts
    excess = less - relation.gts
    return _at_most_zero(excess + 1 if isinstance(relation, (sympy.Lt, sympy.Gt)) else excess)


def _at_most_zero(value: Any) -> bool:
    """Whether whole numbers of positive sizes are shown to be 0 or less, minima and maxima taken apart."""
    choice = next(iter(value.atoms(sympy.Min, sympy.Max)), None)
    if choice is None:
        return bool(sympy.expand(value).is_nonpositive)
    stand_in = sympy.Dummy(integer=True)
    slope = sympy.expand(value.subs(choice, stand_in)).diff(stand_in)
    if not slope.is_number:
        return False
    # A minimum is at most each of its arguments: any one bounds it from above, all together from below.
    enough = any if isinstance(choice, sympy.Min) == bool(slope > 0) else all
    return enough(_at_most_zero(value.subs(choice, one)) for one in choice.args)


def _is_bound(relation: Any) -> bool:
    """Whether a relation bounds one size, which the tracer makes part of its range."""
    if not isinstance(relation, (sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge)) or len(relation.free_symbols) != 1:
        return False
    left: Any = relation.lhs
    return (left - relation.rhs).diff(*relation.free_symbols).is_number
