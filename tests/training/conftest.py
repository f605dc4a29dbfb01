"""A trainer searches for garbage whenever it begins: what other files and shared captures left is left out of that."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from lorafx.testing import captures


@pytest.fixture(autouse=True, scope="module")
def _what_was_there() -> None:
    """Once a file: a search among all that is there, which is then left out, those of the file before put back."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _what_is_shared() -> Iterator[None]:
    """A capture that a test made stays, for others to use. What is set aside with it comes back at the next file."""
    before = captures.kept()
    yield
    if captures.kept() != before:
        gc.freeze()
