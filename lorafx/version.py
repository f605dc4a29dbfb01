"""The version, and nothing else: anyone may import it."""

__version__ = "0.1.0"
