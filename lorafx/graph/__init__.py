"""What a program is: a graph over named tensors, the one hand that edits it, and what can be said of it.

Imports models and files; knows no pass.
"""
