"""The command line as people use it: results on stdout, one-line errors, stable exit codes, nothing half-written."""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lorafx.cli import main
from lorafx.commands.flags import option_values, train_options
from lorafx.commands.shared import after_all, seldom_collecting
from lorafx.editing.requests import EditOptions
from lorafx.errors import UsageError
from lorafx.recipes.options import TrainOptions

RECIPE = """
[model]
task = "text-classification"
num_labels = 2

[[pass]]
name = "lora"
rank = 4
alpha = 8.0
"""


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_garbage_is_searched_for_seldom_only_while_a_command_runs():
    often = gc.get_threshold()
    with seldom_collecting():
        assert gc.get_threshold() == (100 * often[0], *often[1:])
    assert gc.get_threshold() == often
    assert call("rewrite", "nowhere", "--pass", "lora", "-o", "out").exit_code == 5
    assert gc.get_threshold() == often, "after an error, too"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipes") / "lora.toml"
    file.write_text(RECIPE, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_table: Path, recipe: Path) -> Path:
    """A run made and trained through the command line."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = call("rewrite", tiny_checkpoint, "--recipe", recipe, "-o", folder)
    assert result.exit_code == 0, result.output
    scored = ["--data", tiny_table, "--eval", tiny_table]
    result = call("train", folder, *scored, "--epochs", 2, "--batch-size", 16, "--learning-rate", "5e-3")
    assert result.exit_code == 0, result.output
    answer, following = result.stdout.splitlines()
    assert re.fullmatch(
        rf"{folder}: Bert.* from tiny-bert: lora on 13 weights; accuracy 0\.\d+ → [01]\.\d+; .*", answer
    )
    assert following == f"Next: lorafx export {folder} -o {folder.with_name('onnx')}"
    return folder


@pytest.fixture(scope="module")
def folded(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run folded, every step verified."""
    folder = tmp_path_factory.mktemp("folded") / "folded"
    result = call("fold", run, "-o", folder, "--verify-each")
    assert result.exit_code == 0, result.output
    opened = f"Next: AutoModelForSequenceClassification.from_pretrained({str(folder)!r}), in transformers"
    assert result.stdout.splitlines()[-1] == opened
    return folder


@pytest.fixture(scope="module")
def onnx_folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run as ONNX."""
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    result = call("export", run, "-o", folder)
    assert result.exit_code == 0, result.output
    answer, following = result.stdout.splitlines()
    assert re.search(r"; accuracy 0\.\d+ → [01]\.\d+; [\d.]+ MB, .*; equal to \d\.\de-0\d of the scale", answer)
    assert following == f"Next: lorafx bench {run} {folder}"
    return folder


def test_help_is_fast_and_imports_no_torch() -> None:
    """CPU seconds of a whole process; half of them is the interpreter itself."""
    code = "import sys; from lorafx.cli import main; sys.argv = ['lorafx', '--help']\n"
    code += "try: main()\nfinally: assert 'torch' not in sys.modules"
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(times) < 0.15


def test_passes_lists_and_describes() -> None:
    listed = json.loads(call("passes", "--json").stdout)
    assert {"lora", "to-eval", "fold-affine", "fold-constants", "tidy"} <= set(listed)
    described = json.loads(call("passes", "lora", "--json").stdout)
    assert described["options"]["rank"]["default"] == 8


def test_a_pass_tells_its_defaults_as_one_writes_them() -> None:
    """And in words where there is nothing to write."""
    told = {line.split()[0]: line for name in ("tied-lora", "activation") for line in options_of(name)}
    for key, default in {
        "targets": '"all-linear"',
        "exclude": "none",
        "blocks": "all",
        "allow_empty": "false",
        "trainable": '["auto"]',
        "train": '["A", "B", "u", "v"]',
        "scale": "1.0",
        "scaling_rate": "that of the training",
        "data": "the example inputs",
    }.items():
        assert f"; default {default}): " in told[key], told[key]


def options_of(name: str) -> list[str]:
    return call("passes", name).stdout.partition("Options:\n")[2].splitlines()


def test_dry_run_prints_sites_and_misses_and_writes_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = call("rewrite", tiny_checkpoint, "--pass", "lora", "--lora.targets", "query,value", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    step = json.loads(result.stdout)["passes"][0]
    assert len(step["taken"]) == 4
    assert any("embedding" in str(module) for modules in step["missed"].values() for module in modules)
    assert not list(tmp_path.iterdir())


def test_the_whole_path(run: Path, folded: Path, onnx_folder: Path, tmp_path: Path) -> None:
    for a, b in ((run, folded), (folded, onnx_folder), (run, onnx_folder)):
        result = call("verify", a, b, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["ok"]
    page = tmp_path / "page.html"
    result = call("bench", folded, onnx_folder, "--shape", "1x8", "--repeats", 3, "--json", "--page", page)
    assert result.exit_code == 0, result.output
    assert "Scored and timed" in page.read_text(encoding="utf-8"), "on the same rows: one training"
    assert call("inspect", run).exit_code == 0
    assert call("inspect", onnx_folder).exit_code == 0


UNEVEN = """
[[pass]]
name = "magnitude"
targets = "role:ffn.down"
blocks = "0"
keep = 0.3

[[pass]]
name = "magnitude"
targets = "role:ffn.down"
blocks = "1"
keep = 0.6
"""


@pytest.mark.slow
def test_widths_are_left_as_asked(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Of 64 neurons 20 and 39 stay; a flag wins over the recipe, which wins over removing all that can go."""
    from transformers import AutoModel

    def widths(made: Result | Path) -> list[int]:
        if isinstance(made, Result):
            assert made.exit_code == 0, made.output
        report = json.loads(made.read_text() if isinstance(made, Path) else made.stdout)
        rows = report["sections"]["dead-channels: Removed"]
        return [json.loads(row["after"])[0] for row in rows if row["tensor"].endswith("intermediate.dense.weight")]

    for name, more in (("plain", ""), ("rounded", '[[pass]]\nname = "dead-channels"\nround_to = 16\n')):
        (tmp_path / f"{name}.toml").write_text(UNEVEN + more, encoding="utf-8")
        made = call("rewrite", tiny_checkpoint, "--recipe", tmp_path / f"{name}.toml", "-o", tmp_path / name)
        assert made.exit_code == 0, made.output
    plain, rounded = tmp_path / "plain", tmp_path / "rounded"
    assert widths(call("fold", plain, "-o", tmp_path / "0", "--json")) == [20, 39]
    sizes = json.loads((tmp_path / "0" / "config.json").read_text())["per_layer_config"]
    assert sizes == {"0": {"intermediate_size": 20}, "1": {"intermediate_size": 39}}
    assert call("verify", plain, tmp_path / "0").exit_code == 0
    assert call("export", plain, "-o", tmp_path / "pt2", "--format", "pt2").exit_code == 0
    assert call("verify", plain, tmp_path / "pt2").exit_code == 2  # a .pt2 runs code when it is opened
    assert call("verify", plain, tmp_path / "pt2", "--trust-remote-code").exit_code == 0
    assert call("bench", tmp_path / "pt2", "--trust-remote-code", "--shape", "1x8", "--repeats", 3).exit_code == 0
    assert widths(call("fold", rounded, "-o", tmp_path / "1", "--json")) == [32, 48]
    assert widths(call("fold", rounded, "-o", tmp_path / "2", "--round-to", 8, "--json")) == [24, 40]
    assert widths(call("fold", plain, "-o", tmp_path / "3", "--uniform", "--json")) == [39, 39]
    assert AutoModel.from_pretrained(tmp_path / "3").config.intermediate_size == 39
    for options, expected in (([], [24, 40]), (["--keep-at-least", 30], [32, 40])):
        made = call("export", plain, "-o", tmp_path / "cuda", "--provider", "cuda", "--overwrite", *options)
        assert made.exit_code == 0, made.output
        assert widths(tmp_path / "cuda" / "report.json") == expected
    assert call("export", plain, "-o", tmp_path / "4", "--format", "hf", "--uniform").exit_code == 0
    assert call("verify", plain, tmp_path / "4").exit_code == 0


@pytest.mark.filterwarnings("default")  # the quantiser's own
def test_an_exported_file_is_quantised_by_onnx_runtime_as_it_is(onnx_folder: Path, tmp_path: Path) -> None:
    import onnx

    from tests.backends.as_it_is import accepted

    size, off = accepted(onnx_folder / "model.onnx", tmp_path)
    assert size < sum(file.stat().st_size for file in onnx_folder.glob("model.onnx*"))
    # One of 255 steps over what each weight and activation spans, through two layers.
    assert off < 0.1
    traces = {entry.key for node in onnx.load(onnx_folder / "model.onnx").graph.node for entry in node.metadata_props}
    assert not {key for key in traces if key.endswith("stack_trace")}, "paths of the author's machine"


def test_what_is_written_can_be_read_by_others(run: Path, onnx_folder: Path) -> None:
    umask = os.umask(0o022)
    os.umask(umask)
    for folder in (run, onnx_folder):
        assert {oct(file.stat().st_mode & 0o666) for file in folder.iterdir()} == {oct(0o666 & ~umask)}
        assert ".tmp-" not in (folder / "report.json").read_text(), "the folder it was written into"


def test_what_is_written_says_nothing_of_where_it_was_written(
    run: Path, folded: Path, onnx_folder: Path, tiny_checkpoint: Path
) -> None:
    """But for PEFT's own note of the base, which is what it opens it by."""
    inside = str(Path(os.path.commonpath([run, folded, onnx_folder, tiny_checkpoint]))).encode()
    assert len(Path(inside.decode()).parts) > 1
    for file in (file for folder in (run, folded, onnx_folder) for file in folder.rglob("*") if file.is_file()):
        assert file.name == "adapter_config.json" or inside not in file.read_bytes(), file.name
    record = json.loads((onnx_folder / "lorafx.json").read_text())["meta"]["base"]
    assert record["name"] == tiny_checkpoint.name


def test_the_folders_open_without_lorafx(run: Path, folded: Path, onnx_folder: Path, tiny_checkpoint: Path) -> None:
    """PEFT opens the run, transformers the folded folder and the ONNX folder, all with the same logits."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.exporters.base import ExportedModel

    tokenizer = AutoTokenizer.from_pretrained(onnx_folder)
    batch = tokenizer(["the film was good", "it is not a very great movie and"], padding=True, return_tensors="pt")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint, num_labels=2)
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, run).eval()(**batch).logits
        merged = AutoModelForSequenceClassification.from_pretrained(folded).eval()(**batch).logits
    exported = ExportedModel.from_pretrained(onnx_folder)(**batch).logits
    # fp32 with another order of additions; logits are of order one.
    torch.testing.assert_close(adapted, merged, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, exported, rtol=1e-5, atol=1e-5)


def test_inspect_tells_what_came_of_a_run_and_of_an_export(run: Path, onnx_folder: Path) -> None:
    shown = call("inspect", run).stdout
    assert re.search(r"; accuracy 0\.\d+ → [01]\.\d+; ", " ".join(shown.split()))
    assert "Tensors by role" in shown
    assert "attention.self.query" not in shown
    assert "bert.encoder.layer.0.attention.self.query" in call("inspect", run, "--details").stdout
    shown = call("inspect", onnx_folder).stdout
    assert shown.startswith(f"{onnx_folder}: onnx, written by lorafx ")
    assert "equal to" in " ".join(shown.split())
    assert re.search(r"\d [kM]B  model\.onnx$", shown, re.MULTILINE)
    assert "{" not in shown, "text, not JSON"
    assert json.loads(call("inspect", onnx_folder, "--json").stdout)["kind"] == "onnx"


def test_report_tells_and_opens_the_page(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    answer, following = call("report", run).stdout.splitlines()
    assert "accuracy" in answer
    assert (following, opened) == (f"Next: open {run / 'report.html'}", [])
    assert call("report", run, "--open").exit_code == 0
    assert opened == [(run / "report.html").as_uri()]
    assert "Tensors by role" in call("report", run, "--details").stdout
    page = tmp_path / "page.html"
    assert call("report", run, "-o", page).exit_code == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "add --overwrite" in call("report", run, "-o", page).stderr
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    result = call("report", run, "--open")
    assert (result.exit_code, "no browser was found" in result.stderr) == (2, True)


def test_report_of_what_has_none_says_so(tmp_path: Path, tiny_checkpoint: Path) -> None:
    result = call("report", tiny_checkpoint)
    assert (result.exit_code, "no report.json" in result.stderr) == (5, True)
    (tmp_path / "report.json").write_text('{"rows": []}', encoding="utf-8")
    result = call("report", tmp_path)
    assert (result.exit_code, "no report of a program" in result.stderr) == (5, True)


def test_options_of_training_are_told_with_types_defaults_and_groups() -> None:
    told = call("train", "-h").stdout
    assert told == call("train", "--help").stdout
    titles = re.findall(r"^(\w+):$", told, re.MULTILINE)
    assert titles == ["Options", "Length", "Optimiser", "Teacher", "Data", "Evaluation", "Machine"]
    plain = " ".join(told.split())
    assert "--learning-rate NUMBER peak learning rate (at least 0) [default: 0.001]" in plain
    assert "--max-length INTEGER tokens kept of each text (at least 1) [default: 128]" in plain
    assert "(default on)" not in plain
    assert "[default: on]" in plain
    assert told.count("--epochs") == 1


def test_options_of_an_export_say_what_their_values_mean() -> None:
    told = " ".join(call("export", "-h").stdout.split())
    for said in (
        "hf: an ordinary transformers checkpoint",
        "separate: operators of their own",
        "for cuda widths in multiples of 8",
    ):
        assert said in told


def test_shells_complete_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def completed(*words: str) -> set[str]:
        monkeypatch.setenv("COMP_WORDS", " ".join(["lorafx", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        result = CliRunner().invoke(main, prog_name="lorafx", env={"_LORAFX_COMPLETE": "bash_complete"})
        return {line.partition(",")[2] for line in result.stdout.splitlines()}

    assert {"prilora"} == completed("rewrite", "folder", "--pass", "pri")
    assert {"lora"} == completed("passes", "lo")
    assert {"onnx", "onnx-adapter"} == completed("export", "run", "--format", "on")
    assert "text-classification" in completed("rewrite", "folder", "--task", "text")


def test_who_trained_a_model_that_writes_is_told_of_its_cache() -> None:
    assert after_all(Path("out"), "BertForMaskedLM") == "lorafx report out --open"
    for name in ("LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"):
        assert "lorafx export out/run -o DECODER --generate" in after_all(Path("out"), name)


def test_a_number_that_may_be_left_out_is_none_by_that_word() -> None:
    assert option_values(EditOptions, {"margin": "none", "clamp": "none"}) == {"margin": None, "clamp": None}
    assert option_values(EditOptions, {"margin": "0.25"}) == {"margin": 0.25}
    assert option_values(TrainOptions, {"text": "none"}) == {"text": "none"}, "a column of that name"
    with pytest.raises(UsageError, match="--rank: 'none' is not an integer"):
        option_values(EditOptions, {"rank": "none"})


def test_arguments_of_the_trainer_are_pairs_or_a_table() -> None:
    for text in ("optim=adafactor,adam_beta2=0.98", '{optim = "adafactor", adam_beta2 = 0.98}'):
        assert train_options(None, {"trainer": text})["trainer"] == {"optim": "adafactor", "adam_beta2": 0.98}
    for text in ("optim", "{optim", "=x"):
        with pytest.raises(UsageError, match="--trainer"):
            train_options(None, {"trainer": text})


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("trainer = {optimm = 1}", "trainer: TrainingArguments has no 'optimm' (did you mean 'optim'?)"),
        ('trainer = {optim = "adamm"}', "trainer: optim = 'adamm' is not one of adamw_torch, "),
        ('trainer = {bf16 = "no"}', "trainer: bf16 = 'no' is not true or false"),
        ("trainer = {max_steps = 3}", "trainer: max_steps is said by the training option 'max_steps'"),
        ("trainer = {save_steps = 3}", "trainer: save_steps is said by the training option 'save_steps'"),
        ('schedule = "linea"', "unknown schedule 'linea' (did you mean 'linear'?)"),
    ],
)
def test_what_training_would_refuse_of_a_recipe_is_refused_by_rewrite(train: str, said: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"{RECIPE}\n[train]\n{train}\n", encoding="utf-8")
    for command in (["rewrite", "nowhere", "--recipe", recipe, "--dry-run"], ["run", recipe, "--data", "no.csv"]):
        result = call(*command, *([] if "--dry-run" in command else ["--checkpoint", tmp_path, "-o", tmp_path / "o"]))
        assert result.exit_code == 2, result.output
        assert said in result.stderr
        assert result.stderr.count("\n") == 1


def test_warming_up_may_be_counted_in_steps() -> None:
    assert train_options(None, {"trainer": "warmup_steps=5"})["trainer"] == {"warmup_steps": 5}


def test_onnx_carries_its_recipe(onnx_folder: Path) -> None:
    import onnx

    model = onnx.load(str(onnx_folder / "model.onnx"), load_external_data=False)
    record = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(record["lorafx_history"])[0]["name"] == "lora"
    assert json.loads(record["lorafx_base"])["hashes"]["model.safetensors"]


def test_separate_adapters_stay_separate(run: Path, onnx_folder: Path, tmp_path: Path) -> None:
    import onnx

    merged, separate = onnx_folder, tmp_path / "separate"
    assert call("export", run, "-o", separate, "--adapters", "separate").exit_code == 0
    assert call("verify", merged, separate).exit_code == 0
    counts = [len(onnx.load(str(f / "model.onnx"), load_external_data=False).graph.node) for f in (merged, separate)]
    assert counts[0] < counts[1]


def test_run_does_it_all_and_goes_on_after_an_interruption(
    tiny_checkpoint: Path, tiny_table: Path, recipe: Path, tmp_path: Path
) -> None:
    arguments = ["run", recipe, "--checkpoint", tiny_checkpoint, "--data", tiny_table, "-o", tmp_path / "job"]
    arguments += ["--eval", tiny_table, "--max-steps", 2, "--batch-size", 8]
    first = call(*arguments)
    assert first.exit_code == 0, first.output
    answer, following = first.stdout.splitlines()
    assert answer.startswith(f"{tmp_path / 'job' / 'onnx'}: Bert")
    for said in (r"[\d.]+ MB", r"[\d.]+ times as fast as the base in PyTorch", r"equal to \d\.\de-0\d of the scale"):
        assert re.search(said, answer), said
    assert following == f"Next: lorafx report {tmp_path / 'job'} --open"
    assert "--details" not in answer
    told = json.loads((tmp_path / "job" / "report.json").read_text(encoding="utf-8"))["sections"]
    (before,) = [row["eval_accuracy"] for row in told["training"]["history"] if row["step"] == 0]
    after = told["training"]["metrics"]["eval_accuracy"]
    assert [(row["candidate"], row["value"]) for row in told["scored"]] == [
        ("the base in PyTorch", before),
        ("the base in PyTorch", after),
        ("lorafx, ONNX", after),
    ]
    shutil.rmtree(tmp_path / "job" / "onnx")
    again = call(*arguments)
    assert again.exit_code == 0, again.output
    assert "run: done before" in again.stderr
    assert "onnx: working" in again.stderr
    assert call("verify", tmp_path / "job" / "run", tmp_path / "job" / "onnx").exit_code == 0


ERRORS = [
    (["rewrite", "{ckpt}", "--pass", "lorra", "--dry-run"], 2, "did you mean 'lora'"),
    (["rewrite", "{ckpt}", "--pass", "lora", "--lora.rnak", "4", "--dry-run"], 2, "did you mean 'rank'"),
    (["rewrite", "{ckpt}", "--pass", "lora", "--lora.rank", "many", "--dry-run"], 2, "an integer"),
    (["rewrite", "{ckpt}", "--pass", "lora", "--lora.targets", "qeury", "--dry-run"], 2, "query"),
    (["rewrite", "{ckpt}", "--pass", "lora", "--lora.rank", "999", "--dry-run"], 2, "rank 999"),
    (["rewrite", "{ckpt}", "--task", "text-clasification", "--pass", "lora", "--dry-run"], 2, "text-classification"),
    (["rewrite", "{ckpt}", "--dry-run"], 2, "nothing to do"),
    (["rewrite", "{tmp}/nowhere", "--pass", "lora", "--dry-run"], 5, "no such checkpoint folder"),
    (["rewrite", "{tmp}/empty", "--pass", "lora", "--dry-run"], 5, "no config.json"),
    (["rewrite", "{ckpt}", "--recipe", "{tmp}/bad.toml", "--dry-run"], 2, "unknown key 'passs'"),
    (["fold", "{tmp}/empty", "-o", "{tmp}/out"], 5, "no config.json"),
    (["export", "{run}", "-o", "{tmp}/out", "--uniform", "--adapters", "separate"], 2, "nothing is folded here"),
    (["train", "{run}", "--data", "{tmp}/other.csv", "-o", "{tmp}/out"], 5, "did you mean 'lable'"),
    (["train", "{run}", "--data", "{tmp}/none.csv", "-o", "{tmp}/out"], 5, "none.csv"),
    (["verify", "{run}", "{ckpt}"], 4, "differ"),
    (["bench", "{run}", "--shape", "8by8"], 2, "batch x length"),
    (["bench", "{run}", "--page", "{tmp}/bad.toml"], 2, "choose another --page, or add --overwrite"),
    (["bench", "{run}", "--page", "{tmp}/nowhere/page.html"], 2, "its folder does not exist"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), ERRORS, ids=lambda value: str(value)[:60])
def test_errors_are_one_line_with_a_stable_code(
    arguments: list[str], code: int, words: str, tiny_checkpoint: Path, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.toml").write_text('[[passs]]\nname = "lora"\n', encoding="utf-8")
    (tmp_path / "other.csv").write_text("text,lable\nfine,1\n", encoding="utf-8")
    before = sorted(path.name for path in tmp_path.iterdir())
    result = call(*[part.format(ckpt=tiny_checkpoint, run=run, tmp=tmp_path) for part in arguments])
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("lorafx: error:")]
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("damage", ["truncate", "lfs", "header"])
def test_damaged_weights_are_named(damage: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    file = copy / "model.safetensors"
    if damage == "truncate":
        os.truncate(file, file.stat().st_size - 100)
    elif damage == "lfs":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n", encoding="utf-8")
    else:
        data = bytearray(file.read_bytes())
        data[8:40] = b"x" * 32
        file.write_bytes(bytes(data))
    result = call("rewrite", copy, "--pass", "lora", "-o", tmp_path / "run")
    assert result.exit_code == 5, result.output
    assert "model.safetensors" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_changed_base_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy, folder = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(tiny_checkpoint, copy)
    # With every pass verified, the weights are read.
    assert call("rewrite", copy, "--pass", "lora", "--verify-each", "-o", folder).exit_code == 0
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    result = call("fold", folder, "-o", tmp_path / "folded")
    assert result.exit_code == 5
    assert "changed since the rewrite" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rewrite", "base", "--pass", "lora", "--double"), "give --verify-each with it"),
        (("rewrite", "base", "--pass", "lora", "--double", "--verify-each", "--no-check"), "leave --no-check out"),
        (("fold", "run", "--double", "--no-check"), "leave one of them out"),
    ],
)
def test_fp64_that_would_check_nothing_is_refused(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = call(*words, "-o", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [("inspect", ""), ("fold", "run", "-o", ""), ("train", "run", "--data", "")])
def test_an_empty_path_is_not_the_current_folder(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == 2
    assert "the path is empty" in result.output


@pytest.mark.parametrize("command", ["rewrite", "train", "fold", "export", "edit"])
def test_where_nothing_can_be_written_is_said_before_all_work(command: str, tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "edits.jsonl").write_text('{"prompt": "a", "target": "b"}\n')
    theirs = {
        "rewrite": ("--pass", "lora"),
        "train": ("--data", "t.csv"),
        "edit": ("--edits", tmp_path / "edits.jsonl"),
    }
    given = [command, tmp_path / "run", *theirs.get(command, ())]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text("")
    # A run without its values and its base: an error of it says that it was opened.
    empty = {"format": 1, "kind": "run", "lorafx": "0", "meta": {}, "files": {}}
    (tmp_path / "run" / "lorafx.json").write_text(json.dumps(empty))
    existing = call(*given, "-o", tmp_path / "file")
    assert (existing.exit_code, "exists already" in existing.stderr) == (2, True), existing.stderr
    within = call(*given, "-o", tmp_path / "file" / "inner")
    assert (within.exit_code, f"{tmp_path / 'file'} is a file" in within.stderr) == (5, True), within.stderr
    assert len(within.stderr.splitlines()) == 1


def test_nothing_is_written_into_a_folder_that_names_all_it_holds(run: Path) -> None:
    before = sorted(run.iterdir())
    within = call("fold", run, "-o", run / "inner" / "folded")
    assert (within.exit_code, f"lies in {run}, which lorafx wrote" in within.stderr) == (2, True), within.stderr
    assert sorted(run.iterdir()) == before
    assert call("inspect", run).exit_code == 0


def test_weights_that_are_not_those_written_are_refused(folded: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folded, tmp_path / "copy")
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    for command in ("fold", "export"):
        result = call(command, copy, "-o", tmp_path / "out")
        said = result.stderr.splitlines()[-1]
        assert (result.exit_code, "model.safetensors: not the file that was written" in said) == (5, True), said
    (copy / "lorafx.json").unlink()  # somebody else's by now
    assert call("fold", copy, "-o", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("made", ["folded", "onnx_folder"])
@pytest.mark.parametrize("command", ["verify", "bench", "generate"])
def test_what_reads_a_folder_holds_it_to_every_byte(
    made: str, command: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    copy = shutil.copytree(request.getfixturevalue(made), tmp_path / "copy")
    file = next(
        file for name in ("model.safetensors", "model.onnx.data", "model.onnx") if (file := copy / name).exists()
    )
    data = bytearray(file.read_bytes())
    data[-8] ^= 1
    file.write_bytes(bytes(data))
    given = {
        "verify": [copy, copy],
        "bench": [copy, "--repeats", 1, "--shape", "1x4"],
        "generate": [copy, "--prompt", "w"],
    }
    result = call(command, *given[command])
    assert result.exit_code == 5, result.output
    said = result.stderr.split("\r")[-1].splitlines()[-1]
    assert said.startswith(f"lorafx: error: {file}: not the file that was written (its sha256 differs)")
    assert "or remove lorafx.json if another tool was to change it" in result.stderr


def test_a_checkpoint_trained_in_place_says_what_to_remove(folded: Path, tmp_path: Path) -> None:
    """Its config has another size, say, as transformers writes it again."""
    copy = shutil.copytree(folded, tmp_path / "copy")
    (copy / "config.json").write_text((copy / "config.json").read_text(encoding="utf-8") + "\n", encoding="utf-8")
    for command in (["rewrite", copy, "--pass", "lora", "--dry-run"], ["verify", copy, folded]):
        result = call(*command)
        assert result.exit_code == 5, result.output
        assert "write the folder again, or remove lorafx.json if another tool was to change it" in result.stderr
    (copy / "lorafx.json").unlink()
    assert call("rewrite", copy, "--pass", "lora", "--dry-run").exit_code == 0
