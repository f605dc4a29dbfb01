"""The back ends' short way: a program that differs from its capture in values alone is not traced again."""

from __future__ import annotations

import dataclasses

import torch
import zoo

import lorafx
from lorafx.edit import Edit
from lorafx.export import only_values_differ
from lorafx.passes.lora import Lora
from lorafx.passes.tidy import Tidy


def test_a_merged_adapter_changes_values_alone() -> None:
    program = lorafx.rewrite(zoo.captured("bert"), [Lora()])
    assert only_values_differ(lorafx.fold(program))
    assert not only_values_differ(lorafx.pipeline.to_eval(program)), "separate adapters are operators of their own"


def test_other_shapes_are_traced_again() -> None:
    folded = lorafx.fold(zoo.captured("bert"))
    name = next(str(node.target) for node in folded.graph.find_nodes(op="get_attr"))
    narrow = folded.copy()
    Edit(narrow, Tidy()).set_tensor(name, torch.zeros(3, folded.tensor(name).shape[-1]))
    assert only_values_differ(folded)
    assert not only_values_differ(narrow)


def test_a_changed_config_is_traced_again() -> None:
    folded = lorafx.fold(zoo.captured("bert"))
    assert not only_values_differ(dataclasses.replace(folded, config_changes={"tie_word_embeddings": False}))


def test_the_capture_is_no_part_of_the_program_that_is_rewritten() -> None:
    program = zoo.captured("bert")
    assert program.captured is not None
    assert program.captured.graph is not program.graph
