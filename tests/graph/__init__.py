"""Tests of what a program is: targets, calls, sizes, weights."""
