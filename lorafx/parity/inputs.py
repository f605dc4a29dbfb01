"""Inputs to compare and to time models with: what a model takes, and tensors generated or tokenised to fit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..graph.domain import Range, leaves_of
from ..models.tokenizers import TOKEN_TYPES, is_mask

#: batch × length of the generated inputs: the smallest, the smallest above one, and odd sizes.
SHAPES = tuple((batch, length) for batch in (1, 2, 5) for length in (1, 2, 33))


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: its keyword
        dtype: of the tensor the model takes
        sizes: one entry for each axis; None where it is free
        low, high: integer values lie in ``[low, high)``
        ranges: the sizes that free axes may have, by axis, where more is known about them than that they are positive
    """

    name: str
    dtype: torch.dtype
    sizes: tuple[int | None, ...]
    low: int = 0
    high: int = 2
    ranges: Mapping[int, Range] = field(default_factory=dict)

    @property
    def is_mask(self) -> bool:
        """Whether it says which tokens are padding."""
        return is_mask(self.name)

    @property
    def is_text(self) -> bool:
        """Whether it is a row of integers for each text: token ids, a mask, token types."""
        return len(self.sizes) == 2 and not self.dtype.is_floating_point


@dataclass(frozen=True)
class Batch:
    """Inputs for one call, and how they are named in a result: ``5x33, padded right``."""

    label: str
    values: dict[str, Tensor]

    @property
    def mask(self) -> Tensor | None:
        """Which tokens count, if the inputs say so."""
        return self.values.get("attention_mask")

    @property
    def is_padded(self) -> bool:
        """Whether there is a token that does not count."""
        return self.mask is not None and not bool(self.mask.all())


def specs_of(example: Mapping[str, Any], config: Any = None) -> tuple[InputSpec, ...]:
    """The inputs of a model that takes ``example``, those within others by their paths: batch is free, and so is the
    length of texts."""
    leaves = leaves_of(example).items()
    return tuple(_spec(name, value, config) for name, value in leaves if isinstance(value, Tensor))


def _spec(name: str, value: Tensor, config: Any) -> InputSpec:
    free = 2 if value.dim() == 2 and not value.is_floating_point() else 1
    sizes = tuple(None if axis < free else int(size) for axis, size in enumerate(value.shape))
    low, high = _range(name, value, config)
    return InputSpec(name, value.dtype, sizes, low, high)


def _range(name: str, value: Tensor, config: Any) -> tuple[int, int]:
    """Which integers an input may hold: the vocabulary's for token ids, else those of the example."""
    if value.is_floating_point() or value.dtype == torch.bool or is_mask(name):
        return 0, 2
    text = config.get_text_config() if config is not None else None
    if name == TOKEN_TYPES:
        return 0, max(1, getattr(text, "type_vocab_size", 1) or 1)
    size = getattr(text, "vocab_size", None)
    if size is not None and name.endswith("input_ids"):
        return 0, int(size)
    if value.is_meta or not value.numel():
        return 0, 2
    return int(value.min()), int(value.max()) + 1


def merged(a: Sequence[InputSpec], b: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
    """The inputs two models need together: an axis is free if both leave it free, a value is one both allow.

    Token types that one of them does not take are left out: the other fills them with zeros, which is what the first
    uses. Raises UsageError when neither says what it takes.
    """
    names = list(dict.fromkeys(spec.name for spec in (*a, *b)))
    if not names:
        raise UsageError("neither model says what inputs it takes; pass inputs=[{name: tensor}, …]")
    both = ({spec.name: spec for spec in a}, {spec.name: spec for spec in b})
    result = []
    for name in names:
        found = [side[name] for side in both if name in side]
        if name == TOKEN_TYPES and len(found) == 1 and a and b:
            continue
        first, last = found[0], found[-1]
        if len(first.sizes) != len(last.sizes):  # a graph has the axes it was captured with, a class those made up
            first = last = max(found, key=lambda spec: len(spec.sizes))
        sizes = tuple(x if x is not None else y for x, y in zip(first.sizes, last.sizes, strict=False))
        low, high = max(first.low, last.low), min(first.high, last.high)
        ranges = {axis: _common(first.ranges.get(axis), last.ranges.get(axis)) for axis in range(len(sizes))}
        known = {axis: allowed for axis, allowed in ranges.items() if allowed is not None}
        result.append(dataclasses.replace(first, sizes=sizes, low=low, high=high, ranges=known))
    return tuple(result)


def _common(a: Range | None, b: Range | None) -> Range | None:
    if a is None or b is None:
        return a or b
    highs = [end for end in (a.high, b.high) if end is not None]
    return Range(max(a.low, b.low), min(highs, default=None))


# ---- generated

#: The longest text that is generated because it is the end of a range: beyond it a comparison takes too long.
_LONGEST = 2048


@dataclass(frozen=True)
class Generator:
    """Generates inputs of any shape that a model, or two of them, takes.

    Attributes:
        specs: the inputs
        seed: of the values; the same seed gives the same inputs
        pad: the padding token
        left: whether padding comes before the text
        limit: the longest text the models take, if they have a limit
    """

    specs: tuple[InputSpec, ...]
    seed: int = 0
    pad: int | None = None
    left: bool = False
    limit: int | None = None

    def batches(self, shapes: Iterable[tuple[int, int]]) -> Iterator[Batch]:
        """One batch for each shape, clipped to what the models take, shorter rows padded; shapes that coincide only
        once. The ends of the ranges are added. A single row is not padded, so the longest batch comes a second time
        with padding.
        """
        asked = list(shapes)
        wanted = list(dict.fromkeys(self.clipped(*shape) for shape in (*asked, *self._ends(asked))))
        longest = max((length for _, length in wanted), default=0)
        for batch, length in wanted:
            yield self.batch(batch, length)
            if batch == 1 and length == longest and length > 2 and any(spec.is_mask for spec in self.specs):
                yield self.batch(batch, length, [length // 2])

    def _ends(self, shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The first shape at each end of a range that a model has for its batch or its length."""
        for batch, length in shapes[:1]:
            for axis in (0, 1):
                ends = {end for allowed in self._ranges(axis) for end in (allowed.low, allowed.high) if end is not None}
                for end in sorted(ends):
                    if end <= _LONGEST:
                        yield (end, length) if axis == 0 else (batch, end)

    def _ranges(self, axis: int) -> list[Range]:
        specs = [spec for spec in self.specs if axis == 0 or spec.is_text]
        return [spec.ranges[axis] for spec in specs if axis in spec.ranges and spec.sizes[axis] is None]

    def clipped(self, batch: int, length: int) -> tuple[int, int]:
        """The nearest shape the models take; the length is 0 when no input has one."""
        sizes = [spec.sizes for spec in self.specs if spec.sizes]
        batch = next((size[0] for size in sizes if size[0] is not None), self._inside(0, batch))
        texts = [spec.sizes for spec in self.specs if spec.is_text]
        if not texts:
            return batch, 0
        length = next((size[1] for size in texts if size[1] is not None), self._inside(1, length))
        return batch, min(length, self.limit or length)

    def _inside(self, axis: int, size: int) -> int:
        for allowed in self._ranges(axis):
            size = max(allowed.low, min(size, allowed.high or size))
        return size

    def batch(self, batch: int, length: int, valid: Sequence[int] | None = None) -> Batch:
        """Inputs of one shape. ``valid`` is how many tokens of each row are text; by default fewer in each following
        row."""
        if valid is None:
            masked = any(spec.is_mask for spec in self.specs)
            valid = [max(1, length - row * length // batch) if masked else length for row in range(batch)]
        # Each shape has a stream of its own, so that leaving one out does not change the others.
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + batch * 1_009 + length)
        mask = torch.ones(batch, length, dtype=torch.long)
        for row, count in enumerate(valid):
            mask[row, count:] = 0
        mask = mask.flip(1) if self.left else mask
        values = {spec.name: self._value(spec, mask, random) for spec in self.specs}
        return Batch(self._label(batch, length, mask), values)

    def _label(self, batch: int, length: int, mask: Tensor) -> str:
        if not any(spec.is_text for spec in self.specs):
            return f"batch {batch}"
        padding = "" if bool(mask.all()) else f", padded {'left' if self.left else 'right'}"
        return f"{batch}x{length}{padding}"

    def _value(self, spec: InputSpec, mask: Tensor, random: torch.Generator) -> Tensor:
        batch, length = mask.shape
        # A decoder's text is one longer than the encoder's, so that the two axes cannot be taken for one another.
        extra = 1 if spec.name.startswith("decoder_") and (self.limit is None or length < self.limit) else 0
        free = (batch, length + extra) if spec.is_text else (batch,)
        free += tuple(_size(spec, axis) for axis in range(len(free), len(spec.sizes)))
        sizes = tuple(given if size is None else size for size, given in zip(spec.sizes, free, strict=True))
        if spec.dtype.is_floating_point:
            return torch.randn(sizes, generator=random).to(spec.dtype)
        if spec.is_mask:
            return (mask if sizes == tuple(mask.shape) else torch.ones(sizes, dtype=torch.long)).to(spec.dtype)
        if spec.name == "position_ids":
            return torch.arange(sizes[-1]).expand(sizes).contiguous()
        value = torch.randint(spec.low, max(spec.high, spec.low + 1), sizes, generator=random)
        if spec.name.endswith("input_ids") and spec.high > 8:
            value = self._words(value, mask)
        return value.to(spec.dtype)

    def _words(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids without the padding token, except where there is padding: models look for it."""
        if self.pad is None:
            return ids
        ids = torch.where(ids == self.pad, (ids + 5) % 8, ids)
        return ids.masked_fill(mask == 0, self.pad) if ids.shape == mask.shape else ids


def _size(spec: InputSpec, axis: int) -> int:
    """A size for an axis that no text has: a few, for choices and their tokens, where that is allowed."""
    usual, allowed = 1 if spec.dtype.is_floating_point else 3, spec.ranges.get(axis, Range(1, None))
    return max(allowed.low, min(usual, allowed.high or usual))


# ---- tokenised


def tokenised(texts: Iterable[str], tokenizer: Any, generator: Generator) -> Iterator[Batch]:
    """Real texts in batches of 1, 2, 5, 1, 2, 5, …; empty ones are left out, long ones cut to what the models take.

    Inputs that a tokenizer does not make (a decoder's) are generated.
    """
    lines = [text for text in texts if text.strip()]
    if not lines:
        raise UsageError("no texts to compare on")
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    limit = min(tokenizer.model_max_length, generator.limit or tokenizer.model_max_length)
    start, turn = 0, 0
    while start < len(lines):
        rows = lines[start : start + (1, 2, 5)[turn % 3]]
        cut = {"truncation": True, "max_length": limit} if limit < 1_000_000 else {}
        made = tokenizer(rows, padding=len(rows) > 1, return_tensors="pt", **cut)
        batch, length = made["input_ids"].shape
        rest = generator.batch(batch, length).values
        numbers = f"text {start + 1}" if len(rows) == 1 else f"texts {start + 1} to {start + len(rows)}"
        yield Batch(f"{numbers} ({batch}x{length})", {**rest, **made})
        start, turn = start + len(rows), turn + 1
