"""Blocks are compared on the inputs they have in the unfolded program, and a wrong one is named."""

from __future__ import annotations

import pytest
import torch

import lorafx
from lorafx.passes.lora import Lora
from lorafx.proof.blocks import prove_blocks
from lorafx.public import Program
from tests.small import adapted, captured, llama, own

LAYERS = 2


@pytest.fixture(scope="module")
def decoder() -> Program:
    return adapted(captured(llama), Lora(rank=2, targets="all-linear"))


@pytest.fixture
def folded(decoder: Program) -> Program:
    return lorafx.fold(decoder, gather="never")


@pytest.mark.parametrize("stream", [False, True])
def test_every_block_and_the_outputs_are_compared(decoder: Program, stream: bool) -> None:
    folded = lorafx.fold(decoder, stream=stream, gather="never")
    proof = prove_blocks(decoder, folded, decoder.example, "it")
    assert proof.ok
    assert (proof.blocks, proof.missed) == (LAYERS, ())
    compared = {case.output.split(":")[0] for case in proof.comparison.cases}
    assert compared >= {"model.layers.0", "model.layers.1", "outside blocks"}
    assert 0.0 < proof.comparison.max_rel < 1e-6, "folded weights are rounded, so nothing is equal by chance"


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_wrong_block_is_named_and_no_other(decoder: Program, folded: Program, layer: int) -> None:
    with torch.no_grad():
        weight = own(folded.root, f"model.layers.{layer}.mlp.down_proj.weight")
        weight[[3, 4]] = weight[[4, 3]]
    proof = prove_blocks(decoder, folded, decoder.example, "it")
    assert not proof.ok
    wrong = {
        case.output.split(":")[0]
        for case in proof.comparison.cases
        if proof.comparison.relative(case) > proof.comparison.tolerance
    }
    assert wrong == {f"model.layers.{layer}"}


def test_values_under_other_names_are_not_taken_for_compared(decoder: Program, folded: Program) -> None:
    other = folded.copy()
    for node in list(other.graph.nodes):
        if node.op == "call_function":
            node._rename(f"{node.name}_anew")
    proof = prove_blocks(decoder, other, decoder.example, "it")
    assert not proof.ok
    assert proof.blocks == 0
    assert set(proof.missed) == {f"model.layers.{layer}" for layer in range(LAYERS)}
    assert not proof.comparison.ok
