"""A run opened over the capture that it was made from is the run as any process opens it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafx
from lorafx.commands import job
from lorafx.errors import ArtifactError
from lorafx.frontend import load as loading
from lorafx.frontend.load import load_over
from lorafx.graph.program import structure
from lorafx.graph.tree import named_tensors, tensor_hash
from lorafx.recipes.recipe import Recipe

RECIPE: dict[str, Any] = {
    "model": {"task": "text-classification", "num_labels": 2},
    "pass": [{"name": "lora", "rank": 2}, {"name": "finegates", "budget": 0.6}],
}


def job_of(checkpoint: Path, table: Path, out: Path) -> job.Job:
    train = {"max_steps": 2, "batch_size": 8, "learning_rate": 1e-2}
    return job.Job(Recipe.parse(RECIPE), checkpoint, table, None, out, train)


def trained(made: job.Job, run: Path, inputs: Mapping[str, str]) -> lorafx.Program:
    base = job._train(made, run, inputs)
    assert base is not None, "no config was changed"
    return base


def test_it_is_what_loading_gives(tiny_checkpoint: Path, tiny_table: Path, tmp_path: Path) -> None:
    made, run = job_of(tiny_checkpoint, tiny_table, tmp_path), tmp_path / "run"
    base = trained(made, run, made.training_inputs())
    again, over = lorafx.load(run), load_over(run, base)
    assert structure(over.graph) == structure(again.graph)
    assert {name: tensor_hash(value) for name, value in named_tensors(over.root)} == {
        name: tensor_hash(value) for name, value in named_tensors(again.root)
    }
    assert over.roles == again.roles
    assert over.trainable().keys() == again.trainable().keys()
    assert over.config.to_dict() == again.config.to_dict()
    assert over.trained == again.trained
    assert [entry.step for entry in over.history] == [entry.step for entry in again.history]
    one, other = (program.source.model.state_dict() for program in (over, again))
    assert all(torch.equal(one[name], other[name]) for name in other), "the eager model has the run's values"


def test_a_base_that_changed_meanwhile_is_refused(tiny_checkpoint: Path, tiny_table: Path, tmp_path: Path) -> None:
    import shutil

    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    made, run = job_of(checkpoint, tiny_table, tmp_path), tmp_path / "run"
    base = trained(made, run, made.training_inputs())
    weights = checkpoint / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="base checkpoint changed since the rewrite"):
        load_over(run, base)


def test_a_job_captures_its_base_once(
    tiny_checkpoint: Path, tiny_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("captured twice")

    monkeypatch.setattr(job, "_SECONDS", 0.0)  # the fewest rounds: nothing is asked of the speed
    monkeypatch.setattr(loading, "capture", never)
    made = job_of(tiny_checkpoint, tiny_table, tmp_path / "out")
    job.run_job(made, lambda _: None)
    assert (tmp_path / "out" / "onnx" / "model.onnx").is_file()


def test_what_training_changed_in_a_config_is_not_taken_for_the_base(
    tiny_checkpoint: Path, tiny_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafx.training import fit

    train = fit.train

    def changing(program: lorafx.Program, *args: Any, **options: Any) -> Any:
        program.config.hidden_dropout_prob = 0.5
        return train(program, *args, **options)

    monkeypatch.setattr(fit, "train", changing)
    made = job_of(tiny_checkpoint, tiny_table, tmp_path)
    assert job._train(made, tmp_path / "run", made.training_inputs()) is None
