"""Whether two programs compute the same: runners, inputs, comparisons, and the checks of what passes promise.

Imports graph, deferred, models and the runner of passes; opens no folder.
"""
