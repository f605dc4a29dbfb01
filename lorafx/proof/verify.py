"""Whether two models, of whatever kind, compute the same function: the public comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArtifactError, UsageError, did_you_mean
from ..graph.domain import leaves_of
from ..models.tokenizers import find_tokenizer, length_limit, pad_token
from ..parity.answers import compare, per_token_outputs
from ..parity.comparison import Comparison
from ..parity.inputs import SHAPES, Batch, Generator, merged, tokenised
from ..parity.runner import Runner
from ..public import Program
from .decoding import hold_generation
from .open import open_runner

#: The longest text compared unless shapes are given. Attention takes time and memory with the square of the length, and
#: #: tables of positions and windows mostly end before; a comparison that stops here says so.
LONGEST = 512


def verify(
    a: Any,
    b: Any,
    texts: Iterable[str] | None = None,
    tokenizer: Any = None,
    shapes: Sequence[tuple[int, int]] | None = None,
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
        texts: real texts to compare on, instead of generated tokens
        tokenizer: makes tokens of them and says on which side to pad; found in either folder when None
        shapes: batch × length of generated inputs, clipped to what both models take; by default small and odd ones, one
            row, one token, and the longest text the models take, up to ``LONGEST`` tokens
        seed: of generated inputs
        dtype: compute both in this dtype; fp64 leaves rounding no room to hide a mistake
        inputs: the caller's own inputs, instead of all that
        provider: ``cpu`` or ``cuda``
        threads: CPU threads of each side
        trust_remote_code: whether code that comes with a folder may run: a checkpoint's own, that in a pickled .pt2
        allow_pickle: whether weights in ``.bin`` files may be read
        base: where the base checkpoint of runs is now, if it was moved

    Raises:
        ArtifactError: a folder cannot be opened
        UsageError: inputs cannot be made, or there is no tokenizer for ``texts``

    A shape that both sides refuse is noted and left out; one that only one of them refuses is a difference, unless it
    was generated here and the graph does not claim to hold for it. What was exported with its cache is compared by what
    it generates (:mod:`lorafx.proof.decoding`).
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
        return _on_given(left, right, inputs)
    tokenizer = tokenizer or find_tokenizer(left.folder, right.folder, trust_remote_code=trust_remote_code)
    if shapes is None and (left.decoder or right.decoder):
        reference, written = (left, right) if right.decoder else (right, left)
        return hold_generation(reference, written, texts, tokenizer, seed)
    generator = _generator(left, right, tokenizer, texts is not None, seed)
    tokens = per_token_outputs(left, generator)
    if texts is not None:
        return compare(left, right, tokenised(texts, tokenizer, generator), tokens)
    if shapes is not None:
        return compare(left, right, generator.batches(shapes), tokens)
    return _on_made_up(left, right, generator, tokens)


def _on_given(left: Runner, right: Runner, inputs: Iterable[Mapping[str, Any]]) -> Comparison:
    """Compared on the caller's inputs, each of which at least one side must take."""
    own = [Batch(f"inputs {number}", leaves_of(values)) for number, values in enumerate(inputs, 1)]
    strange = [name for batch in own for name in batch.values if not (left.takes(name) or right.takes(name))]
    if strange:
        names = [spec.name for spec in (*left.inputs, *right.inputs)]
        raise UsageError(f"neither model takes an input {strange[0]!r}{did_you_mean(strange[0], names)}")
    padded = any(batch.is_padded for batch in own)
    return compare(left, right, own, per_token_outputs(left, None) if padded else frozenset())


def _on_made_up(left: Runner, right: Runner, generator: Generator, tokens: frozenset[str]) -> Comparison:
    """Compared on inputs of the usual shapes, leaving out those that a graph does not claim to hold for."""
    ends, notes = _ends(generator)
    batches = [*generator.batches((*SHAPES, *ends))]
    broken = {batch.label: left.outside(batch.values) or right.outside(batch.values) for batch in batches}
    outside = {label: why for label, why in broken.items() if why}
    notes += tuple(f"not compared on inputs {label}: the graph holds where {why}" for label, why in outside.items())
    result = compare(left, right, (batch for batch in batches if batch.label not in outside), tokens)
    return dataclasses.replace(result, notes=(*result.notes, *notes))


def _ends(generator: Generator) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
    """The shape of the longest text that the models take, if they have a limit; and a note about it."""
    limit = generator.limit
    if limit is None or not any(spec.is_text for spec in generator.specs):
        return (), ()
    note = f"compared on texts of up to {LONGEST} of the {limit} tokens that the models take" if limit > LONGEST else ""
    return ((1, min(limit, LONGEST)),), (note,) if note else ()


def compare_programs(a: Program, b: Program, dtype: torch.dtype | None = None) -> Comparison:
    """Compare two programs on the first one's example inputs; in ``dtype`` if one is given. UsageError on meta."""
    left = open_runner(a, dtype=dtype, label="before")
    right = open_runner(b, dtype=dtype, label="after")
    example = {name: value for name, value in leaves_of(a.example).items() if isinstance(value, Tensor)}
    return compare(left, right, [Batch("the example inputs", example)], per_token_outputs(left, None))


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
