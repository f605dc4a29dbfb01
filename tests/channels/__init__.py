"""Tests of which channels go."""
