"""What methods share: low-rank factors, gates, masks, schedules, statistics of inputs.

Imports graph, channels and the contract of a pass, and tables of files; knows no single method.
"""
