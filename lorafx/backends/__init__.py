"""From a program to what is deployed: ONNX, .pt2, checkpoints, adapters, each compared before it gets its name.

Imports proof and everything below.
"""
