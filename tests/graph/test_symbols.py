"""Arithmetic of symbolic sizes is done once for the like of them, and gives what it gave."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import lorafx
from lorafx.frontend import trace
from lorafx.graph.fake import likeness
from lorafx.graph.program import structure
from lorafx.graph.symbols import _OPERATIONS, remembered_sizes
from tests.small import llama

#: Operations as the class has them: they are put back where the context ends.
OWN = {name: vars(SymNode)[name] for name in _OPERATIONS}


def sizes(*given: int) -> list[Any]:
    """Symbols of one environment."""
    free = StatelessSymbolicContext([DimDynamic.DYNAMIC] * len(given))
    return list(FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.ones(given), symbolic_context=free).shape)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the operations that torch computes."""
    done: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        def run(self: Any, other: Any) -> Any:
            done.append(name)
            return OWN[name](self, other)

        return run

    for name in _OPERATIONS:
        monkeypatch.setattr(SymNode, name, counting(name))
    return done


@pytest.mark.parametrize("name", _OPERATIONS)
def test_what_is_remembered_is_what_torch_computes(name: str, counted: list[str]) -> None:
    first, second, third = sizes(6, 4, 7)
    pairs = [(first, second), (second, first), (first, third), (first, first)]
    expected = [getattr(a.node, name)(b.node) for a, b in pairs]
    counted.clear()
    with remembered_sizes():
        for _ in range(3):
            found = [getattr(a.node, name)(b.node) for a, b in pairs]
            assert [(one.expr, one.hint, one.pytype) for one in found] == [
                (one.expr, one.hint, one.pytype) for one in expected
            ]
    assert counted.count(name) == len(pairs)
    assert vars(SymNode)[name] is not OWN[name]  # the one that counts
    assert not hasattr(vars(SymNode)[name], "__wrapped__")


def test_what_is_learned_of_symbols_counts() -> None:
    first, second = sizes(6, 6)
    with remembered_sizes():
        before = first + second
        assert before.node.expr != (first + first).node.expr
        assert first == second  # noted as a condition: from now on they are one
        assert (first + second).node.expr == (first + first).node.expr


def test_environments_know_nothing_of_each_other() -> None:
    (first,), (second,) = sizes(6), sizes(4)
    with remembered_sizes():
        doubled = [size + size for size in (first, second)]
    assert [size.node.hint for size in doubled] == [12, 8]
    assert [size.node.shape_env for size in doubled] == [first.node.shape_env, second.node.shape_env]


def test_a_tracer_sees_what_is_computed() -> None:
    def function(x: Tensor) -> Tensor:
        return x.new_ones(x.shape[0] * 3 + x.shape[1]) + x.new_ones(x.shape[0] * 3 + x.shape[1])

    graphs = []
    for context in (nullcontext, remembered_sizes):
        with context():
            graphs.append(str(make_fx(function, tracing_mode="symbolic")(torch.ones(4, 5)).graph))
    assert graphs[0] == graphs[1]
    assert graphs[0].count("mul") >= 2


def test_sizes_that_depend_on_values_are_computed(counted: list[str]) -> None:
    environment = ShapeEnv()
    size = environment.create_unbacked_symint()
    with remembered_sizes():
        for _ in range(2):
            size.node.mul(size.node)
    assert counted.count("mul") == 2


def test_one_within_another_remembers_once(counted: list[str]) -> None:
    first, second = sizes(6, 4)
    counted.clear()
    with remembered_sizes():
        outer = vars(SymNode)["add"]
        with remembered_sizes():
            assert vars(SymNode)["add"] is outer
            first.node.add(second.node)
        assert vars(SymNode)["add"] is outer
        first.node.add(second.node)
    assert counted.count("add") == 1


def alike(value: Any) -> Any:
    return likeness(tuple(value) if isinstance(value, (list, tuple)) else value)


def test_a_trace_is_the_same_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Node by node, down to the sizes."""
    inputs = {"input_ids": torch.arange(5, 15).view(2, 5)}
    model = llama()
    quick = lorafx.capture(model, inputs=inputs, check=False)
    monkeypatch.setattr(trace, "remembered_sizes", nullcontext)
    model.more = object()  # type: ignore[assignment]  # tests trace what they know once
    slow = lorafx.capture(model, inputs=inputs, check=False)
    first, second = ([alike(node.meta.get("val")) for node in program.graph.nodes] for program in (quick, slow))
    assert structure(quick.graph) == structure(slow.graph)
    assert first == second
    assert quick.signature.domain == slow.signature.domain
