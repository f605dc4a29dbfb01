"""The order of the folders: imports run one way, from the ground up, and in no circle."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest
import torch

ROOT = Path(__file__).parents[2]
PUBLIC = "lorafx"
#: Folders that hand on the names others use.
HANDING_ON = (PUBLIC, *(f"{PUBLIC}.{folder}" for folder in ("passes", "training", "testing")))


def order() -> list[str]:
    """The folders and files at the root of the package, from the ground up, as CONTRIBUTING.md has them."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"## The order of the folders.*?```\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return block[1].split()


def sources(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package by its import name; ``passes/`` under the name it is imported by."""
    found = {}
    for folder, name in ((root / "lorafx", PUBLIC), (root / "passes", f"{PUBLIC}.passes")):
        for file in sorted(folder.rglob("*.py")):
            if file.is_relative_to(root / "lorafx" / "passes"):
                continue
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((name, *(part for part in parts if part != "__init__")))] = file
    return found


def imports(name: str, file: Path, modules: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """The package's modules that ``file`` imports, anywhere in it, with the line."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == PUBLIC)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            origin = ".".join((*above, *([node.module] if node.module else [])))
            if origin.split(".")[0] == PUBLIC:
                for alias in node.names:
                    inner = f"{origin}.{alias.name}"
                    yield (inner if inner in modules else origin), node.lineno


def place(name: str) -> str:
    """The folder or file at the root that a module is in; empty for the package itself."""
    return [*name.split("."), ""][1]


def upward(root: Path = ROOT) -> list[str]:
    """Every import that does not run downward, as ``file:line imports module``."""
    modules, ranks = sources(root), {name: rank for rank, name in enumerate(order())}
    found = []
    for name, file in modules.items():
        if name == PUBLIC:  # it hands on the public names, lazily
            continue
        for target, line in imports(name, file, modules):
            own, other = place(name), place(target)
            if other == "" or ranks[other] > ranks[own]:
                found.append(f"{file.relative_to(root)}:{line} imports {target}")
    return found


def test_the_order_names_everything_at_the_root() -> None:
    assert {place(name) for name in sources() if name != PUBLIC} == set(order())


def test_no_import_runs_upward() -> None:
    assert upward() == []


def test_no_imports_run_in_a_circle() -> None:
    modules = sources()
    graph = nx.DiGraph()
    for name, file in modules.items():
        edges = ((name, target) for target, _ in imports(name, file, modules))
        graph.add_edges_from(edge for edge in edges if PUBLIC not in edge)
    circles = [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]
    assert circles == []


UPWARD = ("from ..proof import verify", "from lorafx.proof.verify import verify", "import lorafx.proof.verify")


@pytest.mark.parametrize("line", [*UPWARD, "from .. import cli"])
def test_a_planted_upward_import_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "lorafx" / "graph").mkdir(parents=True)
    (tmp_path / "lorafx" / "proof").mkdir()
    (tmp_path / "passes").mkdir()
    for name in ("__init__", "cli", "graph/__init__", "proof/__init__", "proof/verify"):
        (tmp_path / "lorafx" / f"{name}.py").touch()
    (tmp_path / "lorafx" / "graph" / "tree.py").write_text(f"if TYPE_CHECKING:\n    {line}\n", encoding="utf-8")
    (found,) = upward(tmp_path)
    assert found.startswith("lorafx/graph/tree.py:2 imports lorafx.")


def test_folders_say_what_they_are_and_hold_nothing_else() -> None:
    for name, file in sources().items():
        if file.name == "__init__.py" and name not in HANDING_ON:
            body = ast.parse(file.read_text(encoding="utf-8")).body
            assert len(body) == 1, f"{name}: more than a docstring"
            assert ast.get_docstring(ast.Module(body, []))


def test_workers_share_the_cores() -> None:
    """More threads than cores wait for each other: the whole suite took far longer so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    assert torch.get_num_threads() * workers <= max(cores, workers)
