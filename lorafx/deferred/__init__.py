"""Weights that are computed when they are written: a tensor that remembers how it is made from others, read in tiles.

Imports the data of programs alone (:mod:`lorafx.graph`); knows no pass and no file format.
"""
