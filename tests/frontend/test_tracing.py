"""Tracing loads nothing that the model does not need, and leaves transformers as it found it."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo import config
from transformers.exporters import exporter_dynamo, utils

import lorafx
from lorafx.frontend.trace import trace_with
from lorafx.graph.program import structure
from tests import zoo

LLAMA = "transformers.models.llama.modeling_llama"
NLLB = "transformers.models.nllb_moe.modeling_nllb_moe"


def test_a_trace_patches_loaded_code_and_loads_no_other(monkeypatch: pytest.MonkeyPatch):
    model = zoo.build("llama")
    monkeypatch.delitem(sys.modules, NLLB, raising=False)  # as where no such model was opened
    find = utils.import_dotted_path
    assert any(path.startswith(NLLB) for path, *_ in utils._PATCHES["dynamo"]), exporter_dynamo.__name__

    def attempt(_: object) -> object:
        with utils.apply_patches("dynamo"):
            assert NLLB not in sys.modules
        return utils.import_dotted_path(f"{LLAMA}.LlamaAttention", missing_ok=True)

    assert trace_with(attempt, model, None) is sys.modules[LLAMA].LlamaAttention
    assert utils.import_dotted_path is find


class Layers(nn.Module):
    """As many linear layers, one after another, each of them by so much wider than the one before."""

    def __init__(self, count: int, wider: int = 0):
        super().__init__()
        widths = [4 + wider * number for number in range(count + 1)]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


def memos(graph: fx.Graph) -> tuple[bool, int]:
    """Whether the trace that a graph came from had torch's memo of operators, and how many its own memo holds."""
    mode = next(node for node in graph.nodes if node.op == "placeholder").meta["val"].fake_mode
    return mode.cache_enabled, len(vars(mode).get("lorafx_likes", ()))


def test_operators_are_remembered_where_layers_repeat():
    x = {"x": torch.ones(2, 4)}
    few, many = (lorafx.capture(Layers(count), inputs=x) for count in (2, 12))
    assert memos(few.graph) == memos(many.graph)
    torchs, held = memos(many.graph)
    assert held
    assert not torchs, "what is remembered here is not written down there, too"
    unlike = lorafx.capture(Layers(12, wider=1), inputs=x)
    assert memos(unlike.graph)[1] > held, "no layer is as another"
    assert config.fake_tensor_cache_enabled, "as it was"
    with config.patch(fake_tensor_cache_enabled=False):
        again = lorafx.capture(Layers(12), inputs=x)
    assert memos(again.graph) == (False, 0), "who switched it off is heard"
    assert structure(again.graph) == structure(many.graph)
