"""Regions of a graph that are one affine map, whatever was inserted there, and when folding one is worth it.

Imports graph and the contract of a pass; knows no method and no pass.
"""
