"""Tests of what is written for people: every block of code in the documentation and the README."""
