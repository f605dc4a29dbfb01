"""What a program is: a graph over named tensors, the only class that edits it, and analyses of it.

Imports models; knows no pass.
"""
