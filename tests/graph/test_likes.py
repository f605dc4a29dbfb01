"""Operators on fake tensors are run once for the like of their operands, and give what they gave."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import lorafx
from lorafx.frontend import trace
from lorafx.graph.fake import likeness
from lorafx.graph.likes import remembered_likes
from lorafx.graph.program import structure
from tests.small import bert, gpt2

OWN = vars(FakeTensorMode)["_dispatch_impl"]

#: Operators whose results lie in memory of their own, and those whose results lie in that of their operand.
FRESH: dict[str, Callable[[Tensor], Any]] = {
    "mul": lambda x: x * x,
    "mul of what is turned": lambda x: x.transpose(0, 1) * 2.0,
    "neg of a part": lambda x: -x[..., :3],
    "another dtype": lambda x: x.to(torch.float64),
    "clone of what is turned": lambda x: x.transpose(0, 1).clone(),
    "rows": lambda x: x.transpose(0, 1).contiguous(),
    "a sum": lambda x: x.sum(1),
    "products": lambda x: torch.bmm(x, x.transpose(1, 2)),
    "joined": lambda x: torch.cat([x, x], dim=-1),
    "a comparison": lambda x: x > 0,
    "a smaller one": lambda x: x.new_ones(x.shape[0]),
}
VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda x: x.view(x.shape[0], x.shape[1], 2, 3),
    "turned": lambda x: x.transpose(0, 1),
    "a part": lambda x: x[:, :, 2:5],
    "a part of what is turned": lambda x: x.transpose(1, 2)[:, 1:],
    "expanded": lambda x: x[:, None].expand(-1, 4, -1, -1),
    "one of them": lambda x: x.select(2, 4),
}


class Fakes:
    """A mode that counts what it runs, and tensors of two symbols and a number: (s0, s1, 6)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, own: bool = False) -> None:
        self.ran: list[Any] = []

        def run(mode: Any, func: Any, *rest: Any) -> Any:
            self.ran.append(func)
            return OWN(mode, func, *rest)

        monkeypatch.setattr(FakeTensorMode, "_dispatch_impl", run)
        # As a mode that begins within the context; one of torch's own remembers, too.
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=own):
            self.mode = FakeTensorMode(shape_env=ShapeEnv())
        free = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
        x = self.mode.from_tensor(torch.randn(2, 5, 6), symbolic_context=free)
        with self.mode:
            self.tensors = [x.clone() for _ in range(3)]
        self.ran.clear()


@pytest.mark.parametrize("name", [*FRESH, *VIEWS])
def test_what_is_remembered_is_what_torch_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operate = {**FRESH, **VIEWS}[name]
    fakes = Fakes(monkeypatch)
    with fakes.mode:
        expected = operate(fakes.tensors[0])
    with remembered_likes(), fakes.mode:
        first = operate(fakes.tensors[0])
        fakes.ran.clear()
        again = [operate(x) for x in fakes.tensors]
    assert not fakes.ran
    for result in (first, *again):
        assert likeness(result) == likeness(expected)
        assert likeness(result.storage_offset()) == likeness(expected.storage_offset())
        assert result.is_contiguous() == expected.is_contiguous()
    memories = [result.untyped_storage()._cdata for result in again]
    assert len(set(memories)) == len(memories)
    held = [x.untyped_storage()._cdata for x in fakes.tensors]
    assert (memories == held) == (name in VIEWS)
    assert not set(memories) & set(held) or name in VIEWS


NOT_REMEMBERED: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda x: x.mul_(2.0),
    "a place": lambda x: x.fill_(1.0),
    "several": lambda x: x.max(2),
    "parts": lambda x: x.split(3, 2),
    "as many as there are": lambda x: x.nonzero(),
    "as many as that": lambda x: x.new_ones(x.nonzero().shape[0]),
}


@pytest.mark.parametrize("name", NOT_REMEMBERED)
def test_all_else_is_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = Fakes(monkeypatch)
    with remembered_likes(), fakes.mode:
        NOT_REMEMBERED[name](fakes.tensors[0])
        fakes.ran.clear()
        result = NOT_REMEMBERED[name](fakes.tensors[1])
    assert fakes.ran
    if name in ("in place", "a place"):
        assert result is fakes.tensors[1]


def test_what_is_unlike_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other sizes, strides, offsets, dtypes, arguments, and settings."""
    fakes = Fakes(monkeypatch)
    x = fakes.tensors[0]
    with remembered_likes(), fakes.mode:
        calls: list[Callable[[], Tensor]] = [
            lambda: x.new_full((3,), 2),
            lambda: x.new_full((3,), 3),
            lambda: x.new_full((3,), 2.0),
            lambda: x.new_full((4,), 2),
            lambda: x.long().new_full((3,), 2),
            lambda: x.transpose(0, 1).neg(),
            lambda: x.neg(),
            lambda: x[:, :, 3:].neg(),
            lambda: x[:, :, :3].neg(),
            lambda: x.to(torch.float64).neg(),
        ]
        for call in calls:
            fakes.ran.clear()
            call()
            assert fakes.ran, "first"
            call()
        fakes.ran.clear()
        torch.set_default_dtype(torch.float64)
        try:
            calls[0]()
        finally:
            torch.set_default_dtype(torch.float32)
        assert fakes.ran


def test_symbols_that_become_one_are_known_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    mode = Fakes(monkeypatch).mode
    free = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    square = mode.from_tensor(torch.randn(4, 4, 6), symbolic_context=free)
    with remembered_likes(), mode:
        before = likeness(square.transpose(0, 1).neg())
        assert square.shape[0] == square.shape[1]  # noted as a condition: from now on they are one
        after = square.transpose(0, 1).neg()
    assert likeness(after) != before
    assert likeness(after.shape[0]) == likeness(after.shape[1])


def test_a_tracer_sees_what_is_run() -> None:
    def function(x: Tensor) -> Tensor:
        for _ in range(2):
            x = (x.view(x.shape[0], -1, 2) * 2.0).transpose(1, 2).reshape(x.shape)
        return x

    graphs = []
    for context in (nullcontext, remembered_likes):
        with context():
            graphs.append(str(make_fx(function, tracing_mode="symbolic")(torch.ones(4, 6)).graph))
    assert graphs[0] == graphs[1]


def test_modes_are_left_as_they_were() -> None:
    with remembered_likes():
        held = vars(FakeTensorMode)["_dispatch_impl"]
        assert held is not OWN
        with remembered_likes():
            assert vars(FakeTensorMode)["_dispatch_impl"] is held
    assert vars(FakeTensorMode)["_dispatch_impl"] is OWN
    assert torch._dynamo.config.fake_tensor_cache_enabled


def alike(value: Any) -> Any:
    return likeness(tuple(value) if isinstance(value, (list, tuple)) else value)


@pytest.mark.parametrize("build", [bert, gpt2])
def test_a_trace_is_the_same_with_it(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Node by node, down to the sizes, and what requires gradients is what did."""
    inputs = {"input_ids": torch.arange(5, 15).view(2, 5)}
    model = build()
    quick = lorafx.capture(model, inputs=inputs, check=False)
    monkeypatch.setattr(trace, "remembered_likes", nullcontext)
    model.more = object()  # tests trace what they know once
    slow = lorafx.capture(model, inputs=inputs, check=False)
    first, second = ([alike(node.meta.get("val")) for node in program.graph.nodes] for program in (quick, slow))
    assert structure(quick.graph) == structure(slow.graph)
    assert first == second
    assert quick.signature.domain == slow.signature.domain
