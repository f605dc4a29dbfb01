"""What the README says is what happens: its Python example runs as it stands, its command lines exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from examples.assets import smollm2
from lorafx.cli import main
from lorafx.recipes.recipe import Recipe
from tests import foreign
from tests.docs.blocks import blocks as blocks_of
from tests.docs.blocks import commands, redirected, spoken

PAGE = Path(__file__).parents[2] / "README.md"
README = PAGE.read_text(encoding="utf-8")
#: Why a block is a list of commands, of which each line is held to what the command takes.
PARSED = "one line a command, each parsed"


def blocks(language: str) -> list[str]:
    return [block.text for block in blocks_of(PAGE) if block.language == language]


def test_every_block_is_run_here_or_is_a_list() -> None:
    run = [block.language for block in blocks_of(PAGE) if block.excuse is None]
    assert sorted(run) == ["python", "sh", "toml"], "a test below runs each of them"
    (setup,) = (block for block in blocks_of(PAGE) if block.excuse not in (None, PARSED))
    assert [words[:2] for words in commands(setup.text)] == [["make", "demo"], ["make", "test"]]


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


def said(line: str) -> str:
    """What a line of a shell block prints."""
    program, *arguments = shlex.split(line)
    assert program == "lorafx"
    return spoken(arguments, "README.md")


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
    printed = [said(line) for line in lines]
    assert printed[1].strip() == wanted
    assert said(lines[1].replace("merged", "decoder")).strip() == wanted


def test_the_recipe_parses() -> None:
    import tomllib

    (text,) = blocks("toml")
    assert [step.pass_name() for step in Recipe.parse(tomllib.loads(text)).passes] == ["lora"]


def in_main() -> click.Context:
    """What a command is called in. Outside it has other options for help, and keeps those."""
    return click.Context(main, **main.context_settings)


def test_every_line_of_the_list_is_what_its_command_takes() -> None:
    """Parsed as it is typed: commands, options and their values; nothing is run."""
    (listed,) = (block for block in blocks_of(PAGE) if block.excuse == PARSED)
    lines = commands(listed.text)
    assert {line[1] for line in lines} >= {"rewrite", "train", "fold", "export", "verify", "bench", "inspect"}
    for program, name, *arguments in (redirected(line)[0] for line in lines):
        assert program == "lorafx"
        command = main.commands[name]
        if isinstance(command, click.Group):
            name, *arguments = arguments
            command = command.commands[name]
        taken = command.make_context(name, list(arguments), parent=in_main())
        assert not taken.args, f"{name}: {taken.args}"


def test_a_planted_option_that_does_not_exist_is_refused() -> None:
    with pytest.raises(click.NoSuchOption):
        main.commands["fold"].make_context("fold", ["run", "--never", "-o", "folded"], parent=in_main())


def test_every_command_has_help() -> None:
    for command in main.commands:
        assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0


def test_the_folder_table_names_every_folder() -> None:
    root = Path(__file__).parents[2]
    table = README[README.index("## For contributors: folder") :]
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
