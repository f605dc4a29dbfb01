"""Bytes on disk: folders that are whole or not there, and tables of rows.

Imports errors and the version only; knows no model.
"""
