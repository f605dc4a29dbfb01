"""Tests of weights that are computed when they are written."""
