"""Processes that do one thing each and take turns: what is measured beside each other never runs at the same time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any


class Turns:
    """A process that answers each line it is given, one JSON value a line, with a line of JSON.

    Args:
        name: what errors call it
        command: what to start
    """

    def __init__(self, name: str, command: list[str]):
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, value: Any) -> None:
        """Give it something to do."""
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(json.dumps(value) + "\n")
        stdin.flush()

    def answer(self) -> Any:
        """What it says next; SystemExit when it ended instead."""
        stdout = self._process.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended before its time; what it said is above")
        return json.loads(line)

    def ask(self, value: Any) -> Any:
        """Give it something to do and wait for the answer."""
        self.tell(value)
        return self.answer()

    def end(self) -> None:
        """Stop it."""
        self._process.kill()
        self._process.wait()


def questions() -> Iterable[Any]:
    """In such a process: what it is told, one after another."""
    return (json.loads(line) for line in sys.stdin)


def say(value: Any) -> None:
    """In such a process: answer."""
    print(json.dumps(value), flush=True)
