"""Captures that tests share: :mod:`lorafx.testing.captures`, which the tests of other packages have too."""

from __future__ import annotations

from lorafx.testing.captures import of_folder, shared

__all__ = ["of_folder", "shared"]
