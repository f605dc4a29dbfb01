"""An encoder-decoder as one folder that clients generate from: two graphs, by the names that transformers.js opens.

``onnx/encoder_model.onnx`` reads a text once. ``onnx/decoder_model_merged.onnx`` is asked for each token: its cache,
``past_key_values.{layer}.decoder.key`` and ``past_key_values.{layer}.encoder.key``, is empty at first. There is no
``use_cache_branch``, since one graph without branches does both (:mod:`lorafx.backends.halves`).

A table that both graphs look tokens up in is in both files: a client in a browser is given each file's own data only.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

from ..frontend.trace import trace_with
from ..proof.encoder_decoder import DECODER, ENCODER
from ..public import Program
from .cut import Half
from .decoder import write_graphs
from .halves import halves
from .onnx_kernels import suit
from .onnx_statements import leave_out
from .replay import exportable, with_model

#: What clients call the axes; transformers.js makes an empty cache of what it does not know, and knows the batch.
_NAMES = {
    "batch": "batch_size",
    "source": "encoder_sequence_length",
    "new": "decoder_sequence_length",
    "past": "past_decoder_sequence_length",
    "read": "past_encoder_sequence_length",
}
_CACHE = re.compile(r"(past_key_values|present)_(\d+)_(decoder|encoder)_(key|value)")


@dataclass(frozen=True)
class EncoderDecoder:
    """Two converted graphs, not written yet.

    Attributes:
        encoder: texts → ``last_hidden_state``
        decoder: tokens, ``encoder_hidden_states``, the cache → ``logits`` and the cache
    """

    encoder: ir.Model
    decoder: ir.Model

    def facts(self) -> dict[str, Any]:
        """What the report says: the heads that each layer's attention has, of its own text and of the one read."""
        heads: dict[str, list[Any]] = {"decoder": [], "encoder": []}
        for value in self.decoder.graph.inputs:
            found = re.fullmatch(r"past_key_values\.\d+\.(decoder|encoder)\.key", value.name or "")
            if found is not None and value.shape is not None:
                heads[found[1]].append(value.shape[1])
        attention = "keys and values of what was read are computed with the first token and cached"
        return {"attention": attention, "heads": heads["decoder"], "cross_heads": heads["encoder"]}


def encoder_decoder(program: Program, provider: str, dtype: torch.dtype | None) -> EncoderDecoder:
    """A folded program as two graphs that generate; CaptureError says in one line why not."""
    # The converter prints its progress to stdout, which is kept for results.
    with redirect_stdout(sys.stderr), exportable(program, dtype) as model:

        def attempt(_: Any) -> tuple[ir.Model, ir.Model]:
            first, second = halves(with_model(program, model))
            return _converted(first, provider), _converted(second, provider)

        return EncoderDecoder(*trace_with(attempt, model, None))


def write_encoder_decoder(made: EncoderDecoder, program: Program, folder: Path, record: Mapping[str, str]) -> None:
    """Write both graphs with their weights, and the config; tokenizer files are to follow."""
    write_graphs({ENCODER: made.encoder, DECODER: made.decoder}, program, folder, record)


def _converted(half: Half, provider: str) -> ir.Model:
    config = OnnxConfig(dynamic=True, dynamic_shapes=half.shapes(), ort_fusions=None)
    exporter: Any = OnnxExporter()
    model: ir.Model = exporter.export(half.module, dict(half.inputs), config).program
    fuse_for_onnxruntime(model, provider)
    _name(model.graph, half)
    suit(model, provider)
    leave_out(model)
    return model


def _name(graph: ir.Graph, half: Half) -> None:
    """Call the cache and the free axes as clients do."""
    symbols = {
        str(value.shape[axis]): _NAMES[size]
        for value in graph.inputs
        if value.shape is not None
        for axis, size in half.axes.get(value.name or "", {}).items()
    }
    for value in (*graph.inputs, *graph.outputs):
        sizes = [symbols.get(str(size), size) for size in value.shape or ()]
        found = _CACHE.fullmatch(value.name or "")
        if found is not None:
            value.name = ".".join(found.groups())
        if found is not None and found[1] == "present":
            sizes[2] = "total_sequence_length" if found[3] == "decoder" else _NAMES["source"]
        value.shape = ir.Shape(sizes)
