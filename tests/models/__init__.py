"""Tests of what is known of checkpoints."""
