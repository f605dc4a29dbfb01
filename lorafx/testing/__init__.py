"""For the tests of passes, in packages of their own too: the laws that every pass keeps, and tiny models to try it on.

A pass is held to the laws by a class of a test file (``pip install "lorafx[testing]"``)::

    from lorafx.testing import MethodLaws

    class TestMyPass(MethodLaws):
        step = MyPass

A ``Method`` has :class:`MethodLaws`, any other pass :class:`RewriteLaws`. The folder is a pytest plug-in besides
(``pytest_plugins = ["lorafx.testing"]`` in the root's ``conftest.py``), which fails tests that change a model of
:func:`captured`: others are handed the same one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("lorafx.testing.laws", "lorafx.testing.captures")

from . import captures  # noqa: E402  (after the line above, so that what fails there is explained)
from .laws import MODELS, MethodLaws, PassLaws, RewriteLaws  # noqa: E402
from .models import captured, randomised  # noqa: E402

__all__ = ["MODELS", "MethodLaws", "PassLaws", "RewriteLaws", "captured", "randomised"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    """A test that changed a capture others share has failed, whatever it asserted."""
    yield
    captures.check()
