"""Passes by name: recipes in TOML, their options, and the registry that finds passes.

Imports the contract of a pass; passes are imported on first use.
"""
