"""An encoder-decoder that generates, rewritten as one graph and then cut in two at what the encoder gives.

Passes see the whole model, as they did when it was captured: what an encoder's channel is worth, its decoder says. The
cache of both attentions is taken out meanwhile (:mod:`lorafx.backends.past`). Afterwards the encoder's states are the
output of one graph and an input of the other.

Clients run one decoder graph for the first token and for all others. Keys and values of what was read are computed by
the first call and are part of the cache from then on, like those of what was written: the graph projects the states
that the cache does not hold yet, ``states[:, cached:]``, which are all of them or none, and puts them behind the past.
So it needs no branch, which would hold every weight twice or hide it from fusions.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.exporters.configs import DynamoConfig
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.exporters.utils import apply_patches

from ..errors import CaptureError
from ..frontend.capture import program_of
from ..frontend.trace import gradients_on, trace_with
from ..graph.domain import Domain, Range
from ..graph.edit import Edit
from ..graph.program import Signature, Source
from ..graph.tree import named_tensors
from ..passes.tidy import Tidy
from ..public import Program
from .cut import SIZES, WRITTEN, Axes, Half, axes_of, cut
from .past import ELSE, cached, check_reach, empty_pasts, odd_layers, results, stages_of
from .replay import replay

aten = torch.ops.aten

#: What the outputs that are kept are called: others, such as all states of T5Gemma's decoder, nobody reads.
_GIVEN = ("logits", "encoder_last_hidden_state")


def halves(program: Program) -> tuple[Half, Half]:
    """The encoder and the decoder of a folded program of an encoder-decoder.

    Raises:
        CaptureError: what it keeps between tokens is not a plain cache of keys and values, or the decoder reads more of
            the encoder than its last states
    """
    model, axes = cast(Any, program.source.model), axes_of(program.example)
    if axes is None:
        raise CaptureError(f"{program.name} generates from {', '.join(program.example)}; {ELSE}")
    example = {name: program.example[name] for name in axes}
    # The model may be a copy in another dtype.
    given = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in example.items()}
    name, cache = _cache(model, given)
    layers = len(cache.self_attention_cache.layers)
    view = _without_past(program, _captured(model, {**given, name: cache}, axes), given, axes, 4 * layers)
    view.source, view.heads = program.source, program.heads
    return cut(replay(program, view), axes, layers)


def _cache(model: Any, given: Mapping[str, Tensor]) -> tuple[str, Any]:
    """The argument that takes the cache, and a cache of some tokens that were written and none that were read.

    transformers' own generation says of what kind and how wide it is.
    """
    what = type(model).__name__
    stages = stages_of(model, {name: value for name, value in given.items() if name != WRITTEN})
    found = {
        name: value for name, value in stages["decode"][1].items() if not isinstance(value, (Tensor, bool, type(None)))
    }
    caches = {name: value for name, value in found.items() if isinstance(value, EncoderDecoderCache)}
    if set(found) - set(caches) != {"encoder_outputs"} or len(caches) != 1:
        raise CaptureError(f"{what}: between tokens it keeps {', '.join(sorted(found)) or 'nothing'}; {ELSE}")
    name, held = caches.popitem()
    written = _emptied(what, held.self_attention_cache, SIZES["past"])
    read = _emptied(what, held.cross_attention_cache, 0)
    if len(written.layers) != len(read.layers) or not read.layers:
        raise CaptureError(f"{what}: not every layer of its decoder reads its own text and another; {ELSE}")
    return name, EncoderDecoderCache(written, read)


def _emptied(what: str, part: Any, length: int) -> DynamicCache:
    """A cache as wide as ``part``, of this many tokens."""
    odd = odd_layers(part.layers)
    if odd:
        raise CaptureError(f"{what}: its cache is of {', '.join(odd)}, no plain keys and values; {ELSE}")
    cache = DynamicCache()
    for number, layer in enumerate(part.layers):
        both = (layer.keys, layer.values)
        keys, values = (value.new_zeros(*value.shape[:2], length, value.shape[3]) for value in both)
        cache.update(keys, values, number)
    return cache


def _captured(model: nn.Module, inputs: Mapping[str, Any], axes: Axes) -> Any:
    """The whole model as a graph, made for conversion to ONNX; its cache an input and an output."""
    sizes = {name: Dim(name) for name in ("batch", "source", "new", "past")}
    shapes: dict[str, Any] = {
        name: {axis: sizes[size] for axis, size in enumerate(named) if size} for name, named in axes.items()
    }
    cache = inputs[next(name for name in inputs if name not in axes)]
    count = 2 * len(cache.self_attention_cache.layers)
    pasts = [{0: sizes["batch"], 2: sizes["past"]}] * count + [{0: sizes["batch"]}] * count
    shapes |= {name: pasts for name in inputs if name not in axes}

    def sized(path: str, value: Tensor, new: int, past: int) -> list[int]:
        if path in axes:
            long = {"source": past + new, "new": new, "batch": len(value)}
            return [long.get(size, given) for size, given in zip(axes[path], value.shape, strict=True)]
        return [len(value), value.shape[1], past if value.shape[2] else 0, value.shape[3]]

    def attempt(free: Any) -> Any:
        exporter, given = DynamoExporter(), {**inputs, "use_cache": True, "return_dict": True}
        captured, _ = exporter.export_program(cast(Any, model), given, DynamoConfig(dynamic=True, dynamic_shapes=free))
        check_reach(captured, inputs, sized, model)
        return captured.module(check_guards=False)

    with apply_patches("onnx"), gradients_on(True):
        return trace_with(attempt, model, shapes)


# ---- the past is empty


def _without_past(program: Program, unlifted: Any, given: Mapping[str, Tensor], axes: Axes, count: int) -> Program:
    """The graph as a program of what is read and written, every past empty; it gives logits and encoder's states."""
    model = program.source.model
    names = {id(value): name for name, value in named_tensors(model)}
    made = program_of(unlifted, Source(model), given, _signature(given, axes), names)
    view = dataclasses.replace(made, captured=None)
    edit, graph = Edit(view, Tidy()), view.graph
    inputs = graph.find_nodes(op="placeholder")
    pasts = [node for node in inputs if node.name not in given]
    if [node.name for node in inputs if node.name in given] != list(given) or len(pasts) != count:
        raise CaptureError(f"{view.name}: its graph takes {', '.join(node.name for node in inputs)}; {ELSE}")
    written = next(node for node in inputs if node.name == WRITTEN)
    with graph.inserting_before(next(node for node in graph.nodes if node.op == "call_function")):
        batch, new = (graph.call_function(aten.sym_size.int, (written, axis)) for axis in (0, 1))
        none = graph.call_function(operator.sub, (new, new))
    empty_pasts(view, pasts, batch, none)
    named, found = _named(unlifted), results(graph)
    logits, states = (named.get(name) for name in _GIVEN)
    if logits is None or states is None or [cached(node) for node in found if cached(node) >= 0] != list(range(count)):
        raise CaptureError(f"{view.name}: its graph gives {', '.join(named)}, not the whole cache beside; {ELSE}")
    graph.output_node().args = ((found[logits], found[states]),)
    for past in pasts:
        graph.erase_node(past)
    graph.eliminate_dead_code()
    edit.recompute()
    return view


def _named(unlifted: Any) -> dict[str, int]:
    """The places of a captured model's outputs that are one tensor each, by their names."""
    spec = unlifted.graph._codegen.pytree_info.out_spec  # an exported graph has the codegen that knows its outputs
    outputs = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    return {name: place for name, place in outputs.items() if isinstance(place, int)}


def _signature(given: Mapping[str, Tensor], axes: Axes) -> Signature:
    in_spec = pytree.tree_structure(((), dict(given)))
    out_spec = pytree.tree_structure(dict.fromkeys(_GIVEN, 0))
    shapes = {
        name: tuple(size or int(fixed) for size, fixed in zip(named, given[name].shape, strict=True))
        for name, named in axes.items()
    }
    free = sorted({size for named in axes.values() for size in named if size})
    return Signature(tuple(given), in_spec, out_spec, Domain(shapes, {size: Range(1) for size in free}))
