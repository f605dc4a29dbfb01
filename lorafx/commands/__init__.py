"""The command line, command by command.

Imports everything; nothing imports it but cli.
"""
