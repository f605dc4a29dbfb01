"""Tests of the folders that are written."""
