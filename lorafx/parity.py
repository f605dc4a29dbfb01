"""Parity: whether two models compute the same function, shown on inputs of several shapes with padding.

A difference is judged against the scale of its output (the largest reference value over all inputs) and the tolerance
of the lower precision of the two sides; nothing else can be tuned. Positions that are padding are left out of outputs
that have a value for each token: no reader looks at them, and fused attention may hold anything there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .errors import ArtifactError, UsageError, first_line
from .inputs import SHAPES, Batch, Generator, find_tokenizer, length_limit, merged, pad_token, tokenised
from .precision import coarsest, dtype_name, tolerance
from .program import Program
from .runner import Runner, open_runner


@dataclass(frozen=True)
class Case:
    """One output for one batch of inputs.

    Attributes:
        inputs: the shape, e.g. ``5x33, padded right``
        output: its name
        max_abs: the largest difference
        scale: the largest absolute value of the reference
        index: where the largest difference is
        problem: what cannot be said in numbers: a missing output, another shape, NaN, a refusal
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
        problems: what is wrong beside the outputs, e.g. labels in another order
        notes: what to know, e.g. shapes that both refuse
    """

    a: str
    b: str
    dtype: torch.dtype
    tolerance: float
    cases: tuple[Case, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

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
        """The case that is furthest off; None when nothing was compared."""
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
        count = len({case.inputs for case in self.cases})
        batches = f"{count} batch{'es' if count > 1 else ''}"
        return f"equal: largest difference {self.max_rel:.2g} of the scale over {batches} ({self._limit})"

    @property
    def difference(self) -> str:
        """Where the worst case is and how far off."""
        worst = self.worst
        if worst is None:
            return self.summary
        if worst.problem:
            return f"{worst.output} for inputs {worst.inputs}: {worst.problem}"
        where = f"{worst.output}{list(worst.index)} for inputs {worst.inputs}"
        return f"{where} differs by {self.relative(worst):.2g} of its scale ({self._limit})"

    @property
    def _limit(self) -> str:
        return f"tolerance {self.tolerance:g} of the scale, {dtype_name(self.dtype)}"

    def __str__(self) -> str:
        return self.summary

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
        """The comparison as JSON values; a difference that is no number is null and its case says why."""
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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- comparing


def verify(
    a: Any,
    b: Any,
    texts: Iterable[str] | None = None,
    tokenizer: Any = None,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    *,
    inputs: Iterable[Mapping[str, Tensor]] | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    base: Any = None,
) -> Comparison:
    """Compare what two models compute on the same inputs.

    Args:
        a: the reference: a program, a module, a runner, or a folder (checkpoint, run, folded, ONNX)
        b: the other, likewise
        texts: real texts to compare on, instead of made-up tokens
        tokenizer: makes tokens of them and says on which side to pad; found in either folder when None
        shapes: batch × length of made-up inputs; clipped to what both models take
        seed: of made-up inputs
        dtype: compute both in this dtype; fp64 leaves rounding no room to hide a mistake
        inputs: inputs of one's own, instead of all that
        provider: ``cpu`` or ``cuda``
        threads: CPU threads of each side
        trust_remote_code: whether code that comes with a folder may run: a checkpoint's own, that in a pickled .pt2
        allow_pickle: whether weights in ``.bin`` files may be read
        base: where the base checkpoint of runs is now, if it was moved

    Raises:
        ArtifactError: a folder cannot be opened
        UsageError: inputs cannot be made, or there is no tokenizer for ``texts``

    A shape that both sides refuse is noted and left out; one that only one of them refuses is a difference.
    """
    opening = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle, "base": base}
    options: dict[str, Any] = {"dtype": dtype, **opening}
    left, right = (
        side if isinstance(side, Runner) else open_runner(side, provider, threads, **options) for side in (a, b)
    )
    for runner in (left, right):
        if runner.fresh:
            name = min(runner.fresh)
            raise ArtifactError(f"{runner.label}: no weights for {name}; newly initialised ones cannot be compared")
    if inputs is not None:
        own = (Batch(f"inputs {number}", dict(values)) for number, values in enumerate(inputs, 1))
        return compare(left, right, own, _per_token(left, None))
    tokenizer = tokenizer or find_tokenizer(left.folder, right.folder, trust_remote_code=trust_remote_code)
    generator = _generator(left, right, tokenizer, texts is not None, seed)
    batches = generator.batches(shapes) if texts is None else tokenised(texts, tokenizer, generator)
    return compare(left, right, batches, _per_token(left, generator))


def compare_programs(a: Program, b: Program, dtype: torch.dtype | None = None) -> Comparison:
    """Compare two programs on the first one's example inputs; in ``dtype`` if one is given. UsageError on meta."""
    left = open_runner(a, dtype=dtype, label="before")
    right = open_runner(b, dtype=dtype, label="after")
    example = {name: value for name, value in a.example.items() if isinstance(value, Tensor)}
    return compare(left, right, [Batch("the example inputs", example)], _per_token(left, None))


def _generator(a: Runner, b: Runner, tokenizer: Any, needed: bool, seed: int) -> Generator:
    if needed and tokenizer is None:
        raise UsageError(f"no tokenizer in {a.label} or {b.label}; pass one, or leave texts out")
    pad = getattr(tokenizer, "pad_token_id", None)
    return Generator(
        merged(a.inputs, b.inputs),
        seed,
        pad if pad is not None else pad_token(a.config, b.config),
        getattr(tokenizer, "padding_side", "right") == "left",
        length_limit(a.config, b.config),
    )


def compare(a: Runner, b: Runner, batches: Iterable[Batch], per_token: frozenset[str] = frozenset()) -> Comparison:
    """Compare two runners batch by batch; ``per_token`` names the outputs that have a value for each token."""
    lowest = coarsest((a.dtype, b.dtype))
    cases: list[Case] = []
    notes = [f"{runner.label}: {runner.note}" for runner in (a, b) if runner.note]
    for batch in batches:
        first, second = _outcome(a, batch), _outcome(b, batch)
        if isinstance(first, str) and isinstance(second, str):
            notes.append(f"both refuse inputs {batch.label}: {first}")
        elif isinstance(first, str) or isinstance(second, str):
            refusing, reason = (a, first) if isinstance(first, str) else (b, second)
            problem = f"refused by {refusing.label}: {reason}"
            cases.append(Case(batch.label, "outputs", problem=problem, shapes_differ=True))
        else:
            cases += _cases(batch, first, second, per_token)
    return Comparison(a.label, b.label, lowest, tolerance(lowest), tuple(cases), tuple(_labels(a, b)), tuple(notes))


def _outcome(runner: Runner, batch: Batch) -> dict[str, Tensor] | str:
    try:
        return runner(batch.values)
    except Exception as error:  # whatever a runtime raises, it is that model's answer to these inputs
        return first_line(error)


def _cases(batch: Batch, a: dict[str, Tensor], b: dict[str, Tensor], per_token: frozenset[str]) -> Iterator[Case]:
    mask = batch.values.get("attention_mask")
    for name in dict.fromkeys((*a, *b)):
        if name not in a or name not in b:
            side = "first" if name not in a else "second"
            yield Case(batch.label, name, problem=f"the {side} model has no such output", shapes_differ=True)
        elif a[name].shape != b[name].shape:
            problem = f"shape {tuple(a[name].shape)} against {tuple(b[name].shape)}"
            yield Case(batch.label, name, problem=problem, shapes_differ=True)
        else:
            tokens = mask if name in per_token and mask is not None and a[name].shape[:2] == mask.shape else None
            yield _difference(batch.label, name, a[name], b[name], tokens)


def _difference(inputs: str, name: str, a: Tensor, b: Tensor, tokens: Tensor | None) -> Case:
    kinds_differ = a.is_floating_point() != b.is_floating_point()
    x, y = a.detach().cpu().double(), b.detach().cpu().double()
    counted = torch.ones_like(x, dtype=torch.bool)
    if tokens is not None:
        counted &= tokens.bool().reshape(*tokens.shape, *[1] * (x.dim() - 2))
    if not bool(counted.any()):
        return Case(inputs, name, 0.0)
    for side, value in (("first", x), ("second", y)):
        wrong = value.isnan() & counted
        if bool(wrong.any()):
            index = tuple(wrong.nonzero()[0].tolist())
            return Case(inputs, name, index=index, problem=f"NaN in the {side} model at {list(index)}")
    # Equal infinities (logits that a model rules out) are equal, though their difference is no number.
    gap = torch.where((x == y) | ~counted, 0.0, (x - y).abs())
    index = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
    finite = x.abs()[counted & x.isfinite()]
    scale = float(finite.max()) if finite.numel() else 0.0
    return Case(inputs, name, float(gap.max()), scale, index, shapes_differ=kinds_differ)


def _per_token(runner: Runner, generator: Generator | None) -> frozenset[str]:
    """The outputs whose second axis follows the length of the text, found by trying two lengths.

    Shapes alone cannot tell: five logits for five tokens' worth of text look like one a token.
    """
    if generator is None:
        generator = Generator(runner.inputs, limit=length_limit(runner.config))
    if not any(spec.is_mask for spec in generator.specs):
        return frozenset()
    lengths = {generator.clipped(2, length)[1] for length in (3, 4)}
    found: set[str] | None = None
    for length in lengths:
        outputs = _outcome(runner, generator.batch(generator.clipped(2, length)[0], length, [length, length]))
        if isinstance(outputs, str):
            return frozenset()
        here = {name for name, value in outputs.items() if value.dim() >= 2 and value.shape[1] == length}
        found = here if found is None else found & here
    # Where only one length goes, the name has to tell.
    return frozenset(name for name in found or () if len(lengths) == 2 or name.endswith("hidden_state"))


def _labels(a: Runner, b: Runner) -> Iterator[str]:
    """A difference in what the classes mean: equal logits under other names are other answers."""
    names = [getattr(runner.config, "id2label", None) for runner in (a, b)]
    if not all(isinstance(name, Mapping) for name in names):
        return
    first, second = ({int(key): str(value) for key, value in name.items()} for name in names if name is not None)
    unnamed = [all(value == f"LABEL_{key}" for key, value in name.items()) for name in (first, second)]
    if any(unnamed) or first == second:
        return
    key = next(key for key in (*first, *second) if first.get(key) != second.get(key))
    yield f"labels differ: class {key} is {first.get(key)!r} in {a.label} and {second.get(key)!r} in {b.label}"
