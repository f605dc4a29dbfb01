"""Names in docstrings and pages are names of something: references, parameters, fields, files, options of commands."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import lorafx
from lorafx.cli import main
from tests.docs.blocks import ROOT, pages

_ROLE = re.compile(r":[a-z]+:`~?\.?(?:[^`<]*<)?([\w.]+)>?`")
_FILE = re.compile(r"`{1,2}((?:lorafx|passes|tests|benchmarks|examples|docs)/[\w/]+\.(?:py|toml|md|svg))`{1,2}")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*(?![\w.-])")
#: Options of other programs, which pages name too.
OTHERS = {"--no-deps", "--upgrade", "--count", "--log", "--show"}

Documented = ast.Module | ast.ClassDef | ast.FunctionDef


def sources() -> dict[Path, ast.Module]:
    files = {file.resolve() for folder in ("lorafx", "passes") for file in (ROOT / folder).rglob("*.py")}
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(files)}


def names(tree: ast.AST) -> Iterator[str]:
    """Every name that code says: no words of docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.alias):
            yield from node.name.split(".")
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def documented(tree: ast.Module) -> Iterator[tuple[Documented, str]]:
    for node in ast.walk(tree):
        if isinstance(node, Documented) and (text := ast.get_docstring(node)):
            yield node, text


def entries(text: str, title: str) -> dict[str, str]:
    """What a section of a docstring says of each name; entries for several names are one for each."""
    found = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    parts = re.split(r"^    (?=\S)", found[1] if found else "", flags=re.MULTILINE)[1:]
    pairs = [part.partition(":") for part in parts]
    return {name.strip("* "): said for head, _, said in pairs for name in head.split(",")}


def parameters(node: Documented) -> set[str]:
    if isinstance(node, ast.ClassDef):
        made = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
        return parameters(made[0]) if made else set()
    if isinstance(node, ast.Module):
        return set()
    given = node.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return {one.arg for one in every}


def fields(node: Documented) -> set[str]:
    """The public fields of a dataclass."""
    if not isinstance(node, ast.ClassDef) or "dataclass" not in "".join(map(ast.unparse, node.decorator_list)):
        return set()
    own = [one for one in node.body if isinstance(one, ast.AnnAssign) and "ClassVar" not in ast.unparse(one.annotation)]
    return {name for one in own if not (name := ast.unparse(one.target)).startswith("_")}


def faults(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """What is wrong in the docstrings of one file."""
    for node, text in documented(tree):
        where = getattr(node, "name", "the module")
        yield from (f"{where}: no {name}" for name in _ROLE.findall(text) if name.split(".")[-1] not in known)
        yield from (f"{where}: no file {name}" for name in _FILE.findall(text) if not (ROOT / name).exists())
        given, taken = entries(text, "Args"), parameters(node)
        yield from (f"{where}: takes no {name}" for name in given.keys() - taken)
        said = " ".join(given.values())
        yield from (f"{where}: {name} runs into another" for name in taken - given.keys() if f" {name}: " in said)
        told = entries(text, "Attributes")
        if told and not where.startswith("_"):
            yield from (f"{where}: says nothing of {name}" for name in fields(node) - told.keys())


def test_docstrings_name_what_there_is() -> None:
    trees = {file.relative_to(ROOT.resolve()): tree for file, tree in sources().items()}
    known = {name for tree in trees.values() for name in names(tree)}
    known |= {part for file in trees for part in (file.stem, file.parent.name)}
    assert [f"{file}: {fault}" for file, tree in trees.items() for fault in faults(tree, known)] == []


PLANTED = '''
@dataclass(frozen=True)
class Fit:
    """How it fits: :func:`measure_all`, as in ``tests/nowhere.py``.

    Attributes:
        largest: the largest difference excess: its share
    """

    largest: float
    excess: float

def load(path, check):
    """Open it.

    Args:
        path: the folder check: compare it
        other: nothing
    """
'''


def test_planted_faults_are_named() -> None:
    assert sorted(faults(ast.parse(PLANTED), {"Fit", "load"})) == [
        "Fit: no file tests/nowhere.py",
        "Fit: no measure_all",
        "Fit: says nothing of excess",
        "load: check runs into another",
        "load: takes no other",
    ]


def test_the_python_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    public = {name: home for name, home in lorafx._HOME.items() if home != "errors"}
    assert [name for name, home in public.items() if f"::: lorafx.{home}.{name}\n" not in text] == []


def options(command: click.Command) -> Iterator[str]:
    yield "--help"
    for one in command.params:
        yield from (*one.opts, *one.secondary_opts)
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        yield from options(inner)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_name_options_and_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert set(_OPTION.findall(text)) - set(options(main)) - OTHERS == set()
    assert [name for name in _FILE.findall(text) if not (ROOT / name).exists()] == []
