"""Initial values that are made of the weights: at once where these are there, else when a run is opened with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from torch import Tensor

import lorafx
from lorafx.cli import main
from lorafx.edit import Edit
from lorafx.errors import CaptureError, UsageError
from lorafx.pipeline import run
from lorafx.site import Site
from lorafx.testing.laws import as_installed
from tests import zoo
from tests.pissa import Pissa


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def known() -> Iterator[None]:
    with as_installed(Pissa):
        yield


@pytest.mark.parametrize("model", ["bert", "gpt2"])  # (out, in) as it is stored, and turned
def test_they_are_of_the_weight_as_a_matrix(model: str) -> None:
    base = zoo.captured(model)
    program = run(base, [Pissa(rank=3)])
    for entry in program.history[0].inserted:
        weight = base.tensor(f"{entry.module}.weight").detach()
        matrix = weight.T if model == "gpt2" and "lm_head" not in entry.module else weight
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        product = program.tensor(entry.tensors["lora_B"]) @ program.tensor(entry.tensors["lora_A"])
        # fp32 against fp64, of weights of order one.
        torch.testing.assert_close(product.double(), u[:, :3] * s[:3] @ v[:3], rtol=0, atol=1e-5)
    assert {program.roles[name] for name in program.trainable()} == {"adapter", *(["head"] if model == "bert" else [])}


def test_a_run_of_the_command_line_has_them_when_it_is_opened(
    known: None, tiny_checkpoint: Path, tiny_table: Path, tmp_path: Path
) -> None:
    options = ["--task", "text-classification", "--num-labels", 2, "--pass", "pissa", "--pissa.targets", "query"]
    begun = call("rewrite", tiny_checkpoint, *options, "-o", tmp_path / "run")
    assert begun.exit_code == 0, begun.output
    with safe_open(tmp_path / "run" / "adapter_model.safetensors", "pt") as stored:
        assert not [key for key in stored.keys() if "query" in key]  # noqa: SIM118 - no mapping
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    meta = json.loads((tmp_path / "run" / "lorafx.json").read_text())["meta"]
    assert "has its values when the run is opened" in meta["peft"]
    assert len(meta["of_weights"]) == 8
    assert any(
        "made of weights" in note for note in json.loads((tmp_path / "run" / "report.json").read_text())["notes"]
    )
    opened = lorafx.load(tmp_path / "run")
    expected = lorafx.rewrite(lorafx.capture(tiny_checkpoint, "text-classification", 2), [Pissa(targets="query")])
    inserted = opened.names("adapter", "statistic")
    assert all(torch.equal(opened.tensor(name), expected.tensor(name)) for name in inserted)
    trained = call("train", tmp_path / "run", "--data", tiny_table, "--max-steps", 2, "-o", tmp_path / "trained")
    assert trained.exit_code == 0, trained.output
    again = lorafx.load(tmp_path / "trained")
    starts = [name for name in inserted if again.roles[name] == "statistic"]
    assert all(torch.equal(again.tensor(name), opened.tensor(name)) for name in starts)
    moved = [name for name in inserted if not torch.equal(again.tensor(name), opened.tensor(name))]
    assert sorted(moved) == sorted(opened.names("adapter"))
    assert lorafx.verify(again, lorafx.fold(again)).ok


@dataclass(frozen=True)
class Wrong(Pissa):
    """Makes what it should not of the weights."""

    def factor_a(self, edit: Edit, site: Site, shape: tuple[int, ...]) -> torch.fx.Node:
        def made(weight: Tensor) -> Tensor:
            return weight[: shape[0], :-1] if self.rank == 4 else weight[: shape[0]] / 0

        return edit.parameter(site, "lora_A.weight", shape, of_weight=made)


@pytest.mark.parametrize(("rank", "why"), [(4, r"shape \(4, 31\), not \(4, 32\)"), (2, "values that are not finite")])
def test_what_is_wrong_is_named(rank: int, why: str) -> None:
    with pytest.raises(CaptureError, match=rf"query: what was made of its weight has {why}"):
        run(zoo.captured("bert"), [Wrong(rank=rank, targets="query")])


def test_a_pass_of_no_installed_package_cannot_be_saved(tiny_checkpoint: Path, tmp_path: Path) -> None:
    program = run(lorafx.capture(tiny_checkpoint), [Pissa(targets="query")])
    with pytest.raises(UsageError, match="the pass pissa is in no installed package"):
        program.save(tmp_path / "run")
