"""Tests of what counts as equal, and of promises."""
