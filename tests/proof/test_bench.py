"""Timing side by side: turns, ratios round by round, and every figure where it is promised."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lorafx.errors import ArtifactError, UsageError
from lorafx.parity.runner import Runner
from lorafx.proof import bench as module
from lorafx.proof.bench import BenchResult, bench
from lorafx.proof.exported import session_options
from lorafx.proof.memory import peak_memory
from lorafx.proof.open import open_runner
from tests.small import bert, captured

SHAPES = ((1, 4), (3, 9))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "bert"
    torch.manual_seed(0)
    model: Any = bert()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def result(checkpoint: Path) -> BenchResult:
    return bench(("eager", checkpoint), captured(bert), captured(bert), shapes=SHAPES, repeats=3, threads=1)


def test_everything_is_measured(result: BenchResult, checkpoint: Path) -> None:
    labels = ["eager", "BertForSequenceClassification", "BertForSequenceClassification #2"]
    assert [candidate.label for candidate in result.candidates] == labels
    assert [(t.batch, t.length) for t in result.timings] == [shape for shape in SHAPES for _ in range(3)]
    for timing in result.timings:
        assert timing.rounds == 3
        assert 0 < timing.p10 <= timing.median <= timing.p90
        assert 0 < timing.ratio_p10 <= timing.ratio <= timing.ratio_p90
        assert timing.spread >= 0
    assert all(t.ratio == 1.0 for t in result.timings if t.candidate == "eager")
    eager, program, _ = result.candidates
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert (eager.kind, eager.provider, eager.threads, eager.bytes_on_disk) == ("checkpoint", "torch cpu", 1, size)
    assert (program.kind, program.bytes_on_disk, program.peak_bytes) == ("program", None, None)
    assert eager.peak_bytes is not None  # where the system does not tell, there is nothing to test
    assert eager.library_bytes is not None
    assert eager.peak_bytes > eager.library_bytes > 50e6


def test_the_result_is_json_and_a_table(result: BenchResult) -> None:
    value = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(value) == {"machine", "candidates", "timings"}
    assert {"torch", "transformers", "python", "cores"} <= set(value["machine"])
    fields = {"candidate", "batch", "length", "rounds", "median", "p10", "p90", "ratio", "ratio_p10", "ratio_p90"}
    assert set(value["timings"][0]) == fields | {"spread"}
    text = result.text(width=90)
    assert max(map(len, text.splitlines())) <= 90
    assert "1x4" in text
    assert "times as fast as eager" in " ".join(text.split())
    assert "scatter" in text
    assert str(result) == result.text()


def test_ratios_are_made_round_by_round() -> None:
    """A round that a busy machine slows down tenfold slows down both; medians of each would not show 2x."""
    first, own = [1.0, 10.0, 4.0, 40.0], [0.5, 5.0, 2.0, 20.0]
    timing = module._timing("own", 1, 2, own, first)
    assert (timing.ratio, timing.ratio_p10, timing.ratio_p90) == (2.0, 2.0, 2.0)
    assert timing.spread > 3
    assert module._quantile([1.0, 2.0, 3.0, 4.0, 5.0], 0.1) == pytest.approx(1.4)


def test_candidates_take_turns_within_a_budget() -> None:
    turns: list[str] = []

    def candidate(name: str) -> Runner:
        def call(inputs: dict[str, Any]) -> Any:
            turns.append(name)
            return inputs["input_ids"]

        return dataclasses.replace(open_runner(captured(bert)), call=call, label=name)

    pair = (candidate("a"), candidate("b"))
    found = bench(*pair, shapes=[(1, 2)], repeats=100, seconds=0.0, memory=False)
    assert turns[:4] == ["a", "a", "b", "b"], "warm-up"
    rounds = [turns[place : place + 2] for place in range(4, len(turns), 2)]
    assert len(rounds) == 5
    assert {frozenset(names) for names in rounds} == {frozenset("ab")}
    assert {names[0] for names in rounds} == {"a", "b"}, "neither always runs first"
    assert {timing.rounds for timing in found.timings} == {5}
    assert [candidate.label for candidate in found.candidates] == ["a", "b"]


def test_shapes_are_clipped_to_what_all_take_and_are_not_padded() -> None:
    seen: list[dict[str, Any]] = []
    runner = open_runner(captured(bert))
    spy = dataclasses.replace(runner, call=lambda inputs: seen.append(inputs) or inputs["input_ids"])
    found = bench(spy, shapes=[(2, 500), (2, 600)], repeats=1, memory=False)
    assert [(timing.batch, timing.length) for timing in found.timings] == [(2, 32)]
    assert bool(seen[0]["attention_mask"].all())


def test_errors_name_the_candidate(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to time"):
        bench()
    with pytest.raises(ArtifactError, match="nowhere"):
        bench(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"empty: a process of its own cannot run it: .*config\.json"):
        module._peak_of(tmp_path / "empty", (1, 2), 1, ("cpu", {}))


def test_peak_memory_is_the_process_own() -> None:
    """A child's mark does not start at its parent's, which holds torch and whatever tests made."""
    peak = peak_memory()
    assert peak is not None
    code = "from lorafx.proof.memory import peak_memory; print(peak_memory())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(child.stdout) < peak / 2


def spun_ms(options: onnxruntime.SessionOptions) -> float:
    """Processor time after a call of a session is done, while nobody asks for anything."""
    weight = numpy_helper.from_array(np.ones((512, 512), np.float32), "w")
    value, result = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [256, 512]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "one", [value], [result], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    spun = []
    for _ in range(5):
        session.run(None, {"x": np.ones((256, 512), np.float32)})
        started = time.process_time()
        time.sleep(0.1)
        spun.append(1e3 * (time.process_time() - started))
    return min(spun)


def test_a_session_that_is_done_leaves_the_processor_to_the_next_one() -> None:
    # Unknown names of options are ignored without a word. Default sessions spin for about 30 ms, these for 0.1.
    assert spun_ms(session_options(2)) < 3
