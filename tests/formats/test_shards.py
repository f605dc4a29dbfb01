"""A checkpoint written a tile at a time is the one transformers and safetensors would have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from lorafx.deferred import tiles
from lorafx.deferred.tensor import deferred
from lorafx.errors import UsageError
from lorafx.files.folder import FileEntry, file_hash, new_folder, read_manifest
from lorafx.files.progress import end_progress, noted_whole
from lorafx.formats import shards
from lorafx.formats.shards import write_checkpoint, write_file

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}


def models() -> dict[str, nn.Module]:
    llama = hf.LlamaConfig(**SIZES, intermediate_size=40, num_key_value_heads=2, tie_word_embeddings=True)
    mixtral = hf.MixtralConfig(**SIZES, intermediate_size=40, num_key_value_heads=2, num_local_experts=3)
    t5 = hf.T5Config(d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4, vocab_size=61)
    gpt2 = hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=61, n_positions=16)
    return {
        "tied": hf.LlamaForCausalLM(llama),
        "in bf16": hf.LlamaForCausalLM(llama).bfloat16(),
        "experts in one tensor": hf.MixtralForCausalLM(mixtral),
        "three names of one tensor": hf.T5ForConditionalGeneration(t5),
        "buffers": hf.GPT2LMHeadModel(gpt2),
        "a bare encoder": hf.BertModel(hf.BertConfig(**SIZES, intermediate_size=40)),
    }


def put_off(model: nn.Module) -> nn.Module:
    """The model with every parameter computed later; ties stay."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                made.setdefault(id(value), nn.Parameter(deferred(value.detach()), requires_grad=False))
                module._parameters[name] = made[id(value)]
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


@pytest.mark.parametrize("size", ["20KB", "5GB"])
@pytest.mark.parametrize("name", models())
def test_the_folder_is_the_one_transformers_writes(
    name: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE", 100)
    model = models()[name].eval()
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)  # type: ignore[operator]
    (tmp_path / "ours").mkdir()
    entries = write_checkpoint(put_off(model), tmp_path / "ours", size)
    end_progress(tmp_path / "ours")
    ours, theirs = (tensors(tmp_path / side) for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    names, others = (sorted(file.name for file in (tmp_path / side).iterdir()) for side in ("ours", "theirs"))
    if name != "experts in one tensor":  # transformers counts each expert as large as the tensor it is cut from
        assert names == others
        for file in names:
            left, right = ((tmp_path / side / file).read_bytes() for side in ("ours", "theirs"))
            assert json.loads(left) == json.loads(right) if file.endswith(".json") else left == right, file
    files = [tmp_path / "ours" / file for file in names if file.endswith(".safetensors")]
    assert {file.name: (file.stat().st_size, file_hash(file)) for file in files} == {
        file: (entry.size, entry.sha256) for file, entry in entries.items()
    }


def test_a_file_is_the_one_safetensors_writes_bit_by_bit(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    held = {
        f"of {kind}": torch.arange(12).reshape(3, 4).to(kind)
        for kind in (*kinds, torch.int8, torch.uint8, torch.uint16)
    }
    held |= {"yes or no": torch.tensor([True, False]), "one number": torch.tensor(2.5), "nothing": torch.zeros(0, 4)}
    save_file(held, tmp_path / "theirs", metadata={"format": "pt"})
    entry = write_file(tmp_path / "ours", held)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert entry.sha256 == file_hash(tmp_path / "theirs")


def test_values_that_lie_otherwise_in_memory_are_written_row_by_row(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    write_file(tmp_path / "file", {"turned": base.t(), "turned later": deferred(base).t()})
    found = load_file(tmp_path / "file")
    assert torch.equal(found["turned"], base.t())
    assert torch.equal(found["turned later"], base.t())


# ---- going on


def interrupted(model: nn.Module, folder: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin to write ``model`` as a folder that can be gone on with, and stop in the middle of a file."""
    plain, count = shards.write_file, 0

    def stopped(file: Path, *rest: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            file.write_bytes(b"half a file")
            raise KeyboardInterrupt
        return plain(file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_file", stopped)
        with pytest.raises(KeyboardInterrupt), new_folder(folder, "hf", {}, resume="abc") as part:
            write_checkpoint(model, part, "20KB")


def went_on(model: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch, resume: str = "abc") -> list[str]:
    """Write ``model`` to the end; the names of the files that were written for it."""
    plain, names = shards.write_file, []

    def noted(file: Path, *rest: Any) -> Any:
        names.append(file.name)
        return plain(file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_file", noted)
        known: dict[str, FileEntry] = {}
        with new_folder(folder, "hf", {}, known=known, resume=resume) as part:
            known.update(write_checkpoint(model, part, "20KB"))
    return names


def hidden(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.name.startswith(".")]


def test_an_interrupted_writer_goes_on_at_the_last_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = put_off(models()["tied"].eval())
    interrupted(model, tmp_path / "out", 3, monkeypatch)
    assert not (tmp_path / "out").exists()
    assert len(hidden(tmp_path)) == 1
    again = went_on(model, tmp_path / "out", monkeypatch)
    read_manifest(tmp_path / "out", hashes=True)
    assert hidden(tmp_path) == []
    whole = went_on(model, tmp_path / "whole", monkeypatch)
    assert again == whole[2:]
    for file in sorted((tmp_path / "whole").glob("model*")):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    left, right = (sorted(file.name for file in (tmp_path / side).iterdir()) for side in ("out", "whole"))
    assert left == right


def test_a_file_that_changed_meanwhile_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = put_off(models()["tied"].eval())
    interrupted(model, tmp_path / "out", 3, monkeypatch)
    (part,) = hidden(tmp_path)
    first = sorted(part.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    assert first.name in went_on(model, tmp_path / "out", monkeypatch)
    read_manifest(tmp_path / "out", hashes=True)


def test_what_a_killed_writer_left_beside_whole_files_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = put_off(models()["tied"].eval())
    interrupted(model, tmp_path / "out", 3, monkeypatch)
    (part,) = hidden(tmp_path)
    (part / "lorafx.json").write_text("{}", encoding="utf-8")  # killed when all but the renaming was done
    (part / "tmp123").mkdir()
    (part / "tmp123" / "config.json").write_text("{}", encoding="utf-8")
    again = went_on(model, tmp_path / "out", monkeypatch)
    manifest = read_manifest(tmp_path / "out", hashes=True)
    assert again == went_on(model, tmp_path / "whole", monkeypatch)[2:]
    assert sorted(manifest.files) == sorted(read_manifest(tmp_path / "whole").files)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*manifest.files, "lorafx.json"}


def test_a_writer_stopped_after_its_last_file_writes_none_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = put_off(models()["tied"].eval())

    def stopped() -> None:
        with new_folder(tmp_path / "out", "hf", {}, resume="abc") as part:
            write_checkpoint(model, part, "20KB")
            raise KeyboardInterrupt  # while what was written is compared, say

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert went_on(model, tmp_path / "out", monkeypatch) == []
    assert hidden(tmp_path / "out") == []


def test_a_writer_stopped_just_before_the_folder_gets_its_name_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then its notes are gone and its manifest tells what is complete."""
    model = put_off(models()["tied"].eval())

    def stop(old: Path, new: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", "hf", {}, resume="abc") as part:
            write_checkpoint(model, part, "20KB")
    assert noted_whole(part) == {}
    assert went_on(model, tmp_path / "out", monkeypatch) == []
    went_on(model, tmp_path / "undisturbed", monkeypatch)
    gone_on, undisturbed = (read_manifest(tmp_path / name).files for name in ("out", "undisturbed"))
    assert gone_on == undisturbed
    assert hidden(tmp_path / "out") == []


def test_what_was_made_from_something_else_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = put_off(models()["tied"].eval())
    interrupted(model, tmp_path / "out", 3, monkeypatch)
    again = went_on(model, tmp_path / "out", monkeypatch, resume="def")
    assert again == went_on(model, tmp_path / "whole", monkeypatch)
    assert hidden(tmp_path) == []


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), new_folder(tmp_path / "out", "hf", {}, resume="abc"):
        raise RuntimeError("mine")
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", "hf", {}, resume="abc") as first:
        (first / "file").write_text("mine", encoding="utf-8")
        with (
            pytest.raises(UsageError, match="another process is writing this"),
            new_folder(tmp_path / "out", "hf", {}, resume="abc"),
        ):
            raise AssertionError("two writers")
        assert (first / "file").read_text(encoding="utf-8") == "mine"
    assert (tmp_path / "out" / "file").is_file()


def test_no_file_is_counted_that_is_not_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers writes all but the weights here, and would tell of "0it" of those; afterwards it tells as before."""
    model: Any = models()["a bare encoder"].eval()
    write_checkpoint(put_off(model), tmp_path)
    end_progress(tmp_path)
    assert "0it" not in capfd.readouterr().err
    hf.BertModel(model.config).save_pretrained(tmp_path / "theirs")
    assert "Writing model shards" in capfd.readouterr().err
