"""`lorafx new-pass`: what it writes works as it is, and is a pass like any other once it is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lorafx.cli import main
from tests.plugin_install import install

ROOT = Path(__file__).parents[2]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_page_and_its_test_are_written_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("new-pass", "my-scale")
    assert result.exit_code == 0, result.output
    assert {file.name for file in tmp_path.iterdir()} == {"my_scale.py", "test_my_scale.py"}
    page = (tmp_path / "my_scale.py").read_text()
    assert "class MyScale(Method):" in page
    assert len(page.splitlines()) < 60, "more than a page"
    assert "$" not in page + (tmp_path / "test_my_scale.py").read_text()
    again = call("new-pass", "my-scale")
    assert again.exit_code == 2
    assert "my_scale.py: exists already" in again.stderr


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("MyPass", "is not a name for a pass"),
        ("a_b", "is not a name for a pass"),
        ("lambda", "is not a name for a pass"),
        ("lora", "a pass 'lora' exists already"),
        ("json", "Python has a module 'json'"),
    ],
)
def test_a_name_that_cannot_be_is_refused(name: str, why: str, tmp_path: Path) -> None:
    result = call("new-pass", name, "-o", tmp_path)
    assert result.exit_code == 2
    assert why in result.stderr
    assert not list(tmp_path.iterdir())


#: What the plug-in of the package's conftest.py finds.
SPOILS = """from lorafx.testing import captured

def test_spoils() -> None:
    next(captured("vit").root.parameters()).data.zero_()
"""


@pytest.mark.slow
def test_a_package_passes_its_own_tests_and_is_known_once_installed(tmp_path: Path) -> None:
    result = call("new-pass", "my-scale", "--package", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    package = tmp_path / "lorafx-my-scale"
    (package / "tests" / "test_others.py").write_text(SPOILS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "error::pytest.PytestUnknownMarkWarning"]
    tests = [sys.executable, "-m", "pytest", *options, str(package)]
    done = subprocess.run(tests, cwd=package, env=environment, capture_output=True, text=True, check=False)
    assert re.search(r"^\d+ passed, 1 error in", done.stdout, re.MULTILINE), done.stdout
    assert "ERROR tests/test_others.py::test_spoils - AssertionError: the shared captured" in done.stdout
    environment["PYTHONPATH"] = os.pathsep.join((str(install(tmp_path / "installed", package)), str(ROOT)))
    shown = [sys.executable, "-m", "lorafx.cli", "passes", "my-scale"]
    done = subprocess.run(shown, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "pull (a number at least 0; default 0.0)" in done.stdout
