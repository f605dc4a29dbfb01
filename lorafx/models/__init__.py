"""Knowledge about other people's models: checkpoints, heads and losses, example inputs, and running the eager model.

Imports files; knows no graph.
"""
