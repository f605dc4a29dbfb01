"""What a comparison of two models found: one case for each output and batch, and the verdict on all of them.

A difference is judged against the scale of its output (the largest reference value over all inputs) and the tolerance
of the lower precision of the two sides; nothing else can be tuned.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..graph.precision import dtype_name
from ..notebook import shown

#: How many numbers are compared at a time.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Case:
    """One output for one batch of inputs.

    Attributes:
        inputs: the shape, e.g. ``5x33, padded right``
        output: its name
        max_abs: the largest difference
        scale: the largest absolute value of the reference
        index: where the largest difference is
        problem: what numbers cannot express: a missing output, another shape, NaN, a refusal
        shapes_differ: whether the outputs differ in presence, shape or dtype kind
    """

    inputs: str
    output: str
    max_abs: float = math.inf
    scale: float = 0.0
    index: tuple[int, ...] = ()
    problem: str = ""
    shapes_differ: bool = False


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        a, b: names of the two models; a is the reference
        dtype: the lower precision of the two
        tolerance: the largest difference allowed, as a share of an output's scale
        cases: one entry for each output and batch
        problems: what is wrong apart from the outputs, e.g. labels in another order
        notes: what to know, e.g. shapes that both refuse
        checked: what was compared: the ``full`` function, its ``blocks`` one by one, or ``tensors`` by themselves
    """

    a: str
    b: str
    dtype: torch.dtype
    tolerance: float
    cases: tuple[Case, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    checked: str = "full"

    @cached_property
    def scales(self) -> dict[str, float]:
        """The largest absolute reference value of each output, over all inputs."""
        scales: dict[str, float] = {}
        for case in self.cases:
            scales[case.output] = max(case.scale, scales.get(case.output, 0.0))
        return scales

    def relative(self, case: Case) -> float:
        """A case's largest difference as a share of its output's scale."""
        if case.max_abs == 0.0 or case.problem:
            return math.inf if case.problem else 0.0
        scale = self.scales[case.output]
        return case.max_abs / scale if scale > 0.0 else math.inf

    @property
    def worst(self) -> Case | None:
        """The case with the largest difference; None when nothing was compared."""
        return max(self.cases, key=lambda case: (self.relative(case), case.max_abs), default=None)

    @property
    def max_abs(self) -> float:
        """The largest difference; infinite when a case has none, such as a missing output."""
        return max((math.inf if case.problem else case.max_abs for case in self.cases), default=math.inf)

    @property
    def max_rel(self) -> float:
        """The largest difference as a share of its output's scale."""
        return max((self.relative(case) for case in self.cases), default=math.inf)

    @property
    def same_shapes(self) -> bool:
        """Whether both gave the same outputs in the same shapes."""
        return bool(self.cases) and not any(case.shapes_differ for case in self.cases)

    @property
    def ok(self) -> bool:
        """Whether everything agrees within the tolerance."""
        return bool(self.cases) and not self.problems and self.max_rel <= self.tolerance

    @property
    def summary(self) -> str:
        """One line: the verdict and the worst case."""
        if not self.cases:
            return "nothing could be compared: " + "; ".join(self.notes or ("no inputs",))
        if self.max_rel > self.tolerance:
            return self.difference
        if self.problems:
            return self.problems[0]
        return f"equal: largest difference {self.max_rel:.2g} of the scale over {self._over} ({self._limit})"

    @property
    def _over(self) -> str:
        if self.checked == "tensors":
            return f"{len(self.cases)} tensors"
        count = len({case.inputs for case in self.cases})
        return f"{count} batch{'es' if count > 1 else ''}"

    @property
    def difference(self) -> str:
        """Where the worst case is, and its difference."""
        return self.summary if self.worst is None else self.describe(self.worst)

    def first_beyond(self, share: float) -> Case | None:
        """The first case, in the order of the outputs, that is off by more than ``share`` of its scale."""
        return next((case for case in self.cases if case.problem or self.relative(case) > share), None)

    def describe(self, case: Case) -> str:
        """One line: where a case is, and its difference."""
        if case.problem:
            return f"{case.output} for inputs {case.inputs}: {case.problem}"
        where = f"{case.output}{list(case.index)} for inputs {case.inputs}"
        return f"{where} differs by {self.relative(case):.2g} of its scale ({self._limit})"

    @property
    def _limit(self) -> str:
        return f"tolerance {self.tolerance:g} of the scale, {dtype_name(self.dtype)}"

    def __str__(self) -> str:
        return self.summary

    def __repr__(self) -> str:
        return f"<Comparison of {self.a} and {self.b}: {self.summary}>"

    def _repr_html_(self) -> str:
        return shown([f"{self.a} and {self.b}: {self.summary}", *self.problems, *self.notes], [_Cases(self)])

    def text(self) -> str:
        """The summary, then a line for each output, problem and note."""
        lines = [f"{self.a} against {self.b}", self.summary]
        for name in sorted({case.output for case in self.cases}):
            cases = [case for case in self.cases if case.output == name]
            worst = max(cases, key=self.relative)
            numbers = f"{self.relative(worst):.2g} of its scale, {worst.max_abs:.2g} at {list(worst.index)}"
            state = worst.problem or numbers
            lines.append(f"  {name}: {state} ({worst.inputs}; worst of {len(cases)})")
        return "\n".join([*lines, *(f"  {line}" for line in (*self.problems, *self.notes))])

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON values; a difference that is not a number is null, and its case says why."""
        cases = [
            {
                "inputs": case.inputs,
                "output": case.output,
                "max_abs": _finite(case.max_abs),
                "max_rel": _finite(self.relative(case)),
                "index": list(case.index),
                "problem": case.problem or None,
            }
            for case in self.cases
        ]
        return {
            "ok": self.ok,
            "summary": self.summary,
            "checked": self.checked,
            "a": self.a,
            "b": self.b,
            "max_abs": _finite(self.max_abs),
            "max_rel": _finite(self.max_rel),
            "tolerance": self.tolerance,
            "dtype": dtype_name(self.dtype),
            "problems": list(self.problems),
            "notes": list(self.notes),
            "cases": cases,
        }


@dataclass(frozen=True)
class _Cases:
    """A comparison's cases as a table for people."""

    of: Comparison

    title = "Outputs and inputs"
    columns = ("output", "inputs", "largest difference", "of its scale")

    @property
    def rows(self) -> Iterator[tuple[str, ...]]:
        """One a case."""
        for case in self.of.cases:
            gap = (case.problem, "") if case.problem else (f"{case.max_abs:.3g}", f"{self.of.relative(case):.3g}")
            yield case.output, case.inputs, *gap


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def difference(
    inputs: str,
    name: str,
    a: Tensor,
    b: Tensor,
    tokens: Tensor | None = None,
    *,
    same_nan: bool = False,
    slack: Tensor | None = None,
) -> Case:
    """The case of one output, of one shape on both sides.

    Args:
        inputs: the batch's name
        name: the output
        a, b: its values; ``a`` is the reference
        tokens: which positions of the first two axes count; all when None
        same_nan: NaN on both sides is agreement, else it is a problem
        slack: how far each element may be off before it counts (see :mod:`lorafx.graph.rounding`); not at all when None
    """
    kinds_differ = a.is_floating_point() != b.is_floating_point()
    case = Case(inputs, name, 0.0, shapes_differ=kinds_differ)
    counted = False
    for first, block in _blocks(a, b, tokens, slack):
        found = _within(block, same_nan=same_nan)
        if found is None:
            continue
        place, gap, scale, problem = found
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first + place), a.shape))
        if problem:
            return Case(inputs, name, index=index, problem=f"NaN in the {problem} model at {list(index)}")
        further = not counted or gap > case.max_abs
        worst = (gap, index) if further else (case.max_abs, case.index)
        case = dataclasses.replace(case, max_abs=worst[0], index=worst[1], scale=max(scale, case.scale))
        counted = True
    return case if counted else Case(inputs, name, 0.0)


def _blocks(
    a: Tensor, b: Tensor, tokens: Tensor | None, slack: Tensor | None
) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor, Tensor | None]]]:
    """The values in fp64 with what counts and the slack, a block at a time, and where in the flat output each begins.

    The logits of a long text over a large vocabulary are gigabytes in fp64.
    """
    width = a.shape[-1] if a.dim() else 1
    x, y = (value.detach().reshape(-1, width) if width else value.detach().reshape(0, 1) for value in (a, b))
    free = slack.expand(a.shape).reshape(-1, width) if slack is not None else None
    rows = torch.ones(len(x), dtype=torch.bool)
    if tokens is not None:
        kept = tokens.bool().cpu().reshape(*tokens.shape, *[1] * (a.dim() - 2))
        kept = (
            kept.expand(a.shape).reshape(-1, width) if a.dim() == 2 else kept[..., 0].expand(a.shape[:-1]).reshape(-1)
        )
        rows = kept
    step = max(1, _BLOCK // max(1, width))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        counted = rows[part] if rows.dim() == 2 else rows[part, None].expand(-1, width)
        near = free[part].cpu() if free is not None else None
        yield start * width, (x[part].cpu().double(), y[part].cpu().double(), counted, near)


def _within(
    block: tuple[Tensor, Tensor, Tensor, Tensor | None], *, same_nan: bool
) -> tuple[int, float, float, str] | None:
    """Where two blocks are furthest apart, by how much, the scale of the first, and whose NaN there is, if any; None
    where nothing counts."""
    x, y, counted, slack = block
    if same_nan:
        counted = counted & ~(x.isnan() & y.isnan())
    if not bool(counted.any()):
        return None
    for side, value in (("first", x), ("second", y)):
        wrong = value.isnan() & counted
        if bool(wrong.any()):
            return int(wrong.reshape(-1).int().argmax()), 0.0, 0.0, side
    # Equal infinities (logits that a model rules out) are equal, though their difference is not a number.
    gap = torch.where((x == y) | ~counted, 0.0, (x - y).abs())
    if slack is not None:
        gap = (gap - slack).clamp(min=0.0)
    finite = x.abs()[counted & x.isfinite()]
    return int(gap.argmax()), float(gap.max()), float(finite.max()) if finite.numel() else 0.0, ""
