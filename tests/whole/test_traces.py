"""A model that tests capture again is traced once, and whatever decides a trace makes it another model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lorafx
from lorafx.frontend import trace
from lorafx.graph.program import structure
from tests import traces
from tests.small import bert, llama
from tests.zoo import tensors


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """The models that were traced."""
    models: list[nn.Module] = []
    attempt = getattr(trace._attempt, "args", (trace._attempt,))[0]  # what the tests run with looks no trace up here

    def noted(model: nn.Module, *given: Any) -> Any:
        models.append(model)
        return attempt(model, *given)

    monkeypatch.setattr(trace, "_attempt", noted)
    monkeypatch.setattr(traces, "_kept", type(traces._kept)())
    with traces.traced_once():
        yield models


def inputs(length: int = 5) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(5, 5 + 2 * length).view(2, length)}


def test_other_weights_are_traced_once_and_each_computes_its_own(traced: list[nn.Module]) -> None:
    """Llama has a region without gradients, an inner graph, and a buffer that no file holds."""
    first, second = llama(), llama()
    programs = [lorafx.capture(model, inputs=inputs()) for model in (first, second)]
    assert traced == [first]
    afresh = traces._kept.clear() or lorafx.capture(second, inputs=inputs())
    assert len(traced) == 2
    assert structure(programs[0].graph) == structure(programs[1].graph) == structure(afresh.graph)
    assert programs[1].signature.domain == afresh.signature.domain
    assert programs[1].roles == afresh.roles
    for model, program in zip((first, second), programs, strict=True):
        expected, given = model.eval()(**inputs(7), use_cache=False), program.module().eval()(**inputs(7))
        (wanted,), (found,) = tensors(expected).values(), tensors(given).values()
        assert torch.equal(wanted, found)
        assert all(value.data_ptr() == program.tensor(name).data_ptr() for name, value in model.named_parameters())


def test_whatever_decides_a_trace_makes_it_another(traced: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    lorafx.capture(bert(), inputs=inputs())
    lorafx.capture(bert(), inputs=inputs())
    assert len(traced) == 1
    still = bert()
    still.bert.embeddings.requires_grad_(False)  # type: ignore[union-attr]
    scaled = bert()
    scaled.bert.encoder.layer[0].attention.self.scaling = 0.5  # type: ignore[union-attr, index]
    changed: list[tuple[Any, dict[str, Any]]] = [
        (bert(hidden_dropout_prob=0.5), {}),
        (bert(hidden_act="relu"), {}),
        (bert(num_labels=3), {}),
        (bert().double(), {}),
        (still, {}),
        (scaled, {}),
        (bert(), {"inputs": inputs(6)}),
        (bert(), {"dynamic": False}),
    ]
    for number, (model, options) in enumerate(changed):
        lorafx.capture(model, **{"inputs": inputs(), **options})
        assert len(traced) == number + 2
    plain = hf.BertForSequenceClassification.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(hf.BertForSequenceClassification, "forward", forward)
    lorafx.capture(bert(), inputs=inputs())
    assert len(traced) == len(changed) + 2


def test_what_cannot_be_told_from_others_is_traced_each_time(traced: list[nn.Module]) -> None:
    for _ in range(2):
        model = bert()
        model.more = object()  # type: ignore[assignment]
        lorafx.capture(model, inputs=inputs())
    assert len(traced) == 2
