"""Whether two programs compute the same: runners, inputs, comparisons, and the promises passes are held to.

Imports graph, models and the runner of passes; opens no folder.
"""
