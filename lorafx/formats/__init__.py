"""Folders as they are written: runs, PEFT adapters, checkpoints, and what goes along with them.

Imports everything a program holds; opening folders is frontend/.
"""
