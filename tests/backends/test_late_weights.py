"""Decoders whose weights are computed as they are written: files as from memory, or a word that says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import lorafx
from lorafx.backends import export
from lorafx.backends import late_weights as module
from lorafx.backends.late_weights import LostError, StandIns
from lorafx.cli import main
from lorafx.deferred.programs import deferring
from lorafx.deferred.tensor import deferred, is_deferred
from lorafx.passes.lora import Lora
from lorafx.passes.magnitude import Magnitude
from lorafx.proof.open import open_runner
from tests import small, zoo

#: A tied head and Conv1D; layers that are pruned, in a dtype that the norms' scales have not.
CASES = {
    "gpt2": ([Lora(targets="all-linear", rank=4)], None),
    "gemma": ([Magnitude(targets="all-linear", blocks=block, keep=0.5) for block in (0, 1)], torch.float16),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("default")  # the converter's own
def test_what_is_written_late_is_what_is_written_from_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, dtype = CASES[name]
    program = zoo.randomised(lorafx.rewrite(zoo.captured(name), steps))
    written: list[int] = []
    tofile = module._Late.tofile
    monkeypatch.setattr(module._Late, "tofile", lambda self, file: (written.append(self.size), tofile(self, file))[1])
    for late in (False, True):
        lorafx.export(lorafx.fold(program, stream=late), tmp_path / str(late), generate=True, dtype=dtype, check=late)
        assert bool(written) is late
    for file in ("onnx/model.onnx", "onnx/model.onnx_data"):
        assert (tmp_path / "True" / file).read_bytes() == (tmp_path / "False" / file).read_bytes()


def test_the_command_streams_a_decoder_and_nothing_else_in_onnx(tmp_path: Path) -> None:
    checkpoint: Any = small.llama()
    checkpoint.save_pretrained(tmp_path / "base")
    words = ["export", str(tmp_path / "base"), "--stream", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, words)
    assert (result.exit_code, "give --format hf or --generate" in result.output) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_two_graphs_are_written_from_memory_and_compared_as_they_will_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unoptimised: list[bool] = []

    def noted(source: Any, **options: Any) -> Any:
        unoptimised.append(options["by_block"])
        return open_runner(source, **options)

    monkeypatch.setattr(export, "open_runner", noted)
    program = zoo.randomised(lorafx.rewrite(zoo.captured("t5"), [Lora(rank=2)]))
    result = lorafx.export(lorafx.fold(program, stream=True), tmp_path / "out", generate=True)
    assert result is not None
    assert result.ok
    assert unoptimised == [False]


# ---- views and copies of stand-ins


def weights(*shapes: tuple[int, ...]) -> tuple[StandIns, dict[str, Tensor], dict[str, Tensor]]:
    """Weights that are computed later, and their stand-ins."""
    chance = torch.Generator().manual_seed(0)
    late: dict[str, Tensor] = {
        str(number): deferred(torch.randn(shape, generator=chance)) for number, shape in enumerate(shapes)
    }
    made = StandIns()
    return made, late, made.of(late, late)


def graph_of(*arrays: np.ndarray) -> ir.Graph:
    held = [ir.Value(name=f"w{number}", const_value=ir.tensor(array)) for number, array in enumerate(arrays)]
    return ir.Graph([], [], nodes=[], initializers=held)


def settled(made: StandIns, *arrays: np.ndarray) -> list[np.ndarray]:
    graph = graph_of(*arrays)
    made.settle(graph)
    return [one.const_value.numpy() for one in graph.initializers.values() if one.const_value is not None]


VIEWS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda x: x,
    "transposed": lambda x: x.transpose(1, 0, 2),
    "turned round": lambda x: x.transpose(2, 0, 1),
    "in another shape": lambda x: x.reshape(6, 20),
    "with an axis": lambda x: x[None],
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_of_a_stand_in_is_one_of_the_weight(view: str) -> None:
    made, late, stand_ins = weights((4, 5, 6) if view != "in another shape" else (3, 2, 20))
    (found,) = settled(made, VIEWS[view](stand_ins["0"].numpy()))
    assert np.array_equal(found, VIEWS[view](late["0"].recipe.there.numpy()))  # type: ignore[attr-defined]


def test_joined_stand_ins_are_joined_weights() -> None:
    made, late, stand_ins = weights((4, 6), (3, 6))
    graph = graph_of(*(stand_in.numpy().T for stand_in in stand_ins.values()))
    made.watch(graph)
    arrays = [one.const_value.numpy() for one in graph.initializers.values() if one.const_value is not None]
    joined = np.ascontiguousarray(np.concatenate(arrays, axis=1))
    (found,) = settled(made, joined)
    assert np.array_equal(found, np.concatenate([late[name].recipe.there.numpy().T for name in late], 1))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "computed",
    [lambda x: x * 2, lambda x: x.copy(), lambda x: x[1:], lambda x: x[::2], lambda x: x.astype(np.float16)],
    ids=["doubled", "copied", "cut", "every second", "cast"],
)
def test_a_weight_that_is_not_found_again_is_named(computed: Callable[[Any], Any]) -> None:
    made, _, stand_ins = weights((4, 6))
    with pytest.raises(LostError, match=r"^0: the conversion|is a part of a weight"):
        settled(made, computed(stand_ins["0"].numpy()))


def test_no_two_stand_ins_are_equal() -> None:
    made, _, stand_ins = weights(*[(2, 2)] * 600)
    assert made is not None
    assert len({stand_in.numpy().tobytes() for stand_in in stand_ins.values()}) == 600


def test_a_hollow_model_has_every_weight_of_the_model_in_another_dtype() -> None:
    model, made = small.gpt2(), StandIns()
    hollow = made.hollow(model, torch.float16)
    assert hollow.get_parameter("lm_head.weight") is hollow.get_parameter("transformer.wte.weight")
    assert not hollow.get_parameter("transformer.wte.weight")[2:].any()
    made.give_place(hollow)
    for name, tensor in model.named_parameters():
        given = hollow.get_parameter(name)
        assert is_deferred(given) is (tensor.dim() > 1)
        assert torch.equal(given, tensor.half()), name


def test_weights_go_into_memory_where_the_conversion_computes_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[bool] = []

    def settle(self: StandIns, graph: Any) -> None:
        asked.append(bool(self._of))
        if self._of:
            raise LostError("w: lost")

    monkeypatch.setattr(StandIns, "settle", settle)
    program = deferring(small.captured(small.llama))
    assert lorafx.export(program, tmp_path / "out", generate=True) is not None
    assert asked == [True, False]
    assert "w: lost; the weights go into memory" in caplog.text


def test_a_session_has_the_threads_that_were_asked_for(tmp_path: Path) -> None:
    lorafx.export(small.captured(small.llama), tmp_path / "out", generate=True, check=False)
    for by_block in (False, True):
        session = open_runner(tmp_path / "out", threads=1, by_block=by_block).decoder.session
        options = session.get_session_options()
        assert options.intra_op_num_threads == 1
        if by_block:
            assert options.get_session_config_entry("session.disable_prepacking") == "1"
