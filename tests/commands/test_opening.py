"""How a folder is opened: every command takes the options for it, asks nobody, and says in one line what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import lorafx
from lorafx.cli import main
from lorafx.errors import ArtifactError, UsageError, first_line
from lorafx.files.folder import new_folder
from lorafx.models.checkpoint import open_model, open_tokenizer
from lorafx.passes.lora import Lora
from lorafx.recipes.recipe import Recipe

OPENING = ["--allow-pickle", "--trust-remote-code", "--base", "moved"]
#: Every command that opens a run, and what else it needs.
COMMANDS = {
    "train": ["{run}", "--data", "{table}"],
    "fold": ["{run}", "-o", "{tmp}/out"],
    "export": ["{run}", "-o", "{tmp}/out"],
    "verify": ["{run}", "{run}"],
    "bench": ["{run}"],
    "inspect": ["{run}"],
    "latency": ["{run}"],
}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    made = call("rewrite", tiny_checkpoint, "--pass", "lora", "--task", "text-classification", "-o", folder)
    assert made.exit_code == 0, made.output
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_opening_reach_the_run(
    command: str, run: Path, tiny_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def load(path: Any, **options: Any) -> None:
        seen.append(options)
        raise ArtifactError("seen")

    monkeypatch.setattr("lorafx.frontend.load.load", load)
    words = [word.format(run=run, table=tiny_table, tmp=tmp_path) for word in COMMANDS[command]]
    assert call(command, *words, *OPENING).exit_code == 5
    given = {name: seen[0][name] for name in ("allow_pickle", "trust_remote_code", "base")}
    assert {**given, "base": Path(given["base"]).name} == {
        "allow_pickle": True,
        "trust_remote_code": True,
        "base": "moved",
    }


OWN = """
from transformers import BertConfig, BertForSequenceClassification

class OwnConfig(BertConfig):
    model_type = "own-bert"

class OwnForSequenceClassification(BertForSequenceClassification):
    config_class = OwnConfig
"""


@pytest.fixture
def own(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint with code of its own and pickled weights."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "own"))
    config = BertConfig.from_pretrained(tiny_checkpoint, num_labels=2)
    BertForSequenceClassification(config).save_pretrained(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "own.py").write_text(OWN)
    name = "OwnForSequenceClassification"
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": f"own.{name}"}
    change(folder, model_type="own-bert", architectures=[name], auto_map=auto)
    return folder


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.slow
def test_a_run_of_pickled_weights_and_code_of_its_own_goes_the_whole_way(
    own: Path, tiny_table: Path, tmp_path: Path
) -> None:
    flags = ["--trust-remote-code", "--allow-pickle"]
    run = tmp_path / "run"
    assert call("rewrite", own, "--pass", "lora", "-o", run, *flags).exit_code == 0
    own.rename(tmp_path / "elsewhere")
    refused = call("fold", run, "-o", tmp_path / "no")
    assert refused.exit_code == 2
    assert "--trust-remote-code" in refused.stderr
    refused = call("fold", run, "-o", tmp_path / "no", *flags)
    assert refused.exit_code == 5
    assert "--base" in refused.stderr
    flags += ["--base", str(tmp_path / "elsewhere")]
    for words in (
        ["train", run, "--data", tiny_table, "--max-steps", 1],
        ["fold", run, "-o", tmp_path / "folded"],
        ["verify", run, tmp_path / "folded"],
        ["bench", run, tmp_path / "folded", "--shape", "1x4", "--repeats", 1],
    ):
        done = call(*words, *flags)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "folded" / "own.py").read_text() == OWN


def test_code_that_is_not_trusted_is_refused_without_asking(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("asked at the terminal")

    monkeypatch.setattr("builtins.input", asked)
    for meta in (True, False):
        with pytest.raises(UsageError, match="runs code of its own; if you trust it"):
            open_model(own, None, {}, meta=meta, allow_pickle=True)
    tokenizer = json.loads((own / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (own / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="runs code of its own; if you trust it"):
        open_tokenizer(own)


def test_a_class_that_nobody_knows_is_not_another_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    change(folder, architectures=["BertForTelepathy"])
    with pytest.raises(ArtifactError, match="knows no BertForTelepathy; say which task"):
        open_model(folder, None, {})
    assert type(open_model(folder, "feature-extraction", {})[0]).__name__ == "BertModel"


def test_a_tied_output_layer_is_one_tensor_without_weights_too(tmp_path: Path) -> None:
    """What `rewrite` accepts on the meta device has to open with weights: the layer is the embedding."""
    from tests.small import llama

    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    made = call("rewrite", tmp_path / "base", "--pass", "lora", "--lora.trainable", "lm_head", "-o", tmp_path / "run")
    assert made.exit_code == 0, made.output
    for meta in (True, False):
        program = lorafx.load(tmp_path / "run", meta=meta)
        assert program.tensor("lm_head.weight") is program.tensor("model.embed_tokens.weight")
        assert program.tensor("lm_head.weight").requires_grad
        assert len(program.learned()) == 1 + 2 * 14


# ---- what is no checkpoint says what it is

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "somewhere/base"}
PLACES = {
    "fold": ["{x}", "-o", "{out}"],
    "export": ["{x}", "-o", "{out}"],
    "inspect": ["{x}"],
    "verify": ["{x}", "{x}"],
    "bench": ["{x}"],
    "latency": ["{x}"],
    "rewrite": ["{x}", "--pass", "lora", "-o", "{out}"],
    "run": ["{recipe}", "--checkpoint", "{x}", "--data", "{table}", "-o", "{out}"],
}


@pytest.mark.parametrize("command", PLACES)
@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_is_named_with_what_to_do(
    command: str, whole: bool, tiny_checkpoint: Path, tiny_table: Path, tmp_path: Path
) -> None:
    """Beside whole weights, too: transformers would open the adapter's base instead of them."""
    folder = tmp_path / "adapter"
    shutil.copytree(tiny_checkpoint, folder) if whole else folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (tmp_path / "r.toml").write_text('[[pass]]\nname = "lora"\n')
    places = {"x": folder, "out": tmp_path / "out", "recipe": tmp_path / "r.toml", "table": tiny_table}
    result = call(command, *(word.format(**places) for word in PLACES[command]))
    assert result.exit_code == 5, result.output
    assert "a PEFT adapter of somewhere/base, not a checkpoint; give its base and --adapter" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_is_no_checkpoint(run: Path, tmp_path: Path) -> None:
    result = call("rewrite", run, "--pass", "lora", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "a folder of kind run, not a checkpoint" in result.stderr


MISSING = [
    ["rewrite", "{no}", "--pass", "lora", "-o", "{out}"],
    ["rewrite", "{file}", "--pass", "lora", "-o", "{out}"],
    ["rewrite", "{ckpt}", "--recipe", "{no}", "-o", "{out}"],
    ["rewrite", "{ckpt}", "--pass", "lora", "-o", "{file}/run"],
    ["train", "{no}", "--data", "{table}"],
    ["train", "{run}", "--data", "{no}", "-o", "{out}"],
    ["train", "{run}", "--data", "{dir}", "-o", "{out}"],
    ["train", "{run}", "--data", "{table}", "--eval", "{no}", "-o", "{out}"],
    ["fold", "{no}", "-o", "{out}"],
    ["fold", "{file}", "-o", "{out}"],
    ["fold", "{run}", "--base", "{no}", "-o", "{out}"],
    ["export", "{no}", "-o", "{out}"],
    ["verify", "{no}", "{ckpt}"],
    ["verify", "{ckpt}", "{no}"],
    ["verify", "{ckpt}", "{ckpt}", "--texts", "{no}"],
    ["verify", "{ckpt}", "{ckpt}", "--texts", "{dir}"],
    ["verify", "{ckpt}", "{ckpt}", "--texts", "{binary}"],
    ["bench", "{no}"],
    ["inspect", "{no}"],
    ["latency", "{no}"],
    ["run", "{no}", "--checkpoint", "{ckpt}", "--data", "{table}", "-o", "{out}"],
    ["run", "{recipe}", "--checkpoint", "{no}", "--data", "{table}", "-o", "{out}"],
    ["run", "{recipe}", "--checkpoint", "{ckpt}", "--data", "{no}", "-o", "{out}"],
    ["run", "{recipe}", "--checkpoint", "{ckpt}", "--data", "{table}", "--eval", "{no}", "-o", "{out}"],
    ["edit", "{no}", "--edits", "{edits}", "-o", "{out}"],
    ["edit", "{ckpt}", "--edits", "{no}", "-o", "{out}"],
    ["edit", "{ckpt}", "--edits", "{edits}", "--prompts", "{no}", "-o", "{out}"],
    ["edit", "{ckpt}", "--edits", "{dir}", "-o", "{out}"],
    ["patch", "apply", "{no}", "{no}", "-o", "{out}"],
    ["patch", "apply", "{ckpt}", "{no}", "-o", "{out}"],
    ["patch", "apply", "{ckpt}", "{dir}", "-o", "{out}"],
    ["patch", "revert", "{ckpt}", "{no}", "-o", "{out}"],
    ["patch", "make", "{no}", "{ckpt}", "-o", "{out}"],
    ["patch", "make", "{ckpt}", "{no}", "-o", "{out}"],
    ["patch", "inspect", "{no}"],
    ["patch", "inspect", "{file}"],
]


@pytest.mark.parametrize("arguments", MISSING, ids=" ".join)
def test_a_missing_file_exits_5(
    arguments: list[str], run: Path, tiny_checkpoint: Path, tiny_table: Path, tmp_path: Path
) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "r.toml").write_text('[[pass]]\nname = "lora"\n')
    (tmp_path / "edits.jsonl").write_text('{"prompt": "the film was", "target": "good"}\n')
    places = {"no": tmp_path / "no" / "where", "dir": tmp_path / "dir", "file": tmp_path / "file"}
    places |= {"ckpt": tiny_checkpoint, "run": run, "table": tiny_table, "out": tmp_path / "out"}
    places |= {"binary": tmp_path / "binary", "recipe": tmp_path / "r.toml", "edits": tmp_path / "edits.jsonl"}
    result = call(*(word.format(**places) for word in arguments))
    assert result.exit_code == 5, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("lorafx: error:")]
    assert len(lines) == 1
    assert str(tmp_path) in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_file_that_no_command_looks_after_exits_5_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def opens(*_: Any, **__: Any) -> None:
        Path("/no/where").read_text()

    monkeypatch.setattr("lorafx.files.folder.find_manifest", opens)
    result = call("inspect", "x")
    assert result.exit_code == 5
    assert "lorafx: error: /no/where: cannot be used: No such file or directory" in result.stderr


def test_files_put_into_a_folder_are_not_overwritten(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", "run", {}) as folder:
        (folder / "file").write_text("")
    (tmp_path / "out" / ".DS_Store").write_text("")
    with new_folder(tmp_path / "out", "run", {}, overwrite=True):
        pass
    (tmp_path / "out" / "notes").mkdir()
    (tmp_path / "out" / "notes" / "thesis.tex").write_text("years of work")

    def overwrite() -> None:
        with new_folder(tmp_path / "out", "run", {}, overwrite=True):
            raise AssertionError("entered")

    with pytest.raises(UsageError, match=r"holds notes/thesis.tex, which lorafx did not write"):
        overwrite()


def test_a_size_that_no_setting_says_is_named() -> None:
    """The reason was empty: 'cannot hold this program: ;'."""
    from lorafx.formats.hf import hf_model
    from tests.small import captured

    program = captured(num_labels=7).copy()
    narrow = torch.nn.Parameter(torch.zeros(5, 32))
    program.root.get_submodule("classifier")._parameters["weight"] = narrow
    with pytest.raises(UsageError, match=r"classifier.weight is \(7, 32\) in its architecture, shape \(5, 32\) here"):
        hf_model(program)


def test_a_model_with_something_built_in_is_told_so() -> None:
    """Its sizes are its config's: widths have nothing to do with it."""
    from peft import LoraConfig, get_peft_model

    from lorafx.formats.hf import hf_model
    from tests.small import bert, example

    built: Any = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"]))  # type: ignore[arg-type]
    for model in (built, built.base_model.model):
        program = lorafx.capture(model, inputs=example(True))
        with pytest.raises(UsageError, match="merge what was built into it before capturing") as caught:
            hf_model(program)
        assert "--uniform" not in str(caught.value)


def test_a_run_keeps_inputs_that_its_config_does_not_say(tmp_path: Path) -> None:
    """ResNet's config has no image size: the images it was captured with are stored."""
    import transformers as hf

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    config = hf.ResNetConfig(**sizes)
    hf.ResNetForImageClassification(config).save_pretrained(tmp_path / "base")
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    program = lorafx.rewrite(lorafx.capture(tmp_path / "base", inputs=images), [Lora(targets="convolution", rank=2)])
    program.save(tmp_path / "run")
    again = lorafx.load(tmp_path / "run")
    assert torch.equal(again.example["pixel_values"], images["pixel_values"])


def test_no_message_ends_without_a_reason() -> None:
    assert first_line(ValueError("\n  one\ntwo")) == "one"
    assert first_line(ValueError("one of:\n\n (1) two\n(2) three")) == "one of: (1) two"
    assert first_line(ValueError("")) == first_line(ValueError(" \n")) == "ValueError"


def test_a_head_for_other_classes_begins_anew_when_asked(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """By the flag, and by the recipe of a job; the run opens again as it was made."""
    from transformers import AutoModelForSequenceClassification

    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint, num_labels=3).save_pretrained(base)
    words = ["rewrite", str(base), "--num-labels", "5", "--pass", "lora", "-o", str(tmp_path / "run")]
    refused = CliRunner().invoke(main, words)
    assert (refused.exit_code, "--ignore-mismatched-sizes" in refused.stderr) == (5, True)
    assert CliRunner().invoke(main, [*words, "--ignore-mismatched-sizes"]).exit_code == 0
    program = lorafx.load(tmp_path / "run")
    assert program.untrained() == ["classifier.bias", "classifier.weight"]
    recipe = Recipe.parse({"model": {"ignore_mismatched_sizes": True}, "pass": [{"name": "lora"}]})
    assert recipe.opening == {"ignore_mismatched_sizes": True}
