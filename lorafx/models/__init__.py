"""What is known of other people's models: checkpoints, heads and losses, example inputs, what an eager model answers.

Imports files; knows no graph.
"""
