"""A program has a name for each input that it takes, and a tensor of its own for each name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lorafx
from lorafx.errors import UsageError
from tests import small


class Linear(nn.Module):
    """Each subclass takes its input otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)


class Collecting(Linear):
    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        return self.inner(x) + more.get("y", torch.zeros(()))


class Anything(Linear):
    def forward(self, *given: Tensor) -> Tensor:
        return self.inner(given[0])


class Placed(Linear):
    def forward(self, x: Tensor, /) -> Tensor:
        return self.inner(x)


class Plain(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Two(Linear):
    def forward(self, a: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        return self.inner(a) - 2 * self.inner(pair[0]) + pair[1].sum()


X, Y = torch.randn(2, 4), torch.randn(2, 3)
REFUSED: dict[str, tuple[nn.Module, dict[str, Any], str]] = {
    "positions": (Anything(), {"x": X}, "Anything takes its inputs by position alone"),
    "position": (Placed(), {"x": X}, "Placed takes x by position alone"),
    "misspelt": (Plain(), {"x": X, "xx": X}, "Plain takes no input 'xx' (did you mean 'x'?); it takes x"),
    "collected": (Collecting(), {"x": X, "y": Y}, "Collecting takes 'y' in **kwargs alone, of which no size can stay"),
    "unread": (Collecting(), {"x": X, "z": Y, "dynamic": False}, "Collecting reads no input 'z'; leave it out"),
    "of a transformer": (
        small.bert(),
        {**small.example(True), "atention_mask": torch.ones(2, 5), "dynamic": False},
        "BertForSequenceClassification reads no input 'atention_mask' (did you mean 'attention_mask'?); leave it out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_input_without_a_name_of_its_own_is_refused_in_one_line(case: str) -> None:
    model, given, said = REFUSED[case]
    inputs = dict(given)
    dynamic = inputs.pop("dynamic", True)
    with pytest.raises(UsageError) as caught:
        lorafx.capture(model, inputs=inputs, dynamic=dynamic)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_what_kwargs_collect_is_taken_where_sizes_are_fixed() -> None:
    model = Collecting()
    program = lorafx.capture(model, inputs={"x": X, "y": Y}, dynamic=False)
    x, y = torch.randn(2, 4), torch.randn(2, 3)
    assert torch.equal(program.module().eval()(x=x, y=y), model(x, y=y))


def test_what_a_model_of_transformers_collects_keeps_its_free_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = hf.BertForSequenceClassification.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(hf.BertForSequenceClassification, "forward", forward)
    model: Any = small.bert().eval()
    program = lorafx.capture(model, inputs={"input_ids": torch.arange(5, 15).view(2, 5)})
    ids = torch.arange(5, 26).view(3, 7)
    found, wanted = program.module().eval()(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.allclose(found, wanted, atol=1e-6)  # fp32: the same operators, fused or not


def test_one_tensor_given_twice_is_two_inputs() -> None:
    """A tracer takes it for one, and on such inputs no comparison tells."""
    model = Two()
    program = lorafx.capture(model, inputs={"a": X, "pair": (X, X)})
    a, b, c = (torch.randn(3, 4) for _ in range(3))
    assert torch.allclose(program.module().eval()(a=a, pair=(b, c)), model(a, (b, c)), atol=1e-6)
