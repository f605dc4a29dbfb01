"""What can go wrong: each class has a stable exit code and one-line messages that say what, where and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LorafxError(Exception):
    """Root of every error lorafx raises on purpose. The command line prints it without a traceback."""

    exit_code = 1


class UsageError(LorafxError):
    """An option, a target or a recipe that does not parse, or that matches nothing in this model."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe with an unknown key, a wrong type, or passes that cannot be combined."""


class NoSitesError(UsageError):
    """A pass selected nothing. The message names the nearest misses."""


class CaptureError(LorafxError):
    """The model cannot be captured as a graph (or a pass asks for what the captured graph cannot give)."""

    exit_code = 3


class OperatorError(LorafxError):
    """An operator of a rewritten graph that cannot be computed, or does not give what it gave.

    Attributes:
        node: its name in the graph
    """

    def __init__(self, node: str, why: str):
        super().__init__(f"{node}: {why}")
        self.node = node


class ParityError(LorafxError):
    """Two models that should compute the same function do not, within the tolerance of their dtype."""

    exit_code = 4


class ArtifactError(LorafxError):
    """A checkpoint, adapter, manifest or data file that is missing, truncated, changed or incomplete."""

    exit_code = 5


def first_line(error: BaseException) -> str:
    """The message of another library's error, in one line; never empty, so that no message ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    announced = lines[0].endswith(":") and len(lines) > 1
    return " ".join(lines[:2]) if announced else lines[0]


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the closest candidate, or the empty string when none is close."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
