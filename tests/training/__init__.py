"""Tests of training, its data and its interruptions."""
