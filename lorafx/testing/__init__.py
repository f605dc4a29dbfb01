"""For the tests of passes, in packages of their own too: the laws that every pass keeps, and tiny models to try it on.

A class in a test file checks a pass against the laws (``pip install "lorafx[testing]"``)::

    from lorafx.testing import MethodLaws

    class TestMyPass(MethodLaws):
        step = MyPass

A ``Method`` has :class:`MethodLaws`, any other pass :class:`RewriteLaws`. The folder is also a pytest plug-in
(``pytest_plugins = ["lorafx.testing"]`` in the root's ``conftest.py``), which fails tests that change a model of
:func:`captured`, since other tests share it.
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
    """A test that changed a shared capture has failed, whatever it asserted."""
    yield
    captures.check()
