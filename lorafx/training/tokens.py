"""From texts to tokens: cut to a limit and counted, ended with the end-of-text token where a model is to learn it,
followed by a completion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..files.table import Table
from ..models.tasks import IGNORED

#: Rows tokenised at a time.
_CHUNK = 1000

Ids = list[list[int]]


@dataclass
class Cuts:
    """How many rows were cut to ``limit`` tokens, out of how many, and how long the longest was."""

    limit: int
    cut: set[int] = field(default_factory=set)
    longest: int = 0

    def note(self, row: int, length: int) -> None:
        self.cut.add(row)
        self.longest = max(self.longest, length)


@dataclass(frozen=True)
class Texts:
    """Texts of a table on their way to tokens.

    Attributes:
        table: where they come from, for messages
        tokenizer: a transformers tokenizer
        cuts: records what did not fit
        end: the id of the end-of-text token where texts are to end with it
    """

    table: Table
    tokenizer: Any
    cuts: Cuts
    end: int | None = None

    def encode(self, column: str, pair: str | None = None) -> dict[str, Ids]:
        """The inputs of every row, cut to the limit. With ``end``, a text that fits ends with it."""
        texts = self.table.texts(column)
        pairs = None if pair is None else self.table.texts(pair)
        result: dict[str, Ids] = {}
        for start in range(0, len(texts), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            encoded = self._encode(start, texts[chunk], None if pairs is None else pairs[chunk])
            for name, rows in encoded.items():
                result.setdefault(name, []).extend(rows)
        return result

    def _encode(self, start: int, texts: list[str], pairs: list[str] | None) -> dict[str, Ids]:
        encoded = {name: list(rows) for name, rows in self.tokenizer(texts, pairs, verbose=False).items()}
        for row, ids in enumerate(encoded["input_ids"]):
            ends = self.end is None or ids[-1:] == [self.end]
            if len(ids) + (not ends) > self.cuts.limit:
                self.cuts.note(start + row, len(ids))
                pair = () if pairs is None else (pairs[row],)
                limit = {"truncation": True, "max_length": self.cuts.limit}
                # A text cut short must not end with the end-of-text token; other texts keep the special tokens around
                # them.
                cut = encoded if self.end is not None else self.tokenizer(texts[row], *pair, **limit)
                for name in encoded:
                    encoded[name][row] = encoded[name][row][: self.cuts.limit] if cut is encoded else cut[name]
            elif not ends:
                for name in encoded:
                    encoded[name][row] = [*encoded[name][row], self._at_end(name, encoded[name][row])]
        return encoded

    def _at_end(self, name: str, values: Sequence[int]) -> int:
        """The value of one more token in an input: its id, 1 in a mask, or the type of the token before it."""
        if name == "input_ids":
            assert self.end is not None
            return self.end
        return 1 if name == "attention_mask" else values[-1] if values else 0

    def targets(self, column: str) -> Ids:
        """What an encoder-decoder is to write, cut to the limit; with ``end``, a text that fits ends with it."""
        whole = self.tokenizer(text_target=self.table.texts(column), verbose=False)["input_ids"]
        result = []
        for row, ids in enumerate(whole):
            ids = ids if self.end is None or self.end in ids else [*ids, self.end]
            if len(ids) > self.cuts.limit:
                self.cuts.note(row, len(ids))
                (ids,) = self.tokenizer(
                    text_target=[self.table.texts(column)[row]], truncation=True, max_length=self.cuts.limit
                )["input_ids"]
            result.append(ids)
        return result

    def continued(self, column: str, completion: str) -> tuple[dict[str, Ids], Ids]:
        """The inputs and labels of prompts and their completions: the loss is of the completions alone.

        A completion is tokenised as it follows its prompt, unless that would change the prompt's own tokens: a model
        will be given those. ArtifactError for a row whose prompt leaves no room for a token to learn.
        """
        before, after = self._brackets()
        inputs: dict[str, Ids] = {"input_ids": [], "attention_mask": []}
        labels: Ids = []
        for row, (prompt, rest) in enumerate(self._pairs(column, completion)):
            known, learned = [*before, *prompt], [*rest, *after]
            if self.end is not None and learned[-1:] != [self.end]:
                learned.append(self.end)
            length, limit = len(known) + len(learned), self.cuts.limit
            if length > limit:
                self.cuts.note(row, length)
            if len(known) >= limit or not learned:
                found = f"{column!r} has {len(known)} of {limit} tokens: nothing of {completion!r} is left to learn"
                raise self.table.error(row, f"{found}; raise max_length or remove the row")
            inputs["input_ids"].append([*known, *learned][:limit])
            inputs["attention_mask"].append([1] * min(length, limit))
            labels.append([*[IGNORED] * len(known), *learned][:limit])
        return inputs, labels

    def _pairs(self, column: str, completion: str) -> Iterator[tuple[list[int], list[int]]]:
        prompts, rests = self.table.texts(column), self.table.texts(completion)
        for start in range(0, len(prompts), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            joined = [prompt + rest for prompt, rest in zip(prompts[chunk], rests[chunk], strict=True)]
            bare = map(self._bare, (prompts[chunk], joined, rests[chunk]))
            for known, both, alone in zip(*bare, strict=True):
                yield known, both[len(known) :] if both[: len(known)] == known else alone

    def _bare(self, texts: list[str]) -> Ids:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _brackets(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before a text and after it."""
        text = "a"
        whole, (inner,) = self.tokenizer(text, verbose=False)["input_ids"], self._bare([text])
        place = next(at for at in range(len(whole) + 1) if whole[at : at + len(inner)] == inner)
        return whole[:place], whole[place + len(inner) :]
