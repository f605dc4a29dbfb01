"""Tests of knowledge editing and patches."""
