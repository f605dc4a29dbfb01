"""Bytes on disk: folders that are complete or absent, and tables of rows.

Imports errors and the version only; knows no model.
"""
