"""Begin a pass of one's own: a page that rewrites, trains and folds, and the test that holds it to the laws."""

from __future__ import annotations

import importlib.util
import keyword
import re
from contextlib import suppress
from pathlib import Path
from string import Template
from typing import Any

import click

from ..errors import UsageError
from .shared import PATH, as_json_option, emit

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

_PASS = Template('''"""Scale what each selected weight gives by a learned vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorafx.base import Method, Promise, option
from lorafx.edit import Edit
from lorafx.module import MethodState
from lorafx.site import Site

aten = torch.ops.aten


@dataclass(frozen=True)
class $cls(Method):
    """Scale what each selected weight gives by a learned vector.

    Before: ``y = W x + b``
    After: ``y = l * (W x + b)``, with one factor in l for each output

    Keeps: the outputs, bit by bit, since l begins as ones. Does nothing where no target matches (and says so).
    Source: say here where the maths comes from.
    """

    # What evaluation keeps when the pass has just run; every run is held to it.
    promise: ClassVar[Promise] = Promise.EXACT

    # An option: `--$name.pull 0.1`, `pull = 0.1` in a recipe, and a line of `lorafx passes $name`.
    pull: float = option(0.0, "weight of a penalty that pulls the factors towards one", least=0)

    def rewrite(self, edit: Edit, site: Site) -> None:
        """Change one use of a weight. Insert ordinary operators: folding finds by itself what becomes of them."""
        with edit.after(site.node):
            # of_weight=… instead of nn.init.ones_ makes values of the weight: a singular value decomposition, say.
            scale = edit.parameter(site, "$stem", (site.out_features,), nn.init.ones_)
            wide = edit.cast(site.node, scale.meta["val"].dtype)
            scaled = edit.cast(edit.call(aten.mul.Tensor, wide, scale), site.node.meta["val"].dtype)
            edit.replace(site.node, scaled)

    def finish(self, edit: Edit) -> None:
        """What else trains: a classification head that a task added to the checkpoint."""
        edit.train(edit.program.default_trainable())

    def penalty(self, state: MethodState) -> Tensor | None:
        """What is added to the loss of every training forward."""
        if self.pull == 0.0 or not state.sites:
            return None
        return self.pull * torch.stack([(site["$stem"] - 1).square().mean() for site in state.sites]).mean()
''')

_TEST = Template('''"""$name keeps the laws of every pass, and does what it says."""

from __future__ import annotations

import lorafx
import torch
from lorafx.testing import MethodLaws, captured
from $module import $cls


class TestLaws(MethodLaws):
    step = $cls


def test_the_factors_fold_into_the_weights() -> None:
    base = captured("bert")
    program = lorafx.rewrite(base, [$cls(targets="query")])
    factors = program.names("adapter")
    program.load({name: torch.full_like(program.tensor(name), 2.0) for name in factors})
    folded = lorafx.fold(program)
    for name in factors:
        weight = name.replace("$stem", "weight")
        torch.testing.assert_close(folded.tensor(weight), 2 * base.tensor(weight))
''')

_PROJECT = Template("""[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "lorafx-$name"
version = "0.1.0"
description = "The pass $name for lorafx"
requires-python = ">=3.11"
dependencies = ["lorafx"]

[project.optional-dependencies]
test = ["lorafx[testing]"]

# The name on the left is the name in recipes, and the name of the file on the right.
[project.entry-points."lorafx.passes"]
$name = "$package.$stem:$cls"

[tool.hatch.build.targets.wheel]
packages = ["$package"]

[tool.pytest.ini_options]
pythonpath = ["."]
""")


_CONFTEST = '''"""Tests that change a model which others are handed too fail."""

pytest_plugins = ["lorafx.testing"]
'''


@click.command("new-pass")
@click.argument("name")
@click.option("--package", is_flag=True, help="Write a package that can be installed, in a folder of its own.")
@click.option("--out", "-o", type=PATH, default=".", help="Where to write (default: here).")
@as_json_option
def new_pass(name: str, package: bool, out: Path, as_json: bool) -> None:
    """Begin a pass of your own called NAME: a page that rewrites, trains and folds, and its test.

    In a package (--package) recipes, flags and runs know it as soon as that is installed.
    """
    stem = _checked(name)
    words = {"name": name, "stem": stem, "package": f"lorafx_{stem}"}
    words["cls"] = "".join(part.capitalize() for part in name.split("-"))
    words["module"] = f"{words['package']}.{stem}" if package else stem
    folder = out / f"lorafx-{name}" if package else out
    files = _files(words, package)
    taken = next((folder / file for file in files if (folder / file).exists()), None)
    if taken is not None:
        raise UsageError(f"{taken}: exists already; choose another name, or another -o")
    hidden = words["module"].partition(".")[0]
    if importlib.util.find_spec(hidden) is not None:
        raise UsageError(f"Python has a module {hidden!r} already, which the pass's would hide; choose another name")
    _write(folder, files)
    following = _following(words, folder, package)
    written = [str(folder / file) for file in files]
    emit({"name": name, "files": written, "next": following}, "\n".join([*written, "", *following]), as_json)


def _write(folder: Path, files: dict[str, str]) -> None:
    """Write all of the files, or none."""
    from ..files.whole import write_whole, writing

    wanted = [path for file in files for path in ((folder / file), *(folder / file).parents)]
    made = sorted({path for path in wanted if not path.exists()}, key=lambda path: len(path.parts), reverse=True)
    try:
        with writing(folder):
            for file, text in files.items():
                write_whole(folder / file, text)
    except BaseException:
        for path in made:  # what is in a folder before the folder
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        raise


def _checked(name: str) -> str:
    """The name of the file of a pass of this name; UsageError when none can have it."""
    from ..recipes.registry import known

    stem = name.replace("-", "_")
    if not _NAME.fullmatch(name) or keyword.iskeyword(stem):
        raise UsageError(f"{name!r} is not a name for a pass: lower-case words joined by dashes, like my-pass")
    if name in known():
        raise UsageError(f"a pass {name!r} exists already ({known()[name]}); choose another name")
    return stem


def _files(words: dict[str, Any], package: bool) -> dict[str, str]:
    """What is written, by the path below the folder."""
    code, test = _PASS.substitute(words), _TEST.substitute(words)
    if not package:
        return {f"{words['stem']}.py": code, f"test_{words['stem']}.py": test}
    return {
        "pyproject.toml": _PROJECT.substitute(words),
        "conftest.py": _CONFTEST,
        f"{words['package']}/__init__.py": f'"""The pass {words["name"]} for lorafx."""\n',
        f"{words['package']}/{words['stem']}.py": code,
        f"tests/test_{words['stem']}.py": test,
    }


def _following(words: dict[str, Any], folder: Path, package: bool) -> list[str]:
    """What to do next."""
    test = 'the laws of every pass, and its own test (they need: pip install "lorafx[testing]")'
    if package:
        use = f"lorafx rewrite CHECKPOINT --pass {words['name']} -o run"
        return [f"pip install -e {folder}   # then: {use}", f"pytest {folder}   # {test}"]
    use = f"from {words['module']} import {words['cls']}; lorafx.rewrite(program, [{words['cls']}()])"
    file = folder / f"test_{words['stem']}.py"
    return [f"pytest {file}   # {test}", f"{use}   # with --package, recipes know it by name"]
