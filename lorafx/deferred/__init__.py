"""Weights that are computed when they are written: a tensor that remembers how it is made from others, read in tiles.

Imports graph, and of files what gives memory back; knows no pass and no file format.
"""
