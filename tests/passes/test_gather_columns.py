"""Gathered columns: the same function from narrower weights, only where it pays, and only over channels that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx.backends import replay
from lorafx.backends.replay import converted
from lorafx.channels.gather import GPU_COST, gathers, pays
from lorafx.errors import RecipeError, UsageError
from lorafx.graph.tree import put_tensor
from lorafx.passes.dead_channels import DeadChannels
from lorafx.passes.finegates import Finegates
from lorafx.passes.gather_columns import GatherColumns
from lorafx.pipeline import run, to_eval
from lorafx.public import Program
from tests import zoo
from tests.passes.test_dead_channels import Mlp, captured

ALWAYS = GatherColumns(when="always")
#: What reads the residual stream in the families below, and the dimension its columns lie along.
READERS = {
    "bert": (("query.weight", "key.weight", "value.weight", "intermediate.dense.weight"), 1),
    "llama": (("q_proj.weight", "k_proj.weight", "v_proj.weight", "up_proj.weight", "gate_proj.weight"), 1),
    "gpt2": (("c_attn.weight", "c_fc.weight"), 0),
}
CLOSED = tuple(range(0, 32, 3))


def closed(program: Program, endings: tuple[str, ...], dim: int, columns: tuple[int, ...] = CLOSED) -> Program:
    """The evaluation form with these columns of these weights zero."""
    result = to_eval(program).copy()
    for name, value in list(result.root.named_parameters()):
        if name.endswith(endings):
            zeroed = value.detach().index_fill(dim, torch.tensor(columns), 0.0)
            put_tensor(result.root, name, nn.Parameter(zeroed, requires_grad=False))
    return result


def masked(model: str) -> Program:
    return closed(zoo.captured(model), *READERS[model])


def gather_nodes(program: Program) -> list[Any]:
    return program.graph.find_nodes(op="call_function", target=torch.ops.aten.index_select.default)


def equal(a: Program, b: Program) -> bool:
    # The same sums without terms that are 0: rounding of fp64, over several batches and lengths.
    return lorafx.verify(a, b, dtype=torch.float64).max_rel < 1e-12


@pytest.mark.parametrize("model", list(READERS))
def test_columns_are_gathered_once_for_all_that_read_them(model: str) -> None:
    program = masked(model)
    result = run(program, [ALWAYS])
    assert len(gather_nodes(result)) == 4, "two blocks, attention and FFN"
    assert equal(program, result)
    endings, dim = READERS[model]
    narrow = [name for name in result.roles if name.endswith(endings)]
    assert len(narrow) == 2 * len(endings)
    assert {result.tensor(name).shape[dim] for name in narrow} == {32 - len(CLOSED)}
    rows = result.facts("Gathered")
    assert {(row["weight"], row["before"], row["after"]) for row in rows} == {(name, 32, 21) for name in narrow}


def test_other_columns_need_a_gather_of_their_own() -> None:
    program = closed(masked("bert"), ("key.weight",), 1, (1, 2))
    result = run(program, [ALWAYS])
    assert len(gather_nodes(result)) == 6
    assert result.tensor("bert.encoder.layer.0.attention.self.key.weight").shape == (32, 19)
    assert equal(program, result)


class Wide(nn.Module):
    """A norm over 8 channels, one reader of half of them, and another that needs all."""

    def __init__(self, outputs: int):
        super().__init__()
        self.norm, self.reader, self.other = nn.LayerNorm(8), nn.Linear(8, outputs), nn.Linear(8, 3)
        with torch.no_grad():
            self.reader.weight[:, :4] = 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        return self.reader(x), self.other(x)


@pytest.mark.parametrize(("outputs", "gathered"), [(4, 0), (4000, 1)])
def test_auto_gathers_where_the_multiply_adds_saved_cost_more(outputs: int, gathered: int) -> None:
    program = captured(Wide(outputs), torch.randn(2, 3, 8).double())
    assert len(gathers(program)) == 1
    for when, expected in (("auto", gathered), ("always", 1), ("never", 0)):
        assert len(gather_nodes(lorafx.fold(program, gather=when))) == expected  # type: ignore[arg-type]
    assert equal(program, lorafx.fold(program))


def test_a_gather_that_several_share_pays_sooner() -> None:
    outputs = next(size for size in range(1, 10_000) if pays(768, 384, [size]))
    assert not pays(768, 384, [outputs - 1])
    assert pays(768, 384, [outputs // 3 + 1] * 3)
    assert not pays(768, 767, [outputs]), "one column saved"
    assert not pays(768, 384, [outputs], GPU_COST), "products are cheaper there"


def test_columns_are_gathered_in_multiples() -> None:
    program = masked("bert")
    plain, rounded = (run(lorafx.fold(program, gather="never"), [GatherColumns("always", round_to=n)]) for n in (1, 8))
    assert len(gather_nodes(plain)) == len(gather_nodes(rounded)) == 4
    widths = [[row["after"] for row in result.facts("Gathered")] for result in (plain, rounded)]
    assert widths[1] == [-(-width // 8) * 8 for width in widths[0]]
    assert widths[0] != widths[1]
    assert equal(program, rounded)
    assert not GatherColumns("always", round_to=8).sites(rounded).taken
    with pytest.raises(RecipeError, match="at least 1"):
        run(plain, [GatherColumns(round_to=0)])


def test_a_second_time_changes_nothing() -> None:
    once = lorafx.fold(masked("bert"), gather="always")
    twice = lorafx.fold(once, gather="always")
    assert len(gather_nodes(once)) == 4
    assert str(twice.graph) == str(once.graph)
    assert not ALWAYS.sites(once).taken


def test_columns_over_channels_that_can_be_removed_are_not_gathered() -> None:
    model = Mlp(nn.ReLU())
    with torch.no_grad():
        model.down.weight[:, [1, 4, 5]] = 0.0
    program = captured(model, torch.randn(3, 6).double())
    kept_wide = run(program, [DeadChannels(round_to=8)])  # a width asked for
    result = run(kept_wide, [ALWAYS])
    assert not gather_nodes(result)
    assert result.tensor("down.weight").shape == (5, 8)


def test_a_weight_with_another_reader_is_left_alone() -> None:
    model = Wide(4)
    model.other = model.reader
    assert not gathers(captured(model, torch.randn(2, 3, 8).double()))
    tied = closed(zoo.captured("gpt2"), ("wte.weight",), 1)  # the output layer's, and the embedding's
    assert not gathers(tied)


def test_a_weight_that_reads_nothing_keeps_a_column() -> None:
    model = Wide(5)
    with torch.no_grad():
        model.reader.weight.zero_()
    program = captured(model, torch.randn(2, 3, 8).double())
    result = run(program, [ALWAYS])
    assert result.tensor("reader.weight").shape == (5, 1)
    assert equal(program, result)
    assert not ALWAYS.sites(result).taken


def test_training_form_is_left_alone() -> None:
    program = zoo.captured("bert").copy()
    name = "bert.encoder.layer.0.attention.self.query.weight"
    put_tensor(program.root, name, nn.Parameter(torch.zeros(32, 32)))
    assert not ALWAYS.sites(program).taken


def test_columns_that_gates_closed_are_gathered() -> None:
    step = Finegates(couple=False, targets=("query", "key", "value"), train_biases=False)
    program = lorafx.rewrite(zoo.captured("bert"), [step])
    for name in program.names("gate"):
        if name.endswith("gate_in"):
            theta = torch.full((32,), 5.0)
            theta[list(CLOSED)] = -5.0
            program.load({name: theta})
    plain, result = (lorafx.fold(program, gather=when) for when in ("never", "always"))
    assert [node.args[0].name for node in gather_nodes(result)] == ["layer_norm", "layer_norm_2"]
    assert equal(plain, result)
    assert lorafx.verify(program, result).ok


def test_what_is_gathered_is_no_longer_reported_as_kept() -> None:
    program = closed(masked("bert"), ("output.dense.weight",), 1, (0, 1))  # neurons and head channels to remove
    title = "dead-channels: Zero but kept"
    before, after = (lorafx.fold(program, gather=when).report for when in ("never", "always"))
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert any((row["weight"], row["dimension"]) == (name, 1) for row in before.sections[title])
    assert not any((row["weight"], row["dimension"]) == (name, 1) for row in after.sections.get(title, ()))
    assert any(row["weight"] == name for row in after.sections["gather-columns: Gathered"])


# ---- back ends


@pytest.mark.parametrize("model", list(READERS))
def test_onnx_computes_the_same_with_the_same_fused_operators(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[str]] = []

    def noted(*given: Any) -> Any:
        exported = converted(*given)
        made.append([node.op_type for node in exported.program.graph])
        return exported

    monkeypatch.setattr(replay, "converted", noted)
    plain, result = (lorafx.fold(masked(model), gather=when) for when in ("never", "always"))
    exported = lorafx.export(result, tmp_path / "onnx")
    assert exported is not None
    assert exported.max_rel < 1e-5  # fp32, other kernels
    lorafx.export(plain, tmp_path / "plain", check=False)
    after, before = made
    assert after.count("Gather") == before.count("Gather") + 4
    # The mask of the last block's one query is cut before it is negated, or after, as the trace has it.
    # Reshapes that follow each other become one where the trace knows their sizes to be alike.
    cut = ("Gather", "Slice", "Not", "Reshape", "Concat")
    assert sorted(op for op in after if op not in cut) == sorted(op for op in before if op not in cut)
    assert after.count("Reshape") <= before.count("Reshape")
    assert abs(after.count("Not") - before.count("Not")) <= 1


def test_a_checkpoint_cannot_hold_gathers_and_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafx.channels.gather.CPU_COST", 0.0)
    program = masked("bert")
    assert gather_nodes(lorafx.fold(program)), "it pays"
    with pytest.raises(UsageError, match=r"query\.weight, .* gather-columns at when = \"never\""):
        lorafx.export(lorafx.fold(program, gather="always"), tmp_path / "gathered", "hf")
    result = lorafx.export(program, tmp_path / "plain", "hf")
    assert result is not None
    assert result.ok
    assert not (tmp_path / "gathered").exists()
