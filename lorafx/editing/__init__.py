"""Knowledge edits: requests, the edit, and patches of a checkpoint that can be taken back.

Imports frontend and everything below.
"""
