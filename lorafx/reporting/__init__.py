"""What happened to a program, as one value: text, HTML, JSON.

Imports graph, recipes and files; measures nothing itself.
"""
