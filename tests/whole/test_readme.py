"""What the README says is what happens: its Python example runs as it stands, its command lines exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from examples.assets import smollm2
from lorafx.cli import main
from lorafx.recipes.recipe import Recipe
from tests import foreign

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


def spoken(line: str) -> str:
    """What a line of a shell block prints."""
    program, *arguments = shlex.split(line)
    assert program == "lorafx"
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_an_adapter_of_peft_in_three_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers as hf

    (lines,) = (block.splitlines() for block in blocks("sh") if "lorafx fold SmolLM2" in block)
    assert [line.split()[1] for line in lines] == ["fold", "generate", "export"]
    (tmp_path / "SmolLM2").symlink_to(smollm2())
    monkeypatch.chdir(tmp_path)
    base: Any = hf.AutoModelForCausalLM.from_pretrained("SmolLM2")
    tokenizer: Any = hf.AutoTokenizer.from_pretrained("SmolLM2")
    (prompt,) = (word for line in lines for word in shlex.split(line) if "France" in word)
    tokens = tokenizer(prompt, return_tensors="pt")
    plain = base.generate(**tokens, max_new_tokens=64, do_sample=False)
    options = {"r": 8, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    adapted = foreign.adapted(base, options)
    foreign.save(adapted, tmp_path / "adapter")
    expected = adapted.generate(**tokens, max_new_tokens=64, do_sample=False)
    assert not torch.equal(plain, expected), "the adapter does something"
    wanted = tokenizer.decode(expected[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    printed = [spoken(line) for line in lines]
    assert printed[1].strip() == wanted
    assert spoken(lines[1].replace("merged", "decoder")).strip() == wanted


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
