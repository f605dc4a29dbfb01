"""What happened to a program, as one value: text, HTML, JSON.

Imports graph and recipes; measures nothing itself.
"""
