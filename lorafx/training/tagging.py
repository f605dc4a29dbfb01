"""Token classification: a tag for every word of a row, learned at the first token of each word."""

from __future__ import annotations

from typing import Any

from ..errors import UsageError, first_line
from ..files.table import short
from ..models.tasks import IGNORED
from .labels import listed
from .reading import Learned, Reading
from .tokens import Ids

#: Rows tokenised at a time.
_CHUNK = 1000


def learn_tags(reading: Reading) -> Learned:
    """Inputs of rows of words, and for every token the tag of the word that it begins; others are not learned.

    Raises:
        ArtifactError: a row without words, with a word that is not a text, or with more or fewer tags than words
        UsageError: a tokenizer that does not say which word its tokens are of
    """
    reading.refuse("chat", "packing", "text_pair", learns="a tag for every word")
    table, words = reading.table, listed(reading.table, reading.text, words=True)
    tags = listed(table, reading.label, words=True)
    for row, (said, tagged) in enumerate(zip(words, tags, strict=True)):
        odd = [word for word in said if not isinstance(word, str) or not word.strip()]
        if not said or odd:
            found = f"the word {short(odd[0])}, which is not a text" if odd else "no words"
            raise table.error(row, f"{reading.text!r} has {found}; correct or remove the row")
        if len(said) != len(tagged):
            found = f"{len(said)} words in {reading.text!r} and {len(tagged)} tags in {reading.label!r}"
            raise table.error(row, f"{found}; give every word one")
    flat, names = reading.classes().numbered([(row, tag) for row, tagged in enumerate(tags) for tag in tagged])
    numbers, by_row = iter(flat), []
    for tagged in tags:
        by_row.append([next(numbers) for _ in tagged])
    inputs, labels = _encoded(reading, words, by_row)
    return Learned(inputs, {"labels": labels}, names)


def _encoded(reading: Reading, words: list[list[str]], tags: list[list[int]]) -> tuple[dict[str, Ids], Ids]:
    tokenizer, cuts = reading.texts.tokenizer, reading.texts.cuts
    if not tokenizer.is_fast:
        raise UsageError("this tokenizer does not say which word its tokens are of; open it as a fast one")
    inputs: dict[str, Ids] = {}
    labels: Ids = []
    for start in range(0, len(words), _CHUNK):
        chunk = words[start : start + _CHUNK]
        whole = _tokenised(tokenizer, chunk)
        cut = _tokenised(tokenizer, chunk, truncation=True, max_length=cuts.limit)
        for at in range(len(chunk)):
            if len(whole["input_ids"][at]) > cuts.limit:
                cuts.note(start + at, len(whole["input_ids"][at]))
            labels.append(_first_tokens(cut.word_ids(at), tags[start + at]))
        for name, rows in cut.items():
            inputs.setdefault(name, []).extend(list(row) for row in rows)
    return inputs, labels


def _tokenised(tokenizer: Any, words: list[list[str]], **options: Any) -> Any:
    try:
        return tokenizer(words, is_split_into_words=True, verbose=False, **options)
    except (AssertionError, ValueError) as error:  # one that wants to know whether a word begins the text
        raise UsageError(f"its tokenizer does not take words: {first_line(error)}") from None


def _first_tokens(words: list[int | None], tags: list[int]) -> list[int]:
    """The tag of each token that begins a word, by the word that each token is of."""
    before = [None, *words[:-1]]
    return [
        tags[word] if word is not None and word != last else IGNORED for word, last in zip(words, before, strict=True)
    ]
