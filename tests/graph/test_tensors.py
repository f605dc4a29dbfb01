"""The index of tensors and their readers stays true to the program, and folding walks a graph a few times, not n."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx.graph.edit import Edit
from lorafx.graph.tree import aliases
from lorafx.passes.lora import Lora
from lorafx.passes.tidy import Tidy
from lorafx.public import Program
from tests.captures import shared


class Tower(nn.Module):
    def __init__(self, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.layers[1].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


@shared
def tower(layers: int) -> Program:
    return lorafx.capture(Tower(layers), inputs={"x": torch.randn(2, 8)})


@pytest.fixture
def edit() -> Edit:
    return Edit(tower(3).copy(), Tidy())


def reading(edit: Edit, name: str) -> list[Any]:
    return [node for node in edit.program.graph.nodes if node.op == "get_attr" and node.target == name]


def test_ties_are_known_and_broken_one_name_at_a_time(edit: Edit) -> None:
    first, second = "layers.0.weight", "layers.1.weight"
    assert sorted(edit.aliases(second)) == [first, second]
    edit.set_tensor(first, torch.ones(8, 8))
    assert edit.aliases(first) == [first]
    assert edit.aliases(second) == [second] == aliases(edit.program.root, second)


def test_a_trained_tensor_stays_tied(edit: Edit) -> None:
    before = edit.program.tensor("layers.0.weight")
    edit.train_tensor("layers.1.weight")
    for name in ("layers.0.weight", "layers.1.weight"):
        assert sorted(edit.aliases(name)) == ["layers.0.weight", "layers.1.weight"]
        assert edit.program.tensor(name) is not before
        assert edit.program.tensor(name).requires_grad


def test_one_node_reads_a_tensor_whoever_asks(edit: Edit) -> None:
    name = edit.add_tensor("another", torch.ones(8), "base")
    node = edit.tensor(name)
    assert edit.tensor(name) is node
    assert reading(edit, name) == [node]
    assert edit.tensor("layers.2.bias") in reading(edit, "layers.2.bias")


def test_a_renamed_tensor_is_read_under_its_new_name(edit: Edit) -> None:
    (node,) = reading(edit, "layers.2.bias")
    users = list(node.users)
    edit.rename("layers.2.bias", "moved.bias")
    assert edit.readers("moved.bias") == users
    assert edit.readers("layers.2.bias") == []
    assert edit.tensor("moved.bias") is node
    edit.program.graph.lint()


def test_a_dropped_tensor_leaves_no_node_and_its_name_is_free(edit: Edit) -> None:
    name = edit.add_tensor("another", torch.ones(8), "base")
    edit.tensor(name)
    edit.drop_tensor(name)
    assert reading(edit, name) == []
    again = edit.add_tensor("another", torch.zeros(8), "base")
    assert again == name
    assert edit.aliases(again) == [again]
    assert edit.tensor(again).meta["val"].shape == (8,)


def test_a_node_that_someone_erased_is_not_handed_out(edit: Edit) -> None:
    name = edit.add_tensor("another", torch.ones(8), "base")
    node = edit.tensor(name)
    edit.program.graph.erase_node(node)
    assert edit.tensor(name) is not node
    edit.program.graph.lint()


def calls(layers: int) -> int:
    """How many functions a fold of that many layers calls, Python's and C's: a measure that no machine changes."""
    program = lorafx.rewrite(tower(layers), [Lora(rank=2, targets="all-linear")], check=False)
    for name in program.names("adapter"):
        nn.init.normal_(program.tensor(name), std=0.1)
    count: Counter[str] = Counter()

    def seen(frame: object, event: str, argument: object) -> None:
        count[event] += event in ("call", "c_call")

    previous = sys.getprofile()
    sys.setprofile(seen)
    try:
        lorafx.fold(program, check=False)
    finally:
        sys.setprofile(previous)
    return count["call"] + count["c_call"]


def test_a_fold_takes_twice_as_long_for_twice_the_layers() -> None:
    calls(4)  # what is imported and cached on the way
    assert calls(80) < 2.1 * calls(40)


def test_a_deep_graph_folds() -> None:
    program = lorafx.capture(Tower(600), inputs={"x": torch.randn(2, 8)}, check=False)
    program = lorafx.rewrite(program, [Lora(rank=2, targets="all-linear")], check=False)
    assert not lorafx.fold(program, check=False).names("adapter")
