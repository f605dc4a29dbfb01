"""A run comes back as it was, PEFT reads the same file, and what is incomplete or changed is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafx
from lorafx.base import Method, Pass
from lorafx.errors import ArtifactError, LorafxError, UsageError
from lorafx.files.folder import MANIFEST, find_manifest, new_folder, read_manifest
from lorafx.files.places import found_from
from lorafx.formats.run import save_run
from lorafx.frontend.load import run_recipe
from lorafx.graph.program import Source
from lorafx.models.identity import has_identity, modified, weight_hashes
from lorafx.passes.finegates import Finegates
from lorafx.passes.lora import Lora
from lorafx.passes.magnitude import Magnitude
from lorafx.passes.to_eval import ToEval
from lorafx.public import Program
from lorafx.reporting.report import read_report
from lorafx.testing.models import randomised
from tests.captures import of_folder
from tests.kill_nine import kill_nine, save_runs, write_files
from tests.zoo import ZOO, build

Checkpoints = Callable[[str], Path]


@pytest.fixture(scope="session")
def pristine(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over the BERT checkpoint, with learned values."""
    path = tmp_path_factory.mktemp("runs") / "run"
    lora(checkpoint("bert")).save(path)
    return path


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    """A copy of that run, which a test may spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "run"))


@pytest.fixture
def base(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A copy of the BERT checkpoint, which a test may spoil."""
    return Path(shutil.copytree(checkpoint("bert"), tmp_path / "base"))


def lora(folder: Path, *passes: Pass, seed: int = 0, **capturing: Any) -> Program:
    """A rewritten checkpoint whose learned tensors are random."""
    passes = passes or (Lora(rank=2),)
    # A method gives what it trains storage of its own. What the folder does not hold need not train: it is written to
    # below all the same, as without a method anything is, which must not reach the shared capture.
    shared = not capturing and any(isinstance(step, Method) for step in passes) and not of_folder(folder).source.fresh
    program = lorafx.rewrite(of_folder(folder) if shared else lorafx.capture(folder, **capturing), passes)
    generator = torch.Generator().manual_seed(seed)
    for value in program.learned().values():
        value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return program


def outputs(model: Any, name: str) -> Tensor:
    inputs = ZOO[name].inputs(3, 9)
    with torch.no_grad():
        return next(iter(model.eval()(**inputs).values()))


def seal(folder: Path) -> None:
    """Make the manifest true again after a test changed a file: the folder is whole, only wrong."""
    record = json.loads((folder / MANIFEST).read_text())
    shutil.move(folder, folder.with_name("changed"))
    with new_folder(folder, record["kind"], record["meta"]) as temporary:
        for file in folder.with_name("changed").iterdir():
            if file.name != MANIFEST:
                shutil.copy(file, temporary)


def refusal(error: type[LorafxError], action: Callable[[], object]) -> str:
    """The message of the refusal, which is one line."""
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- a run comes back


@pytest.mark.parametrize("name", ["bert", "distilbert", "albert", "gpt2", "llama", "t5", "vit"])
def test_a_run_comes_back_as_it_was(name: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    program = lora(checkpoint(name), Lora(targets="all-linear", rank=2, alpha=5.0, dropout=0.1))
    program.save(tmp_path / "run")
    again = lorafx.load(tmp_path / "run")
    assert torch.equal(outputs(again.module(), name), outputs(program.module(), name))
    assert [applied.step for applied in again.history] == [applied.step for applied in program.history]
    assert set(again.trainable()) == set(program.trainable())
    assert again.learned().keys() == program.learned().keys()
    assert again.source.path == program.source.path
    assert again.source.hashes == program.source.hashes


def test_the_folder_holds_what_the_design_says(run: Path, checkpoint: Checkpoints) -> None:
    names = {"recipe.toml", "adapter_model.safetensors", "adapter_config.json", "config.json", MANIFEST}
    names |= {"report.json", "report.html"}
    assert {file.name for file in run.iterdir()} == names
    manifest = read_manifest(run, hashes=True)
    assert set(manifest.files) == names - {MANIFEST}
    assert manifest.kind == "run"
    assert found_from(run, manifest.meta["base"]["path"]) == checkpoint("bert")
    assert not Path(manifest.meta["base"]["path"]).is_absolute()
    assert manifest.meta["base"]["hashes"].keys() == {"model.safetensors", "config.json"}
    # Only what the base does not hold: far less than the base itself.
    stored = load_file(run / "adapter_model.safetensors")
    assert all("lora_" in name or "classifier" in name for name in stored)
    report = json.loads((run / "report.json").read_text())
    assert lorafx.Report.from_json(report).to_json() == report


def test_what_training_was_given_is_kept(checkpoint: Checkpoints, tmp_path: Path) -> None:
    program = lora(checkpoint("bert"))
    report = program.report.plus(training={"accuracy": 0.5})
    save_run(program, tmp_path / "run", train={"epochs": 2.0}, report=report)
    assert run_recipe(tmp_path / "run").train == {"epochs": 2.0}
    assert json.loads((tmp_path / "run" / "report.json").read_text())["sections"]["training"] == {"accuracy": 0.5}


def test_what_training_gave_goes_with_the_program(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """As far as the function is the trained one: through a run, folding and an export; not through pruning."""
    program, gave = lora(checkpoint("bert")), {"metrics": {"eval_accuracy": 0.75}}
    program.trained = gave
    program.save(tmp_path / "run")
    again = lorafx.load(tmp_path / "run")
    assert again.trained == gave
    lorafx.export(lorafx.fold(again), tmp_path / "folded", "hf")
    for folder in ("run", "folded"):
        assert read_report(tmp_path / folder).sections["training"] == gave
        assert "accuracy 0.750" in " ".join(read_report(tmp_path / folder).text().split())
        assert "0.750" in (tmp_path / folder / "report.html").read_text(encoding="utf-8")
    for step in (Magnitude(keep=0.5, targets="role:ffn.down"), Finegates()):
        assert lorafx.rewrite(again, [step]).trained is None
    assert lora(checkpoint("bert")).trained is None


def test_what_came_before_the_last_training_goes_along(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """How it began and what it gave; its curves, which are those of another function, do not."""
    start, end = {"eval_accuracy": 0.5, "step": 0}, {"eval_accuracy": 0.75, "step": 9}
    program = lora(checkpoint("bert"))
    program.trained = {"metrics": {"eval_accuracy": 0.75}, "seconds": 3.0, "history": [start, end], "samples": []}
    gated = lorafx.rewrite(program, [Finegates()])
    kept = ({"metrics": {"eval_accuracy": 0.75}, "seconds": 3.0, "history": [start]},)
    assert (gated.earlier, program.earlier) == (kept, ())
    gated.trained = {"metrics": {"eval_accuracy": 0.7}, "history": [{"eval_accuracy": 0.75, "step": 0}]}
    gated.save(tmp_path / "run")
    again = lorafx.load(tmp_path / "run")
    assert again.earlier == kept
    assert "accuracy 0.500 → 0.750 → 0.700" in " ".join(again.report.text().split())
    again.outlive_training()
    assert (again.trained, len(again.earlier)) == (None, 2)


def test_a_run_whose_report_is_broken_is_refused(run: Path) -> None:
    (run / "report.json").write_text("[]", encoding="utf-8")
    seal(run)
    assert refusal(ArtifactError, lambda: lorafx.load(run)).endswith("report.json: broken report; write the run again")


def test_a_new_head_is_part_of_the_run(checkpoint: Checkpoints, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    build("bert").bert.save_pretrained(bare)  # type: ignore[union-attr, operator]
    program = lora(bare, task="text-classification", num_labels=3)
    assert program.source.fresh == {"classifier.weight", "classifier.bias"}
    program.save(tmp_path / "run")
    again = lorafx.load(tmp_path / "run")
    assert again.config.num_labels == 3
    assert torch.equal(outputs(again.module(), "bert"), outputs(program.module(), "bert"))
    assert run_recipe(tmp_path / "run").model == {"task": "text-classification", "num_labels": 3}


def test_a_run_from_the_meta_device_gets_its_weights_when_loaded(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    build("bert").bert.save_pretrained(bare)  # type: ignore[union-attr, operator]
    program = lorafx.capture(bare, "text-classification", 3, meta=True)
    lorafx.rewrite(program, [Lora(rank=2)]).save(tmp_path / "run")
    stored = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all("lora_" in name for name in stored)
    state = torch.get_rng_state()
    first, second = lorafx.load(tmp_path / "run"), lorafx.load(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)
    # The new head has no stored values; a recorded seed makes it the same each time.
    assert torch.equal(outputs(first.module(), "bert"), outputs(second.module(), "bert"))
    assert {"classifier.weight", "classifier.bias"} <= first.learned().keys()
    assert lorafx.load(tmp_path / "run", meta=True).device.type == "meta"


def test_a_half_precision_base_and_a_trained_module_come_back(checkpoint: Checkpoints, tmp_path: Path) -> None:
    program = lora(checkpoint("bert"), Lora(rank=2, trainable=("auto", "LayerNorm")), dtype=torch.bfloat16)
    program.save(tmp_path / "run")
    again = lorafx.load(tmp_path / "run")
    assert again.tensor("classifier.weight").dtype == torch.bfloat16
    assert torch.equal(outputs(again.module(), "bert"), outputs(program.module(), "bert"))


def test_example_inputs_and_fixed_shapes_are_captured_again(checkpoint: Checkpoints, tmp_path: Path) -> None:
    ids = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
    program = lora(checkpoint("bert"), inputs=inputs, dynamic=False)
    program.save(tmp_path / "run")
    again = lorafx.load(tmp_path / "run")
    assert again.signature.inputs == ("input_ids", "token_type_ids")
    assert torch.equal(again.example["input_ids"], ids)
    assert not again.signature.dynamic_shapes


def test_a_moved_base_is_given_by_hand(base: Path, tmp_path: Path) -> None:
    program = lora(base)
    program.save(tmp_path / "run")
    base.rename(tmp_path / "elsewhere")
    message = refusal(ArtifactError, lambda: lorafx.load(tmp_path / "run"))
    assert f"its base checkpoint {base} is gone" in message
    again = lorafx.load(tmp_path / "run", base=tmp_path / "elsewhere")
    assert torch.equal(outputs(again.module(), "bert"), outputs(program.module(), "bert"))


def test_an_exported_or_foreign_checkpoint_is_captured(checkpoint: Checkpoints, tmp_path: Path) -> None:
    program = lorafx.load(checkpoint("bert"), task="text-classification")
    assert (program.name, program.history) == ("BertForSequenceClassification", ())
    with new_folder(tmp_path / "folded", "hf", {}) as folder:
        shutil.copytree(checkpoint("bert"), folder, dirs_exist_ok=True)
    assert torch.equal(outputs(lorafx.load(tmp_path / "folded").module(), "bert"), outputs(program.module(), "bert"))


# ---- PEFT reads the same file

EVERYWHERE = ("role:attn.*", "role:ffn.*", "role:embedding")
FIRST = {"0.attention.self.query": 3}
PEFT_CASES: dict[str, tuple[str, tuple[Pass, ...]]] = {
    "bert": ("bert", (Lora(rank=2, alpha=3.0),)),
    "bert-embeddings": ("bert", (Lora(rank=2, targets=("word_embeddings", "query")),)),
    "bert-patterns": ("bert", (Lora(rank=2, rank_pattern=FIRST, alpha_pattern={"1.output.dense": 5.0}),)),
    "bert-rslora": ("bert", (Lora(rank=4, alpha=3.0, rslora=True, rank_pattern=FIRST),)),
    "bert-two-passes": ("bert", (Lora(rank=2, targets="query"), Lora(rank=3, targets="value", alpha=1.5))),
    "bert-one-block": ("bert", (Lora(rank=2, blocks=1, exclude=("key",)),)),
    "bert-frozen-head": ("bert", (Lora(rank=2, trainable=()),)),
    "bert-norms": ("bert", (Lora(rank=2, trainable=("auto", "embeddings.LayerNorm")),)),
    "roberta": ("roberta", (Lora(rank=2),)),
    "distilbert": ("distilbert", (Lora(rank=2),)),
    "deberta": ("deberta-v2", (Lora(rank=2),)),
    "albert": ("albert", (Lora(rank=2),)),
    "gpt2": ("gpt2", (Lora(rank=2, targets=EVERYWHERE),)),
    "llama": ("llama", (Lora(rank=2, targets=("q_proj", "down_proj", "embed_tokens")),)),
    "tied-output": ("qwen3", (Lora(rank=2, targets=("q_proj", "lm_head")),)),
    "tied-trained": ("qwen3", (Lora(rank=2, trainable=("embed_tokens",)),)),
    "t5": ("t5", (Lora(rank=2),)),
    "vit-conv": ("vit", (Lora(rank=2, targets=("role:embedding", "all-linear")),)),
}
#: Trained tensors that PEFT loads without knowing that they trained: it cannot name their modules alone.
UNKNOWN_TO_PEFT = {
    "distilbert": ["base_model.model.classifier.weight", "base_model.model.classifier.bias"],
    "tied-trained": ["base_model.model.model.embed_tokens.weight"],
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_peft_opens_a_run(case: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    import peft
    from peft.tuners.lora import LoraLayer

    name, passes = PEFT_CASES[case]
    program = lora(checkpoint(name), *passes)
    program.save(tmp_path / "run")
    model = type(program.source.model).from_pretrained(checkpoint(name))  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        # PEFT's advice about merging: an adapter on one of two tied layers, as we asked for.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        opened = peft.PeftModel.from_pretrained(model, str(tmp_path / "run"))
    adapted = {path for path, module in opened.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    assert adapted == {entry.module for applied in program.history for entry in applied.inserted}
    stored = load_file(tmp_path / "run" / "adapter_model.safetensors")
    known = peft.get_peft_model_state_dict(opened, save_embedding_layers=False)
    assert known.keys() == stored.keys() - set(UNKNOWN_TO_PEFT.get(case, ()))
    assert all(torch.equal(known[key], stored[key]) for key in known)
    ours, theirs = outputs(program.module(), name), outputs(opened, name)
    # The same operators in another order of scaling: rounding of fp32, a few ulps of the largest logit.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))


def test_peft_can_train_and_save_what_it_opened(run: Path, tmp_path: Path) -> None:
    import peft

    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(run), is_trainable=True)
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert sum("lora_" in name for name in trainable) == 2 * 13
    assert any("classifier" in name for name in trainable)
    model.save_pretrained(str(tmp_path / "again"))
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (run, tmp_path / "again"))
    assert ours.keys() == theirs.keys()


@pytest.mark.parametrize(("name", "fresh"), [("bert", "bert.pooler.dense"), ("distilbert", "pre_classifier")])
def test_a_fresh_module_that_does_not_train_reaches_peft_too(name: str, fresh: str, tmp_path: Path) -> None:
    import peft

    model = build(name)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(fresh)}
    model.save_pretrained(tmp_path / "base", state_dict=state)  # type: ignore[operator]
    program = lora(tmp_path / "base", Lora(rank=2))
    assert program.source.fresh == {f"{fresh}.weight", f"{fresh}.bias"}
    program.save(tmp_path / "run")
    opened = type(program.source.model).from_pretrained(tmp_path / "base")  # type: ignore[attr-defined]
    opened = peft.PeftModel.from_pretrained(opened, str(tmp_path / "run"))
    ours, theirs = outputs(program.module(), name), outputs(opened, name)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))
    assert torch.equal(outputs(lorafx.load(tmp_path / "run").module(), name), ours)


@pytest.mark.parametrize(
    ("name", "passes", "reason"),
    [
        ("bert", (ToEval(),), "no LoRA adapter was inserted"),
        ("bert", (Lora(rank=2), Lora(rank=2, targets="query")), "lora inserted what PEFT's LoRA does not have"),
    ],
)
def test_what_peft_cannot_express_says_why(
    name: str, passes: tuple[Pass, ...], reason: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    program = lora(checkpoint(name), *passes)
    program.save(tmp_path / "run")
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    assert reason in read_manifest(tmp_path / "run").meta["peft"]
    assert torch.equal(outputs(lorafx.load(tmp_path / "run").module(), name), outputs(program.module(), name))


# ---- what is refused


def test_a_model_from_memory_and_a_folded_program_are_no_runs(checkpoint: Checkpoints, tmp_path: Path) -> None:
    program = of_folder(checkpoint("bert"))
    memory = dataclasses.replace(program, source=Source(program.source.model))
    assert "capture that folder" in refusal(UsageError, lambda: memory.save(tmp_path / "run"))
    folded = lorafx.fold(lora(checkpoint("bert")))
    assert "lorafx.export" in refusal(UsageError, lambda: folded.save(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_existing_path_is_refused_or_replaced_whole(run: Path, checkpoint: Checkpoints) -> None:
    before = (run / "adapter_model.safetensors").read_bytes()
    assert "--overwrite" in refusal(UsageError, lambda: lora(checkpoint("bert"), seed=1).save(run))
    assert (run / "adapter_model.safetensors").read_bytes() == before
    lora(checkpoint("bert"), seed=1).save(run, overwrite=True)
    assert (run / "adapter_model.safetensors").read_bytes() != before
    read_manifest(run, hashes=True)
    assert [entry.name for entry in run.parent.iterdir()] == ["run"]


def test_a_folder_that_lorafx_did_not_write_is_never_replaced(checkpoint: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    message = refusal(UsageError, lambda: lora(checkpoint("bert")).save(tmp_path / "mine", overwrite=True))
    assert "remove it by hand" in message
    assert (tmp_path / "mine" / "thesis.tex").exists()


def spoil_truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def spoil_flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def spoil_pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def spoil_header(file: Path) -> None:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    file.write_bytes(data[:8] + b"x" * length + data[8 + length :])


def spoil_remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_truncate, "bytes where lorafx.json says"),
        (spoil_flip, "not the file that was written"),
        (spoil_pointer, "git-lfs pointer"),
        (spoil_remove, "adapter_model.safetensors is missing"),
    ],
)
def test_a_spoilt_run_is_refused(spoil: Callable[[Path], None], message: str, run: Path) -> None:
    spoil(run / "adapter_model.safetensors")
    assert message in refusal(ArtifactError, lambda: lorafx.load(run))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_truncate, "base checkpoint changed since the rewrite: model.safetensors"),
        (spoil_flip, "base checkpoint changed since the rewrite: model.safetensors"),
        (spoil_remove, "base checkpoint changed since the rewrite: model.safetensors is gone"),
    ],
)
def test_a_changed_base_is_refused(spoil: Callable[[Path], None], message: str, run: Path, base: Path) -> None:
    spoil(base / "model.safetensors")
    assert message in refusal(ArtifactError, lambda: lorafx.load(run, base=base))


def test_a_rewrite_without_weights_reads_none_and_knows_the_base_by_its_header(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafx.models import identity as opening

    read: list[Path] = []
    monkeypatch.setattr(opening, "file_hash", lambda file: read.append(file) or "")
    lorafx.rewrite(lorafx.capture(base, meta=True), [Lora(rank=2)]).save(tmp_path / "run")
    assert not read, "a weight file was read"
    monkeypatch.undo()
    assert "No weight of the base was read" in (tmp_path / "run" / "report.json").read_text(encoding="utf-8")

    # Trained, it is bound to the values it was trained on.
    trained = lorafx.load(tmp_path / "run", base=base)
    trained.save(tmp_path / "trained")
    assert "No weight of the base was read" not in (tmp_path / "trained" / "report.json").read_text(encoding="utf-8")
    spoil_flip(base / "model.safetensors")
    assert lorafx.load(tmp_path / "run", base=base).source.hashes != trained.source.hashes
    message = refusal(ArtifactError, lambda: lorafx.load(tmp_path / "trained", base=base))
    assert "base checkpoint changed since the rewrite: model.safetensors" in message

    # Another header is another base, with weights or without.
    held = load_file(base / "model.safetensors")
    held["more"] = held.pop(min(held))
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    message = refusal(ArtifactError, lambda: lorafx.load(tmp_path / "run", base=base, meta=True))
    assert "base checkpoint changed since the rewrite: model.safetensors" in message


def test_a_base_modified_after_a_rewrite_that_read_nothing_is_said(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lorafx.rewrite(lorafx.capture(base, meta=True), [Lora(rank=2)]).save(tmp_path / "run")
    assert not lorafx.load(tmp_path / "run", base=base).source.modified
    assert not caplog.text
    file = base / "model.safetensors"
    spoil_flip(file)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))  # however coarse the clock of the disk
    program = lorafx.load(tmp_path / "run", base=base)
    assert f"{base}: model.safetensors was modified (or copied) since the rewrite" in caplog.text
    program.save(tmp_path / "trained")
    report = (tmp_path / "trained" / "report.json").read_text(encoding="utf-8")
    assert "model.safetensors of the base was modified (or copied) after the rewrite" in report
    # What was opened is what it is bound to from now on.
    caplog.clear()
    assert not lorafx.load(tmp_path / "trained", base=base).source.modified
    assert not caplog.text


def test_an_identity_of_before_has_no_time(base: Path) -> None:
    file = base / "model.safetensors"
    known = weight_hashes(base, read=False)[file.name]
    earlier = known.rpartition(":")[0]
    os.utime(file, ns=(0, 0))
    assert has_identity(file, known)
    assert modified(file, known)
    assert has_identity(file, earlier)
    assert not modified(file, earlier)


def test_a_checkpoint_of_lorafx_is_known_by_its_manifest_and_read_by_no_rewrite(base: Path, tmp_path: Path) -> None:
    """Folded again into its place, it has the same names and sizes."""
    zero = lorafx.rewrite(lorafx.capture(base), [Lora(rank=2)])
    lorafx.export(lorafx.fold(zero), tmp_path / "folded", format="hf")
    lorafx.rewrite(lorafx.capture(tmp_path / "folded", meta=True), [Lora(rank=2)]).save(tmp_path / "run")
    lorafx.export(lorafx.fold(randomised(zero)), tmp_path / "folded", format="hf", overwrite=True)
    message = refusal(ArtifactError, lambda: lorafx.load(tmp_path / "run"))
    assert "base checkpoint changed since the rewrite: model.safetensors" in message


def test_a_changed_config_of_the_base_is_refused(run: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.5}))
    message = refusal(ArtifactError, lambda: lorafx.load(run, base=base))
    assert "base checkpoint changed since the rewrite: config.json" in message


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_truncate, "truncated or padded"),
        (spoil_header, "corrupted safetensors header"),
        (spoil_pointer, "git-lfs pointer"),
        (spoil_remove, "no weights"),
    ],
)
def test_a_spoilt_checkpoint_is_not_captured(spoil: Callable[[Path], None], message: str, base: Path) -> None:
    spoil(base / "model.safetensors")
    assert message in refusal(ArtifactError, lambda: lorafx.capture(base))


def test_a_checkpoint_needs_its_config_and_every_shard(base: Path) -> None:
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001.safetensors"}}')
    assert "model-00001.safetensors is named" in refusal(ArtifactError, lambda: lorafx.capture(base))
    (base / "model.safetensors.index.json").write_text('{"weight_map"')
    assert "broken index" in refusal(ArtifactError, lambda: lorafx.capture(base))
    (base / "config.json").unlink()
    assert "no config.json" in refusal(ArtifactError, lambda: lorafx.capture(base))


def test_a_run_without_its_manifest_is_refused_by_name(run: Path) -> None:
    (run / MANIFEST).unlink()
    assert f"{run}: no lorafx.json" in refusal(ArtifactError, lambda: lorafx.load(run))
    assert "no such folder" in refusal(ArtifactError, lambda: lorafx.load(run / "nowhere"))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": "x"}', "\xff", '{"format": 1, "kind": "run", "lorafx": "0"}']
)
def test_a_broken_manifest_is_refused(text: str, run: Path) -> None:
    (run / MANIFEST).write_text(text, encoding="latin-1")
    assert "broken manifest" in refusal(ArtifactError, lambda: lorafx.load(run))


def change_manifest(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((run / MANIFEST).read_text())
    change(record)
    (run / MANIFEST).write_text(json.dumps(record))


def test_a_newer_format_asks_for_an_upgrade(run: Path) -> None:
    change_manifest(run, lambda record: record.update(format=2, lorafx="9.0", surprise=True))
    message = refusal(ArtifactError, lambda: lorafx.load(run))
    assert "format 2, written by lorafx 9.0" in message
    assert "upgrade" in message


def test_a_manifest_cannot_point_outside_its_folder(run: Path) -> None:
    change_manifest(run, lambda record: record["files"].update({"../secret": {"bytes": 0, "sha256": ""}}))
    assert "broken manifest" in refusal(ArtifactError, lambda: lorafx.load(run))


def test_a_run_that_lacks_what_it_was_opened_with_is_refused(run: Path) -> None:
    change_manifest(run, lambda record: record["meta"]["base"].pop("hashes"))
    assert "broken manifest" in refusal(ArtifactError, lambda: lorafx.load(run))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.pop(next(iter(stored))), "lacks "),
        (lambda stored: stored.update(extra=torch.zeros(1)), "holds extra, which its recipe does not make"),
        (lambda stored: stored.update({next(iter(stored)): torch.zeros(1, 1)}), "expected shape"),
    ],
)
def test_values_that_do_not_fit_the_recipe_are_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, run: Path
) -> None:
    stored = load_file(run / "adapter_model.safetensors")
    change(stored)
    save_file(stored, run / "adapter_model.safetensors")
    seal(run)
    assert message in refusal(ArtifactError, lambda: lorafx.load(run))


def test_ties_are_checked_against_the_alias_table(run: Path) -> None:
    change_manifest(run, lambda r: r["meta"].update(aliases={"classifier.weight": "bert.pooler.dense.weight"}))
    assert "classifier.weight was one tensor with" in refusal(ArtifactError, lambda: lorafx.load(run))


def test_options_that_cannot_be_kept_or_do_not_belong_are_refused(
    run: Path, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    base = checkpoint("bert")
    program = lora(base, attn_implementation="eager")
    program.save(tmp_path / "eager")
    assert lorafx.load(tmp_path / "eager").source.options["attn_implementation"] == "eager"
    program.source.options["odd"] = object()  # type: ignore[index]
    assert "cannot be written down" in refusal(UsageError, lambda: program.save(tmp_path / "odd"))
    assert "knows its task" in refusal(UsageError, lambda: lorafx.load(run, task="fill-mask"))
    assert "without meta" in refusal(UsageError, lambda: lorafx.load(run, meta=True))
    assert "no base of its own" in refusal(UsageError, lambda: lorafx.load(base, base=base))
    change_manifest(run, lambda record: record["meta"]["base"]["options"].update(trust_remote_code=True))
    assert "code of its own" in refusal(UsageError, lambda: lorafx.load(run))
    with new_folder(tmp_path / "onnx", "onnx", {}) as folder:
        (folder / "model.onnx").write_bytes(b"")
    assert "onnx folder cannot be rewritten" in refusal(UsageError, lambda: lorafx.load(tmp_path / "onnx"))


# ---- folders appear whole or not at all


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> None:
        with new_folder(tmp_path / "a" / "b", "run", {}) as folder:
            (folder / "half").write_text("half")
            raise ArtifactError("halfway")

    assert refusal(ArtifactError, fails) == "halfway"
    assert list((tmp_path / "a").iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    def write() -> None:
        with new_folder(tmp_path / "file" / "run", "run", {}):
            pass

    assert "cannot be written" in refusal(ArtifactError, write)


def test_an_empty_folder_and_a_link_can_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "latest").symlink_to("empty")
    with new_folder(tmp_path / "latest", "run", {"a": 1}) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("text")
    manifest = read_manifest(tmp_path / "empty", hashes=True)
    assert (manifest.meta, list(manifest.files)) == ({"a": 1}, ["sub/file"])


def test_two_writers_of_one_folder_do_not_mix(tmp_path: Path) -> None:
    def second() -> None:
        with new_folder(tmp_path / "out", "run", {}) as slow:
            (slow / "slow").write_text("")
            with new_folder(tmp_path / "out", "run", {}) as fast:
                (fast / "fast").write_text("")

    assert "exists already" in refusal(UsageError, second)
    assert list(read_manifest(tmp_path / "out").files) == ["fast"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


WRITER = """
import os, signal, sys
from lorafx.files.folder import new_folder
with new_folder(sys.argv[1], "run", {}, overwrite=True) as folder:
    (folder / "file").write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_refused_and_cleared_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", WRITER, str(out)]
    assert subprocess.run(command, check=False, timeout=60).returncode == -9
    (left,) = tmp_path.iterdir()
    assert f"{left}: no lorafx.json" in refusal(ArtifactError, lambda: find_manifest(left))
    with new_folder(out, "run", {}) as folder:
        (folder / "file").write_text("new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_folder_put_aside_by_a_killed_writer_comes_back(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", "run", {}) as folder:
        (folder / "file").write_text("old")
    (tmp_path / "out").rename(tmp_path / ".out.old-12ab")

    def fails() -> None:
        with new_folder(tmp_path / "out", "run", {}, overwrite=True):
            raise ArtifactError("not this time")

    assert refusal(ArtifactError, fails) == "not this time"
    assert (tmp_path / "out" / "file").read_text() == "old"


# ---- killed at any moment


def test_a_folder_killed_at_any_moment_never_passes_for_whole(tmp_path: Path) -> None:
    kills = kill_nine(partial(write_files, tmp_path / "out"), tmp_path / "out", tries=20)
    assert kills.killed >= 10


@pytest.mark.slow
def test_a_run_killed_at_any_moment_never_passes_for_whole(checkpoint: Checkpoints, tmp_path: Path) -> None:
    kills = kill_nine(partial(save_runs, checkpoint("bert"), tmp_path / "run"), tmp_path / "run", tries=6)
    assert kills.killed >= 3
    lorafx.load(tmp_path / "run")
