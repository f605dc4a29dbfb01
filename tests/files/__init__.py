"""Tests of bytes on disk: where folders are said to lie."""
