"""Tracing loads nothing that the model does not need, and leaves transformers as it found it."""

from __future__ import annotations

import sys

import pytest
from transformers.exporters import exporter_dynamo, utils

from lorafx.frontend.trace import trace_with
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
