"""The fenced blocks of pages, and how each language of them is run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from lorafx.cli import main
from lorafx.recipes.recipe import Recipe

ROOT = Path(__file__).parents[2]
#: Languages of a fence that say something a person would type or save.
SHELLS = ("bash", "sh")
RUNNABLE = ("python", "toml", *SHELLS)

_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^`\n]+)\n(?P<text>.*?)^(?P=indent)``` *$", re.DOTALL | re.MULTILINE)
_EXCUSE = re.compile(r"no-run: *(?P<why>.+)")
_TITLE = re.compile(r'title="(?P<name>[^"]+)"')


@dataclass(frozen=True)
class Block:
    """One fenced block: where it stands, its language, its text; the reason not to run it, and the file that its title
    says it is, if it has them."""

    page: str
    line: int
    language: str
    text: str
    excuse: str | None = None
    title: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """The README and every page of the documentation that people write."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that name a language which is run."""
    return [block for block in _fenced(page) if block.language in RUNNABLE]


def _fenced(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        language, _, info = found["info"].strip().partition(" ")
        excuse, title = _EXCUSE.search(info), _TITLE.search(info)
        lines = [line.removeprefix(found["indent"]) for line in found["text"].splitlines()]
        at = (page.relative_to(ROOT).as_posix(), text.count("\n", 0, found.start()) + 1)
        own = (excuse["why"].strip() if excuse else None, title["name"] if title else None)
        yield Block(*at, language, "\n".join(lines) + "\n", *own)


def run(block: Block, names: dict[str, Any]) -> str:
    """Run a block in the current folder, as a person would; what it printed. ``names`` are what Python blocks share.

    A recipe is read as one; a block with a title is saved under it first. AssertionError says which block failed.
    """
    if block.title is not None:
        Path(block.title).write_text(block.text, encoding="utf-8")
        if block.language == "python":
            return ""  # a module, which other blocks import
    if block.language == "python":
        # Padded, so that a traceback has the line of the page.
        exec(compile("\n" * block.line + block.text, block.page, "exec"), names)
        return ""
    if block.language == "toml":
        assert Recipe.parse(tomllib.loads(block.text)).passes, block
        return ""
    lines = commands(block.text)
    if all(line[:1] == ["lorafx"] for line in lines):
        return "".join(_typed(line[1:], str(block)) for line in lines)
    return _in_shell(block)


def _typed(words: list[str], where: str) -> str:
    """What a line prints; nothing where it goes into a file."""
    own, file = redirected(words)
    said = spoken(own, where)
    if file is None:
        return said
    Path(file).write_text(said, encoding="utf-8")
    return ""


def redirected(words: list[str]) -> tuple[list[str], str | None]:
    """The words of a command, and the file that its output goes into (``> FILE``), if any."""
    return (words[:-2], words[-1]) if words[-2:-1] == [">"] else (words, None)


def commands(text: str) -> list[list[str]]:
    """The words of each command of a shell block: comments left out, continued lines joined."""
    whole = text.replace("\\\n", " ").splitlines()
    return [words for line in whole if (words := shlex.split(line, comments=True))]


def spoken(words: list[str], where: str = "") -> str:
    """What ``lorafx`` with these words prints, run in this process, which has its imports made."""
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, f"{where}: lorafx {shlex.join(words)}: {result.output}\n{result.exception!r}"
    return result.stdout


def _in_shell(block: Block) -> str:
    """A block of other commands, with this environment's programs first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    command = ["bash", "-euo", "pipefail", "-c", block.text]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{block}: {done.stderr}"
    return done.stdout
