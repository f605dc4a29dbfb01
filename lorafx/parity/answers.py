"""Parity: whether two models compute the same function, shown on inputs of several shapes with padding.

Positions that are padding are left out of outputs that have a value for each token: nothing reads them, and fused
attention may leave anything there. :mod:`lorafx.parity.comparison` says how differences are judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import first_line
from ..graph.domain import leaves_of
from ..graph.precision import coarsest, tolerance
from ..graph.program import Program
from ..graph.rounding import slack
from ..models.eager import same_draws
from ..models.tokenizers import length_limit
from .comparison import Case, Comparison, difference
from .inputs import Batch, Generator
from .runner import Place, Runner, program_runner


def compare(a: Runner, b: Runner, batches: Iterable[Batch], per_token: frozenset[str] = frozenset()) -> Comparison:
    """Compare two runners batch by batch; ``per_token`` names the outputs that have a value for each token."""
    said = ((batch, _outcome(a, batch), _outcome(b, batch)) for batch in batches)
    return _compared(a, b, said, per_token)


Outcome = dict[str, Tensor] | str
#: How far each element of each output may be off before it counts.
Slack = dict[str, Tensor]


def _compared(
    a: Runner,
    b: Runner,
    said: Iterable[tuple[Batch, Outcome, Outcome]],
    per_token: frozenset[str] = frozenset(),
    *,
    same_nan: bool = False,
    slack: Mapping[str, Slack] | None = None,
) -> Comparison:
    lowest = coarsest((a.dtype, b.dtype))
    cases: list[Case] = []
    notes = [f"{runner.label}: {runner.note}" for runner in (a, b) if runner.note]
    for batch, first, second in said:
        if isinstance(first, str) and isinstance(second, str):
            notes.append(f"both refuse inputs {batch.label}: {first}")
        elif isinstance(first, str) or isinstance(second, str):
            refusing, reason = (a, first) if isinstance(first, str) else (b, second)
            problem = f"refused by {refusing.label}: {reason}"
            cases.append(Case(batch.label, "outputs", problem=problem, shapes_differ=True))
        else:
            cases += _cases(batch, first, second, per_token, same_nan, (slack or {}).get(batch.label, {}))
    return Comparison(a.label, b.label, lowest, tolerance(lowest), tuple(cases), tuple(_labels(a, b)), tuple(notes))


@dataclass(frozen=True)
class Answers:
    """A program's outputs for some inputs, computed once: the program may be changed afterwards.

    Attributes:
        runner: how it was run
        batches: the inputs
        outcomes: the outputs for each of them, or why there are none
    """

    runner: Runner
    batches: tuple[Batch, ...]
    outcomes: tuple[Outcome, ...]

    @classmethod
    def of(cls, program: Program, batches: Sequence[Batch], label: str) -> Answers:
        """Run ``program`` on the device of its tensors; the caller's random state stays as it is."""
        device = program.device
        runner = program_runner(program, Place.beside(program), label, seldom=True)
        outcomes = []
        for batch in batches:
            with same_draws([device] if device.type == "cuda" else ()):
                outcomes.append(_outcome(runner, batch))
        return cls(runner, tuple(batches), tuple(outcomes))

    def against(
        self, other: Answers, acceptable: Callable[[Comparison], bool], slack: Mapping[str, Slack] | None = None
    ) -> Comparison:
        """Compare, ``self`` being the reference. Inputs it refuses count only if they are the first.

        Where ``acceptable`` says no, padded positions are found and left out, which takes two more runs.

        Args:
            other: the other program's outputs for the same inputs
            acceptable: whether a comparison is good enough
            slack: how far each element may be off before it counts, by the names of batches and outputs (:meth:`slack`)
        """
        said = list(zip(self.batches, self.outcomes, other.outcomes, strict=True))
        counted = [entry for number, entry in enumerate(said) if number == 0 or not isinstance(entry[1], str)]
        result = _compared(self.runner, other.runner, counted, same_nan=True, slack=slack)
        tokens = frozenset() if acceptable(result) else per_token_outputs(other.runner, None)
        if not tokens:
            return result
        return _compared(self.runner, other.runner, counted, tokens, same_nan=True, slack=slack)

    def slack(self, moved: Sequence[Answers]) -> dict[str, Slack]:
        """The differences that rounding explains, from outputs with every value moved by its last bit."""
        found: dict[str, Slack] = {}
        for number, (batch, outcome) in enumerate(zip(self.batches, self.outcomes, strict=True)):
            if not isinstance(outcome, str):
                others = [other for answers in moved if not isinstance(other := answers.outcomes[number], str)]
                found[batch.label] = {
                    name: slack(value, [other.get(name) for other in others]) for name, value in outcome.items()
                }
        return found


def example_batches(program: Program) -> tuple[Batch, ...]:
    """The inputs a program was captured with, and the first entry of each of their free axes: one row, one token."""
    example = {name: value for name, value in leaves_of(program.example).items() if isinstance(value, Tensor)}
    nodes = [node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")]
    fakes = [value for value in nodes if isinstance(value, Tensor)]
    whole = Batch("the example inputs", example)
    if len(fakes) != len(example):
        return (whole,)
    smallest = {
        name: value[tuple(slice(None if isinstance(size, int) else 1) for size in fake.shape)]
        for (name, value), fake in zip(example.items(), fakes, strict=True)
    }
    return (whole, Batch("the first of the example inputs", smallest)) if smallest else (whole,)


def _outcome(runner: Runner, batch: Batch) -> Outcome:
    try:
        return runner(batch.values)
    except Exception as error:  # whatever a runtime raises counts as that model's result for these inputs
        return first_line(error)


def _cases(
    batch: Batch, a: dict[str, Tensor], b: dict[str, Tensor], per_token: frozenset[str], same_nan: bool, slack: Slack
) -> Iterator[Case]:
    mask = batch.mask
    for name in dict.fromkeys((*a, *b)):
        if name not in a or name not in b:
            side = "first" if name not in a else "second"
            yield Case(batch.label, name, problem=f"the {side} model has no such output", shapes_differ=True)
        elif a[name].shape != b[name].shape:
            problem = f"shape {tuple(a[name].shape)} against {tuple(b[name].shape)}"
            yield Case(batch.label, name, problem=problem, shapes_differ=True)
        else:
            tokens = mask if name in per_token and mask is not None and a[name].shape[:2] == mask.shape else None
            yield difference(batch.label, name, a[name], b[name], tokens, same_nan=same_nan, slack=slack.get(name))


def per_token_outputs(runner: Runner, generator: Generator | None) -> frozenset[str]:
    """The outputs whose second axis follows the length of the text, found by trying two lengths.

    Shapes alone are ambiguous: five logits for a text of five tokens look like one for each token.
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
    # Where only one length is possible, the name decides.
    return frozenset(name for name in found or () if len(lengths) == 2 or name.endswith("hidden_state"))


def _labels(a: Runner, b: Runner) -> Iterator[str]:
    """A difference in the meaning of classes: equal logits under other names are different answers."""
    names = [getattr(runner.config, "id2label", None) for runner in (a, b)]
    if not all(isinstance(name, Mapping) for name in names):
        return
    first, second = ({int(key): str(value) for key, value in name.items()} for name in names if name is not None)
    unnamed = [all(value == f"LABEL_{key}" for key, value in name.items()) for name in (first, second)]
    if any(unnamed) or first == second:
        return
    key = next(key for key in (*first, *second) if first.get(key) != second.get(key))
    yield f"labels differ: class {key} is {first.get(key)!r} in {a.label} and {second.get(key)!r} in {b.label}"
