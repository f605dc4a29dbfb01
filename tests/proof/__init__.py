"""Tests of proof by default and of timing."""
