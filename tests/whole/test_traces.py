"""A model that tests capture or export again is traced once, and whatever decides a trace makes it another model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lorafx
from lorafx.frontend import trace
from lorafx.graph.program import structure
from lorafx.passes.lora import Lora
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


# ---- exports


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """The models of transformers that were traced, for captures and for exports."""
    models: list[nn.Module] = []
    trace_module = torch.export.export

    def noted(module: nn.Module, *given: Any, **options: Any) -> Any:
        if isinstance(module, hf.PreTrainedModel):
            models.append(module)
        return trace_module(module, *given, **options)

    monkeypatch.setattr(torch.export, "export", noted)
    monkeypatch.setattr(traces, "_exports", type(traces._exports)())
    with traces.traced_once():
        yield models


def graph(folder: Path) -> list[Any]:
    """What an ONNX graph computes: operators, names of what they take and give, and the values it holds."""
    (file,) = folder.rglob("model.onnx")
    model = ir.load(file)
    nodes = [
        (node.domain, node.op_type, [value and value.name for value in (*node.inputs, *node.outputs)])
        for node in model.graph
    ]
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    shapes = [(value.name, str(value.shape), str(value.type)) for value in (*model.graph.inputs, *model.graph.outputs)]
    return [nodes, {name: value and value.numpy().tolist() for name, value in held.items()}, shapes]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"generate": True}])
@pytest.mark.filterwarnings("default")  # the converter's own
def test_an_export_from_a_trace_that_is_kept_is_the_one_from_its_own(
    exports: list[nn.Module], options: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever was made of that trace before: of other weights, and with adapters, which put operators into it."""
    plain, other = lorafx.capture(llama()), lorafx.capture(llama())
    adapted = lorafx.rewrite(other, [Lora(rank=2)])
    adapted.load({name: 0.1 * torch.randn_like(adapted.tensor(name)) for name in adapted.names("adapter")})
    exports.clear()
    apart: dict[str, Any] = {} if options else {"adapters": "separate"}
    kept: list[str] = []
    rounds: list[tuple[str, lorafx.Program, dict[str, Any]]] = [("first", plain, {}), ("adapted", adapted, apart)]
    for name, program, more in [*rounds, ("again", other, {})]:
        lorafx.export(program, tmp_path / name, "onnx", **options, **more)
        kept += [str(found.graph_module.graph) for found in traces._exports.values()]
    assert exports == [plain.source.model]
    assert kept == [kept[0]] * 3, "what is kept stays as it was traced"
    traces._exports.clear()
    lorafx.export(other, tmp_path / "afresh", "onnx", **options)
    assert exports == [plain.source.model, other.source.model]
    first, again, afresh = (graph(tmp_path / name) for name in ("first", "again", "afresh"))
    assert again == afresh
    assert again[1] != first[1], "other weights"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_whatever_decides_the_trace_of_an_export_makes_it_another(exports: list[nn.Module], tmp_path: Path) -> None:
    def traced_again(program: lorafx.Program, **options: Any) -> bool:
        exports.clear()  # those of the capture
        lorafx.export(program, tmp_path / "onnx", overwrite=True, check=False, **options)
        return bool(exports)

    assert traced_again(lorafx.capture(bert(), inputs=inputs()))
    assert not traced_again(lorafx.capture(bert(), inputs=inputs()))
    changed: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (bert(hidden_act="relu"), {}, {}),
        (bert(), {}, {"provider": "cuda"}),
        (bert(), {}, {"format": "pt2"}),
    ]
    for model, given, options in changed:
        assert traced_again(lorafx.capture(model, **{"inputs": inputs(), **given}), **options), (given, options)


def test_what_is_done_to_a_trace_that_was_kept_is_not_done_to_what_is_kept() -> None:
    x = torch.randn(3, 4)
    kept = torch.export.export(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (x,))
    expected, graph = kept.module()(x), str(kept.graph)
    own = traces._apart(kept)
    assert str(own.graph) == graph
    assert torch.equal(own.module()(x), expected)
    for node in own.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
        node.target = torch.ops.aten.neg.default
    own.graph_module.recompile()
    own.graph_signature.input_specs.pop()
    assert not torch.equal(own.graph_module(*own.state_dict.values(), x)[0], expected)
    assert str(kept.graph) == graph
    assert torch.equal(kept.module()(x), expected)
