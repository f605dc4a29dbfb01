"""A decoder as one folder that clients generate from: a graph with its cache, and what each client wants to be told.

The layout is the one that onnxruntime-genai and transformers.js share: ``onnx/model.onnx`` with its weights beside it,
``past_key_values.{layer}.key`` in and ``present.{layer}.key`` out, ``genai_config.json`` and ``config.json``.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers.exporters import onnxruntime_fusions
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.utils import patch_attributes

from ..errors import CaptureError, UsageError
from ..frontend.trace import trace_with
from ..models.layered import is_layered, own_configs
from ..models.tokenizers import length_limit, pad_token
from ..proof.decoder import GENAI, MODEL
from ..public import Program
from .asked import check_lengths
from .cached import FREE, CachedOnnxExporter, decode_inputs, decode_shapes
from .cut import READS, axes_of
from .late_weights import StandIns
from .onnx_kernels import suit
from .onnx_statements import leave_out
from .past import ELSE
from .replay import exportable, with_model

#: The free axes of a decoder's inputs, by what the exporter's names for them stand at.
_AXES = {
    ("input_ids", 0): "batch_size",
    ("input_ids", 1): "sequence_length",
    ("attention_mask", 1): "total_sequence_length",
    ("past_key_values.0.key", 2): "past_sequence_length",
}
_CACHE = re.compile(r"(input|output)\.\w+\.layers\.(\d+)\.(key|value)s")


@dataclass(frozen=True)
class Decoder:
    """A converted decoder, not written yet.

    Attributes:
        graph: ONNX, its cache among inputs and outputs
        config: the Hugging Face config of the base model
        fused: how many layers' attention is one ``GroupQueryAttention``
        layers: how many layers have a cache
    """

    graph: ir.Model
    config: Any
    fused: int
    layers: int

    def facts(self) -> dict[str, Any]:
        """What the report says: how attention is computed, and the heads of keys and values in each layer."""
        shapes = {value.name: value.shape for value in self.graph.graph.inputs if value.shape is not None}
        heads = [shapes[f"past_key_values.{layer}.key"][1] for layer in range(self.layers)]
        return {"attention": self._attention(), "key_value_heads": heads}

    def _attention(self) -> str:
        if not self.fused:
            return "unfused: it takes any number of new tokens after a past, for any batch"
        limit = "several new tokens after a past go for one text at a time, one new token for any batch"
        return f"GroupQueryAttention in {self.fused} of {self.layers} layers: {limit}"


def check_generates(program: Program, kind: str, dtype: torch.dtype | None, adapters: str = "merged") -> None:
    """UsageError when no decoder can be written of this program, as asked for."""
    model: Any = program.source.model
    if kind != "onnx":
        raise UsageError(f"a decoder with its cache is written as onnx, not {kind}; leave generate or the format out")
    if dtype is torch.bfloat16:
        raise UsageError("a decoder in bfloat16 cannot be proven: ONNX Runtime has none on the CPU; choose float16")
    if getattr(program.config, "is_encoder_decoder", False) and axes_of(program.example) is None:
        taken, wanted = ", ".join(program.example), " or ".join(", ".join(names) for names in READS)
        raise UsageError(f"{program.name} generates from {taken}: only from {wanted} yet; leave generate out")
    if getattr(program.config, "is_encoder_decoder", False) and adapters == "slots":
        what = "which have no slots yet; leave slots or generate out"
        raise UsageError(f"{program.name} generates with two graphs, {what}")
    if program.output_layer is None or not getattr(model, "can_generate", lambda: False)():
        raise UsageError(f"{program.name} generates no text: it is not a causal language model; leave generate out")
    if getattr(program.config, "is_encoder_decoder", False):
        check_lengths(program)


def decoder(program: Program, provider: str, dtype: torch.dtype | None) -> Decoder:
    """A folded program as one graph that generates; its weights may be computed as they are written.

    Raises:
        LostError: they cannot be, see :mod:`.late_weights`
        CaptureError: no such graph can be made, in one line
    """
    # The converter prints its progress to stdout, which is kept for results.
    stand_ins = StandIns()
    with redirect_stdout(sys.stderr), exportable(program, dtype, stand_ins) as model:
        # What a copy in another dtype rounds, or has stand-ins for, says nothing about what generation asks.
        valued = program.source.model

        def attempt(free: Any) -> Any:
            inputs, example = decode_inputs(model, program.example, valued)
            exporter: Any = CachedOnnxExporter(with_model(program, model), example, stand_ins)
            config = OnnxConfig(dynamic=True, dynamic_shapes=decode_shapes(inputs, free), ort_fusions=None)
            return exporter.export(model, {**inputs, "use_cache": True, "return_dict": True}, config)

        exported = trace_with(attempt, model, FREE)
    graph: ir.Model = exported.program
    layers = _name(graph, program.name)
    stand_ins.watch(graph.graph)
    fused = _fuse(graph, provider)
    suit(graph, provider)
    leave_out(graph)
    stand_ins.settle(graph.graph)
    return Decoder(graph, program.config, fused, layers)


def write_decoder(made: Decoder, program: Program, folder: Path, record: Mapping[str, str]) -> None:
    """Write the graph, its weights once, and the configs of clients; tokenizer files are to follow."""
    write_graphs({MODEL: made.graph}, program, folder, record)
    genai = genai_config(made, getattr(program.source.model, "generation_config", None))
    (folder / GENAI).write_text(json.dumps(genai, indent=2) + "\n", encoding="utf-8")


def write_graphs(graphs: Mapping[str, ir.Model], program: Program, folder: Path, record: Mapping[str, str]) -> None:
    """Write graphs by their paths below ``folder``, each with its weights beside it, and the config that says so."""
    for name, graph in graphs.items():
        graph.metadata_props.update(record)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        ir.save(graph, folder / name, external_data=f"{Path(name).name}_data")
    config = copy.deepcopy(program.config)
    for key, value in program.config_changes.items():
        setattr(config, key, value)
    setattr(config, "transformers.js_config", {"use_external_data_format": True})
    with own_configs(config):
        config.save_pretrained(folder)


def genai_config(made: Decoder, generation: Any) -> dict[str, Any]:
    """What onnxruntime-genai reads of a decoder; it takes the heads of each layer from the graph's inputs."""
    text, inputs = made.config.get_text_config(), {value.name: value for value in made.graph.graph.inputs}
    first = text.per_layer_config[0] if is_layered(text) else text
    shape: Any = inputs["past_key_values.0.key"].shape
    ends = getattr(generation, "eos_token_id", None)
    ends = ends if ends is not None else getattr(text, "eos_token_id", None)
    last = ends[0] if isinstance(ends, list) and ends else ends
    pad = pad_token(made.config)
    first_token = getattr(text, "bos_token_id", None)
    known = {"bos_token_id": first_token, "eos_token_id": ends, "pad_token_id": pad if pad is not None else last}
    length = length_limit(made.config) or 2048
    names = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    past = {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")}
    present = {f"present_{part}_names": f"present.%d.{part}" for part in ("key", "value")}
    graph = {
        "session_options": {"provider_options": []},
        "filename": MODEL,
        "head_size": int(shape[3]),
        "hidden_size": text.hidden_size,
        "num_attention_heads": first.num_attention_heads,
        "num_hidden_layers": made.layers,
        "num_key_value_heads": int(shape[1]),
        "inputs": {**names, **past},
        "outputs": {"logits": "logits", **present},
    }
    return {
        "model": {
            "type": "decoder",
            "context_length": length,
            "vocab_size": text.vocab_size,
            **{name: value for name, value in known.items() if value is not None},
            "decoder": graph,
        },
        # A buffer that past and present share is longer than the past; the graph appends to all that it is given.
        "search": {"max_length": length, "do_sample": False, "past_present_share_buffer": False},
    }


# ---- names and kernels


def _name(graph: ir.Model, what: str) -> int:
    """Call inputs, outputs and their free axes as clients do; the number of layers. CaptureError: an axis is fixed."""
    values = [*graph.graph.inputs, *graph.graph.outputs]
    for value in values:
        found = _CACHE.fullmatch(value.name or "")
        if found is not None:
            side = "past_key_values" if found[1] == "input" else "present"
            value.name = f"{side}.{found[2]}.{found[3]}"
    known = {value.name or "": value for value in graph.graph.inputs}
    names = {_free(known, what, *place): readable for place, readable in _AXES.items()}
    for value in values:
        sizes = [
            names.get(size.value, size) if isinstance(size, ir.SymbolicDim) else size for size in value.shape or ()
        ]
        if (value.name or "").startswith("present."):
            sizes[2] = "total_sequence_length"
        value.shape = ir.Shape(sizes)
    return sum(name.startswith("past_key_values.") for name in known) // 2


def _free(known: Mapping[str, ir.Value], what: str, name: str, axis: int) -> Any:
    """What the converter calls a free axis of an input."""
    if name not in known:
        raise CaptureError(f"{what}: its decode graph takes no {name}, so it forgets what it read; {ELSE}")
    shape = known[name].shape
    size = shape[axis] if shape is not None else None
    if not isinstance(size, ir.SymbolicDim):
        fixed = f"its decode graph takes {name} of one size only, {size} along axis {axis}"
        raise CaptureError(f"{what}: {fixed}; {ELSE}")
    return size.value


def _fuse(graph: ir.Model, provider: str) -> int:
    """transformers' fusions for ONNX Runtime, as for one text: how many layers have a ``GroupQueryAttention`` then.

    It takes several new tokens after a past for one text only, so where the batch is free transformers leaves attention
    in parts. What runs decoders gives such tokens for one text, and ONNX Runtime refuses others by name: it may be
    fused, so its only question for a fixed batch is answered by one. Where transformers asks no more, nothing changes.

    ONNX Runtime 1.31 rotates every text of a first batch by the positions of its first one (padded ones start
    elsewhere), so rotation stays an operator of its own.
    """
    patches: list[Any] = [
        (onnxruntime_fusions, "_static_dim", lambda size: lambda value, axis: 1 if axis == 0 else size(value, axis)),
        (onnxruntime_fusions, "_shared_rotation", lambda _: lambda *args: None),
    ]
    with patch_attributes(patches):
        onnxruntime_fusions.fuse_for_onnxruntime(graph, provider)
    return sum(node.op_type == "GroupQueryAttention" for node in graph.graph)
