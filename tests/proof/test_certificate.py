"""Certificates: what they say of a folded folder, and what checking one again finds."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import lorafx
from lorafx.cli import main
from lorafx.errors import UsageError
from lorafx.passes.lora import Lora
from lorafx.proof.certificate import check_folder, write_certificate
from tests import foreign, zoo


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter of it, and the two folded."""
    folder = foreign.base_and_adapter(tmp_path_factory.mktemp("certified"), ["query"])
    program = lorafx.capture(folder / "base", adapter=folder / "adapter", check=False)
    lorafx.export(lorafx.fold(program, check=False), folder / "out", format="hf")
    return folder


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_what_it_says(place: Path) -> None:
    record: dict[str, Any] = json.loads((place / "out" / "certificate.json").read_text())
    assert record["result"]["model.safetensors"]["sha256"] == _sha(place / "out" / "model.safetensors")
    assert record["base"]["hashes"]["model.safetensors"] == _sha(place / "base" / "model.safetensors")
    (adapter,) = record["adapters"]
    name = "adapter_model.safetensors"
    assert adapter["files"][name] == _sha(place / "adapter" / name)
    assert record["nothing_but_adapters"]
    folded = {one["name"]: one for one in record["tensors"]["folded"]}
    weight = "bert.encoder.layer.0.attention.self.query.weight"
    assert folded.keys() == {weight, weight.replace(".0.", ".1.")}
    assert {weight, weight.replace("weight", "lora_A.weight")} <= set(folded[weight]["made_of"])
    assert 0 < record["tensors"]["places"] <= 0.5 + 1e-9
    assert 0 < folded[weight]["largest"] < 1e-6
    assert record["functions"]["ok"]
    assert len(record["functions"]["cases"]) > 1
    assert not record["removed"]


def test_it_is_checked_again(place: Path) -> None:
    result = call("check", place / "out")
    assert result.exit_code == 0, result.output
    assert "4 merged tensors and 37 others are what base and adapter make" in result.stdout


@pytest.mark.parametrize("what", ["out", "base", "adapter"])
def test_a_file_that_changed(what: str, place: Path, tmp_path: Path) -> None:
    for name in ("out", "base", "adapter"):
        shutil.copytree(place / name, tmp_path / name)
    (tmp_path / "out" / "lorafx.json").unlink()  # the manifest would find it first
    record = json.loads((tmp_path / "out" / "certificate.json").read_text())
    record["adapters"][0]["path"] = str(tmp_path / "adapter")
    (tmp_path / "out" / "certificate.json").write_text(json.dumps(record))
    assert check_folder(tmp_path / "out", tmp_path / "base").ok
    file = next((tmp_path / what).glob("*model.safetensors"))
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    result = call("check", tmp_path / "out", "--base", tmp_path / "base")
    assert result.exit_code == 4
    assert f"{file} is another file" in result.stdout


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "modeling_other.py", "weights/more.safetensors", ".hidden/a.json"]
)
def test_a_file_that_was_put_there_later(name: str, place: Path, tmp_path: Path) -> None:
    """transformers puts an adapter that it finds in a folder on the model, for one."""
    shutil.copytree(place / "out", tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("A card.")
    assert check_folder(tmp_path / "out").ok
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("{}")
    found = check_folder(tmp_path / "out")
    assert found.ok == name.startswith(".")
    assert found.ok or f"{name} was put there later" in found.broken[0]


def test_files_that_are_right_and_tensors_that_are_not(place: Path, tmp_path: Path) -> None:
    """A certificate written for other weights: its hashes hold, and its tensors are composed anew."""
    shutil.copytree(place / "out", tmp_path / "out")
    (tmp_path / "out" / "lorafx.json").unlink()
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["bert.encoder.layer.0.attention.self.query.weight"][3, 4] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    record = json.loads((tmp_path / "out" / "certificate.json").read_text())
    record["result"]["model.safetensors"]["sha256"] = _sha(file)
    (tmp_path / "out" / "certificate.json").write_text(json.dumps(record))
    found = check_folder(tmp_path / "out", place / "base", [place / "adapter"])
    assert [line.partition(":")[0] for line in found.broken] == ["bert.encoder.layer.0.attention.self.query.weight"]


def test_what_is_not_here_is_said(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "out", tmp_path / "out")
    found = check_folder(tmp_path / "out", tmp_path / "nowhere")
    assert found.ok
    moved = "its adapter {} is not here; give its place (--adapter)".format(tmp_path / "adapter")
    assert found.unseen == (f"its base {tmp_path / 'nowhere'} is not here; give its place (--base)", moved)
    assert call("check", tmp_path / "out", "--base", place / "base", "--adapter", place / "adapter").exit_code == 0
    with pytest.raises(UsageError, match="its adapters are adapter; give the place of each"):
        check_folder(tmp_path / "out", None, [place / "adapter", place / "adapter"])


def test_it_tells_no_place_that_only_its_writer_has(place: Path, tmp_path: Path) -> None:
    """Where base and adapter lie is said from the folder, so that all can be moved together."""
    record = json.loads((place / "out" / "certificate.json").read_text())
    assert (record["base"]["path"], record["adapters"][0]["path"]) == ("../base", "../adapter")
    for name in ("out", "base", "adapter"):
        shutil.copytree(place / name, tmp_path / name)
    found = check_folder(tmp_path / "out")
    assert found.ok
    assert not found.unseen
    record["base"]["path"], record["adapters"][0]["path"] = None, None  # of one with no parent in common
    (tmp_path / "out" / "certificate.json").write_text(json.dumps(record))
    names = [line.partition(" is not here")[0] for line in check_folder(tmp_path / "out").unseen]
    assert names == ["its base base", "its adapter adapter"]


def test_an_adapter_that_trained_on_is_not_its_file(place: Path, tmp_path: Path) -> None:
    program = lorafx.capture(place / "base", adapter=place / "adapter", check=False)
    name = next(name for name in program.names("adapter") if name.endswith("lora_B.weight"))
    program.load({name: program.tensor(name) * 1.5})
    lorafx.export(lorafx.fold(program, check=False), tmp_path / "out", format="hf", check=False)
    found = check_folder(tmp_path / "out")
    assert found.ok
    assert found.unseen == ("what its tensors are made of: more than a checkpoint and LoRA adapters that files hold",)


def test_removed_channels_and_methods_of_our_own(tmp_path: Path) -> None:
    program = lorafx.rewrite(zoo.captured("bert"), [Lora(targets="query", rank=2)])
    zoo.randomised(program)
    weight = "bert.encoder.layer.0.intermediate.dense.weight"
    value = program.tensor(weight).detach().clone()
    value[:5] = 0
    copied = program.copy()
    copied.root.get_submodule(weight.removesuffix(".weight")).weight = torch.nn.Parameter(value, requires_grad=False)
    folded = lorafx.fold(copied, check=False)
    write_certificate(program, folded, tmp_path, "pt2", {}, {"ok": None}, None)
    record = json.loads((tmp_path / "certificate.json").read_text())
    removed = {one["name"]: (one["was"], one["is"]) for one in record["removed"]}
    assert removed[weight] == ([48, 32], [43, 32])
    assert record["tensors"] is None
    assert record["functions"]["ok"] is None


def test_none_or_broken(place: Path, tmp_path: Path) -> None:
    assert call("check", place / "base").exit_code == 5
    shutil.copytree(place / "out", tmp_path / "out")
    (tmp_path / "out" / "certificate.json").write_text("{}")
    result = call("check", tmp_path / "out")
    assert result.exit_code == 5
    assert "broken certificate" in result.stderr
