"""A graph run a block at a time computes what it computes at once, and holds no more than a block."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import lorafx
from lorafx.deferred import running
from lorafx.deferred import tensor as in_memory
from lorafx.deferred.programs import deferring, is_deferring
from lorafx.deferred.tensor import recipe_of, value
from lorafx.graph.call import flatten
from lorafx.graph.evaluation import evaluation_form
from lorafx.graph.segments import compile_graph
from lorafx.graph.tree import named_tensors
from lorafx.parity.runner import Place, program_runner
from lorafx.passes.lora import Lora
from lorafx.public import Program
from tests.small import adapted, captured, llama

IDS = torch.randint(5, 45, (2, 6), generator=torch.Generator().manual_seed(0))
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@pytest.fixture(scope="module")
def decoder() -> Program:
    return adapted(captured(llama), Lora(rank=2, targets="all-linear"))


def outputs(program: Program, dtype: torch.dtype | None = None, *, by_block: bool) -> dict[str, Tensor]:
    return program_runner(program, Place("cpu", torch.get_num_threads(), dtype, by_block), "it")(INPUTS)


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("later", [False, True])
def test_block_by_block_is_the_same_to_the_last_bit(decoder: Program, later: bool, dtype: torch.dtype | None) -> None:
    program = deferring(decoder) if later else decoder
    whole, parts = outputs(program, dtype, by_block=False), outputs(program, dtype, by_block=True)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert all(parts[name].dtype == (dtype or torch.float32) for name in parts)
    assert is_deferring(program) is later


def test_a_large_matrix_is_applied_in_parts(decoder: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = outputs(decoder, torch.float64, by_block=True)["logits"]
    used: list[tuple[int, ...]] = []
    monkeypatch.setattr(running, "_LARGE", 1)
    monkeypatch.setattr(in_memory, "_HELD", 2048)
    monkeypatch.setattr(in_memory, "release", lambda address, size: False)
    plain = running.passing_rows

    def watched(weight: Tensor) -> Iterator[Tensor]:
        for rows in plain(weight):
            used.append(tuple(rows.shape))
            yield rows

    monkeypatch.setattr(running, "passing_rows", watched)
    parts = outputs(decoder, torch.float64, by_block=True)["logits"]
    assert torch.allclose(parts, whole, rtol=0.0, atol=1e-14)  # products are summed in another order
    assert len(used) > 7
    assert max(rows * columns * 8 for rows, columns in used) <= 2048
    linear = torch.nn.Linear(6, 300)
    with torch.no_grad(), running.LargeInParts():
        found = linear(torch.eye(6))
    assert torch.allclose(found, linear.weight.t() + linear.bias, atol=1e-6), "modules, with their biases"


def test_what_a_weight_was_computed_of_is_given_back_before_the_next(
    decoder: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    folded = lorafx.fold(decoder, stream=True, gather="never", check=False)
    events: list[str] = []

    def noted(tensor: Tensor) -> Tensor:
        events.append("computed" if recipe_of(tensor).there is None else "there")
        return value(tensor)

    graph = compile_graph(folded.graph)
    monkeypatch.setattr(running, "forget", lambda tensor: events.append("given back"))
    inputs = flatten(folded, folded.example)
    graph.by_segment(inputs, lambda segment, taken: running.run_segment(folded.root, segment, taken, noted))
    following = [after for event, after in itertools.pairwise(events) if event == "computed"]
    assert len(following) == 14
    assert set(following) == {"given back"}


def test_tensors_of_one_block_are_there_at_a_time(decoder: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    program = deferring(evaluation_form(decoder))
    computed: list[Tensor] = []

    def counted(tensor: Tensor) -> Tensor:
        computed.append(value(tensor))
        return computed[-1]

    monkeypatch.setattr(running, "value", counted)
    graph = compile_graph(program.graph)
    ends = []
    segments = graph.by_segment

    def watched(inputs: list[object], run: object) -> object:
        def counting(segment: object, taken: list[object]) -> object:
            result = run(segment, taken)  # type: ignore[operator]
            ends.append(len(computed))
            assert is_deferring(program)
            held = [tensor for _, tensor in named_tensors(program.root)]
            assert not any(tensor is there for tensor in held for there in computed), "given up after the block"
            return result

        return segments(inputs, counting)  # type: ignore[arg-type]

    monkeypatch.setattr(graph, "by_segment", watched)
    with torch.no_grad():
        running.run_by_block(graph, program.root, [IDS, INPUTS["attention_mask"]])
    blocks = [segment.block for segment in graph.segments]
    assert len({block for block in blocks if block}) == 2
    steps = [after - before for before, after in zip([0, *ends], ends, strict=False)]
    assert max(steps) < sum(steps) / 2 + 1, "no segment computed what another reads"


def test_a_block_that_fails_leaves_the_program_as_it_was(decoder: Program) -> None:
    program = deferring(evaluation_form(decoder))
    before = {name: id(tensor) for name, tensor in named_tensors(program.root)}
    graph = compile_graph(program.graph)
    with torch.no_grad(), pytest.raises(IndexError):
        running.run_by_block(graph, program.root, [IDS + 10_000, INPUTS["attention_mask"]])
    assert {name: type(tensor) for name, tensor in named_tensors(program.root)}.keys() == before.keys()
    assert is_deferring(program)
    again = lorafx.verify(decoder, program, shapes=[(2, 6)])
    assert again.max_abs == 0.0
