"""What the README says is what happens: its Python example runs as it stands, its command lines exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from lorafx.cli import main
from lorafx.recipes.recipe import Recipe

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_first_example_runs_verbatim(
    minilm: Path, movies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "all-MiniLM-L6-v2").symlink_to(minilm)
    lines = movies.read_text(encoding="utf-8").splitlines()
    (tmp_path / "train.csv").write_text("\n".join(lines[:97]) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[0], "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "onnx" / "model.onnx").is_file()
    assert capsys.readouterr().out.startswith("equal: ")


def test_the_recipe_parses() -> None:
    import tomllib

    (text,) = blocks("toml")
    assert [step.pass_name() for step in Recipe.parse(tomllib.loads(text)).passes] == ["lora"]


def test_the_commands_exist() -> None:
    commands = set(re.findall(r"^lorafx ([\w-]+)", "\n".join(blocks("sh")), re.MULTILINE))
    assert commands >= {"rewrite", "train", "fold", "export", "verify", "bench", "inspect", "passes"}
    for command in commands:
        assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0


def test_the_folder_table_names_every_folder() -> None:
    root = Path(__file__).parents[2]
    table = README[README.index("## Folder") : README.index("## Command line")]
    rows = {
        tuple(re.findall(r"`([^`]*)`", line.split("|")[1])): line
        for line in table.splitlines()
        if line.startswith("| `")
    }
    named = {name for row in rows for name in row}
    folders = {f"lorafx/{file.parent.name}/" for file in (root / "lorafx").glob("*/__init__.py")} - {"lorafx/passes/"}
    assert not (folders | {"passes/"}) - named
    missing = [file.stem for file in (root / "passes").glob("[a-z]*.py") if f"`{file.stem}`" not in table]
    assert not missing
    for (first, *_), line in ((row, line) for row, line in rows.items() if row and row[0].endswith("/")):
        for name in re.findall(r"`(\w+\.py)`", line):
            assert (root / first / name).is_file() or (root / "lorafx" / name).is_file(), name


def test_example_recipes_parse() -> None:
    for file in (Path(__file__).parents[2] / "examples").glob("*.toml"):
        assert Recipe.read(file).passes
