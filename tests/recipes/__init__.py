"""Tests of recipes, options and the registry."""
