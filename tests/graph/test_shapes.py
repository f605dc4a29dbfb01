"""What is told of operators on fake tensors is what torch computes of them, sizes, strides and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import lorafx
from lorafx.frontend import trace
from lorafx.graph.fake import likeness
from lorafx.graph.shapes import _RULES, told, told_at_once
from tests.small import bert

aten: Any = torch.ops.aten


class Fakes:
    """Fake tensors whose first two sizes are symbols, the same ones each time."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        free = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
        self.x = self.mode.from_tensor(torch.randn(2, 5, 6), symbolic_context=free)

    def fixed(self, *sizes: int) -> Tensor:
        return self.mode.from_tensor(torch.randn(*sizes), static_shapes=True)

    def rows(self) -> Tensor:
        with self.mode:
            return self.x.view(-1, 6)


def operands(f: Fakes) -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Calls that are told."""
    with f.mode:
        turned = f.x.transpose(0, 1)
        half = f.x.bfloat16()
    sized = f.fixed(6), f.fixed(6)
    rows = {"memory_format": torch.contiguous_format}
    return {
        "linear": (aten.linear.default, (f.x, f.fixed(4, 6), f.fixed(4)), {}),
        "linear without bias": (aten.linear.default, (f.x, f.fixed(4, 6)), {}),
        "linear of two dimensions": (aten.linear.default, (f.rows(), f.fixed(4, 6), f.fixed(4)), {}),
        "linear of what is turned": (aten.linear.default, (turned, f.fixed(4, 6), f.fixed(4)), {}),
        "linear of what is turned without bias": (aten.linear.default, (turned, f.fixed(4, 6)), {}),
        "addmm": (aten.addmm.default, (f.fixed(4), f.rows(), f.fixed(6, 4)), {}),
        "addmm of a turned weight": (aten.addmm.default, (f.fixed(4), f.rows(), f.fixed(4, 6).t()), {}),
        "layer norm": (aten.layer_norm.default, (f.x, [6], *sized, 1e-5), {}),
        "layer norm without weights": (aten.layer_norm.default, (f.x, [6]), {}),
        "native layer norm": (aten.native_layer_norm.default, (f.x, [6], *sized, 1e-5), {}),
        "dropout": (aten.native_dropout.default, (f.x, 0.1, True), {}),
        "softmax": (aten._softmax.default, (f.x, -1, False), {}),
        "safe softmax": (aten._safe_softmax.default, (f.x, -1), {}),
        "gelu": (aten.gelu.default, (f.x,), {"approximate": "tanh"}),
        "gelu in half precision": (aten.gelu.default, (half,), {}),
        "clone": (aten.clone.default, (f.x,), {}),
        "clone in rows": (aten.clone.default, (turned,), rows),
        "mean": (aten.mean.dim, (f.x, [-1], True), {}),
        "mean of two dimensions": (aten.mean.dim, (f.rows(), [1], True), {}),
        "unsafe view": (aten._unsafe_view.default, (f.rows(), [*f.x.shape]), {}),
        "unsafe view of other columns": (aten._unsafe_view.default, (f.x, [*f.x.shape[:2], 2, 3]), {}),
        "pow": (aten.pow.Tensor_Scalar, (f.x, 2), {}),
        "mul": (aten.mul.Scalar, (f.x, 0.5), {}),
        "add": (aten.add.Scalar, (f.x, 1), {}),
        **{name: (operator, (f.x,), {}) for name, operator in UNARY.items()},
    }


UNARY = {
    name: getattr(aten, name).default for name in ("relu", "sigmoid", "silu", "tanh", "cos", "sin", "neg", "rsqrt")
}


def untold(f: Fakes) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Calls that are left to torch."""
    with f.mode:
        turned, whole = f.x.transpose(0, 1), f.x.long()
    return [
        (aten.gelu.default, (turned,), {}),
        (aten.relu.default, (whole,), {}),
        (aten.clone.default, (turned,), {}),
        (aten.native_layer_norm.default, (f.x.to(torch.float16), [6], None, None, 1e-5), {}),
        (aten.native_dropout.default, (f.x, 0.0, True), {}),
        (aten.native_dropout.default, (f.x, 0.5, False), {}),
        (aten._safe_softmax.default, (f.x, -1, torch.float64), {}),
        (aten.addmm.default, (f.fixed(4), f.rows(), f.fixed(6, 4)), {"beta": 2}),
        (aten.addmm.default, (f.rows(), f.rows(), f.fixed(6, 6)), {}),
        (aten.mul.Scalar, (f.x, 1j), {}),
        (aten.mean.dim, (f.x, [-1], False), {}),
        (aten.mean.dim, (f.x, [1], True), {}),
        (aten._unsafe_view.default, (f.x, [-1, 6]), {}),
        (aten.mm.default, (f.rows(), f.fixed(6, 4)), {}),
    ]


def alike(value: Any) -> Any:
    return likeness(tuple(value) if isinstance(value, (list, tuple)) else value)


def test_every_rule_is_tried() -> None:
    assert {operator for operator, *_ in operands(Fakes()).values()} == set(_RULES)


@pytest.mark.parametrize("name", operands(Fakes()))
@pytest.mark.parametrize("dispatcher", [enable_python_dispatcher, nullcontext])
def test_what_is_told_is_what_torch_computes(name: str, dispatcher: Callable[[], Any]) -> None:
    fakes = Fakes()
    operator, args, kwargs = operands(fakes)[name]
    with fakes.mode, torch.no_grad(), dispatcher():
        expected = operator(*args, **kwargs)
        with told_at_once():
            traced = operator(*args, **kwargs)
    found = told(fakes.mode, operator, args, kwargs)
    assert found is not None
    assert alike(found) == alike(traced) == alike(expected)


@pytest.mark.parametrize("number", range(len(untold(Fakes()))))
def test_all_else_is_left_to_torch(number: int) -> None:
    fakes = Fakes()
    operator, args, kwargs = untold(fakes)[number]
    assert told(fakes.mode, operator, args, kwargs) is None
    with fakes.mode, torch.no_grad():
        expected = operator(*args, **kwargs)
        with told_at_once():
            assert alike(operator(*args, **kwargs)) == alike(expected)


def test_a_size_that_only_may_fit_is_left_to_torch() -> None:
    """torch notes on what condition it does."""
    fakes = Fakes()
    free = StatelessSymbolicContext([DimDynamic.STATIC, DimDynamic.DYNAMIC])
    weight = fakes.mode.from_tensor(torch.randn(4, 6), symbolic_context=free)
    assert told(fakes.mode, aten.linear.default, (fakes.x, weight), {}) is None


def test_a_trace_is_the_same_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Node by node, of a model in training mode, and what requires gradients is what did."""
    inputs = {"input_ids": torch.arange(5, 15).view(2, 5)}
    model = bert(hidden_dropout_prob=0.1)
    quick = lorafx.capture(model, inputs=inputs)
    monkeypatch.setattr(trace, "told_at_once", nullcontext)
    model.more = object()  # type: ignore[assignment]  # tests trace what they know once
    slow = lorafx.capture(model, inputs=inputs)
    forms = ([(n.op, str(n.target), alike(n.meta.get("val"))) for n in p.graph.nodes] for p in (quick, slow))
    first, second = forms
    assert first == second
    assert quick.signature.domain == slow.signature.domain
