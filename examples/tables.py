"""A table of real text for each task, made of the Brown corpus and its tags of words.

    python examples/tables.py token_classification OUT      # OUT/train.jsonl and OUT/test.jsonl

Recipes for them are in ``examples/tasks/``. What they ask is known from the corpus alone, so that no label is made up:
which tags the words of a sentence have, and which sentence comes after which.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.assets import brown_tagged
from lorafx.errors import ArtifactError

Row = dict[str, Any]

#: Brown's tags by what they begin with, the longest that fits first, and the twelve classes of words they are here.
CLASSES = {
    "NOUN": ("NN", "NR", "NP"),
    "VERB": ("VB", "MD", "BE", "HV", "DO"),
    "ADJ": ("JJ",),
    "ADV": ("RB", "RN", "RP", "WRB", "QL", "WQL"),
    "PRON": ("PP", "PN", "WP"),
    "DET": ("AT", "DT", "WDT", "AB", "AP"),
    "ADP": ("IN",),
    "NUM": ("CD", "OD"),
    "CONJ": ("CC", "CS"),
    "PRT": ("TO", "EX", "*"),
    "PUNCT": (".", ",", "(", ")", "--", ":", "``", "''", "'"),
}


@dataclass(frozen=True)
class Sentence:
    """One sentence of the corpus: its words and their tags."""

    words: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def text(self) -> str:
        """Its words with spaces between."""
        return " ".join(self.words)


def class_of(tag: str) -> str:
    """The class of a word with a tag of Brown's, ``X`` where it has none of the others."""
    begins = [
        (len(start), name) for name, starts in CLASSES.items() for start in starts if tag.upper().startswith(start)
    ]
    return max(begins)[1] if begins else "X"


def sentences() -> list[Sentence]:
    """All of the corpus of 4 to 40 words, in its order."""
    found = []
    with brown_tagged().open(encoding="utf-8") as file:
        for line in file:
            pairs = [token.rsplit("/", 1) for token in line.split()]
            if 4 <= len(pairs) <= 40 and all(len(pair) == 2 and pair[0] for pair in pairs):
                found.append(Sentence(tuple(word for word, _ in pairs), tuple(tag for _, tag in pairs)))
    return found


def sentence_pairs(corpus: Sequence[Sentence], at: int, chance: random.Random) -> Row:
    """A sentence, and the next one or any other; the label says which."""
    follows = chance.random() < 0.5
    other = corpus[at + 1] if follows else chance.choice(corpus)
    return {"text": corpus[at].text, "text_pair": other.text, "label": "next" if follows else "other"}


def multi_label(corpus: Sequence[Sentence], at: int, chance: random.Random) -> Row:
    """A sentence, and which of names, numbers, pronouns and questions it has."""
    tags = [tag.upper() for tag in corpus[at].tags]
    has = {
        "name": any(tag.startswith("NP") for tag in tags),
        "number": any(tag.startswith("CD") for tag in tags),
        "pronoun": any(tag.startswith("PP") for tag in tags),
        "question": "?" in corpus[at].words,
    }
    return {"text": corpus[at].text, "label": [name for name, there in has.items() if there]}


def regression(corpus: Sequence[Sentence], at: int, chance: random.Random) -> Row:
    """A sentence, and the share of its words that are nouns."""
    classes = [class_of(tag) for tag in corpus[at].tags]
    return {"text": corpus[at].text, "label": classes.count("NOUN") / len(classes)}


def token_classification(corpus: Sequence[Sentence], at: int, chance: random.Random) -> Row:
    """The words of a sentence, and the class of each."""
    return {"tokens": list(corpus[at].words), "tags": [class_of(tag) for tag in corpus[at].tags]}


def question_answering(corpus: Sequence[Sentence], at: int, chance: random.Random) -> Row:
    """Three sentences; asked is how the one goes on that begins with these words."""
    context = " ".join(sentence.text for sentence in corpus[at : at + 3])
    asked = corpus[at + chance.randrange(3)]
    start = context.index(asked.text) + len(" ".join(asked.words[:3])) + 1
    answer = " ".join(asked.words[3:9])
    question = f"How does {' '.join(asked.words[:3])} go on?"
    return {"question": question, "context": context, "answers": {"text": [answer], "answer_start": [start]}}


def embeddings(corpus: Sequence[Sentence], at: int, chance: random.Random) -> Row:
    """A sentence, and the one after it."""
    return {"text": corpus[at].text, "text_pair": corpus[at + 1].text}


TABLES: dict[str, Callable[[Sequence[Sentence], int, random.Random], Row]] = {
    make.__name__: make
    for make in (sentence_pairs, multi_label, regression, token_classification, question_answering, embeddings)
}


def write_tables(name: str, out: Path, train: int = 4000, test: int = 500, seed: int = 0) -> tuple[Path, Path]:
    """The tables of a task, as (train, test) jsonl files in ``out``: rows from different places of the corpus."""
    corpus, chance = sentences(), random.Random(seed)
    places = chance.sample(range(len(corpus) - 3), train + test)
    out.mkdir(parents=True, exist_ok=True)
    files = out / "train.jsonl", out / "test.jsonl"
    for file, chosen in zip(files, (places[:train], places[train:]), strict=True):
        rows = [TABLES[name](corpus, at, chance) for at in chosen]
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables of a task; return the exit code."""
    parser = argparse.ArgumentParser(prog="tables", description="Write the tables of a task into a folder.")
    parser.add_argument("name", metavar="TASK", choices=list(TABLES), help=", ".join(TABLES))
    parser.add_argument("out", type=Path)
    given = parser.parse_args(arguments)
    try:
        print(*write_tables(given.name, given.out), sep="\n")
    except ArtifactError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
