"""Tests of the passes: the laws, each method, and what methods share."""
