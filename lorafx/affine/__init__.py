"""Regions of a graph that compute one affine map, whatever was inserted there, and which of them are worth folding.

Imports graph and the contract of a pass; knows no method and no pass.
"""
