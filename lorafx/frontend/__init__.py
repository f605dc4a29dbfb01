"""From a model or a folder to a program: tracing, the eager model as its judge, opening runs.

Imports formats and everything below.
"""
