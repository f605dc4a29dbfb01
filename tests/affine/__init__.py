"""Tests of regions that are one map, and of folding them."""
