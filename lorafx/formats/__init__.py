"""Writing folders: runs, PEFT adapters, checkpoints, and the files that go along with them.

Imports everything a program holds; opening folders is frontend/.
"""
