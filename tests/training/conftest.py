"""A trainer searches for garbage whenever it begins: shared captures are left out of that, as what other files left."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from lorafx.testing import captures


@pytest.fixture(autouse=True)
def _what_is_shared() -> Iterator[None]:
    """A capture that a test made stays, for others to use. What is set aside with it comes back when all is
    searched (``tests/conftest.py``)."""
    before = captures.kept()
    yield
    if captures.kept() != before:
        gc.freeze()
