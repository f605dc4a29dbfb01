"""A decoder with its cache, rewritten: while the passes run, the past is empty.

The history is replayed on a graph of ordinary inputs, without its cache (:mod:`lorafx.backends.past`).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree
from transformers import DynamicCache
from transformers.exporters.exporter_onnx import OnnxExporter
from transformers.exporters.utils import get_leaf_tensors

from ..errors import CaptureError
from ..frontend.capture import program_of
from ..graph.domain import Domain, Range
from ..graph.edit import Edit
from ..graph.program import Signature, Source
from ..models.eager import in_mode
from ..passes.tidy import Tidy
from ..public import Program
from .asked import check_asked
from .late_weights import StandIns
from .past import (
    ELSE,
    cached,
    check_reach,
    empty_pasts,
    give_past,
    measure_past,
    odd_layers,
    present,
    results,
    stages_of,
    width,
)
from .replay import RewritingExporter, replay

aten = torch.ops.aten


def decode_inputs(
    model: nn.Module, example: Mapping[str, Tensor], valued: nn.Module | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Inputs of ``model`` for some tokens after a past, whose last one is the cache, and the others without a past.

    transformers' own generation makes them. The cache is made anew with every token in every layer: a window slides by
    masking alone in the graph, and what a layer forgets is no function of its inputs.

    Args:
        model: what is to be traced
        example: its example inputs
        valued: the same model with its values, where ``model`` has stand-ins of them

    Raises:
        CaptureError: generation keeps other things between tokens than keys and values
    """
    what = type(model).__name__
    left = {name: value.flip(1) for name, value in example.items()}  # texts to go on with are padded on the left
    stages = stages_of(model, left, multi_token_decode=True)
    if set(stages) != {"prefill", "decode"}:
        raise CaptureError(f"{what}: it generates from more than a text ({', '.join(stages)}); {ELSE}")
    decode, prefill = stages["decode"][1], stages["prefill"][1]
    state = {name: value for name, value in decode.items() if not isinstance(value, (Tensor, int, type(None)))}
    plain = {name: value for name, value in decode.items() if isinstance(value, Tensor)}
    layers = _layers(what, state)
    if not {"input_ids", "attention_mask"} <= plain.keys():
        raise CaptureError(
            f"{what}: it generates from {', '.join(plain)}, not from input_ids and attention_mask; {ELSE}"
        )
    asked = valued or model
    with in_mode(asked, training=False):
        check_asked(asked, left, prefill)
    cache, length = DynamicCache(), plain["attention_mask"].shape[1] - plain["input_ids"].shape[1]
    for number, layer in enumerate(layers):
        keys, values = (part.new_zeros(*part.shape[:2], length, part.shape[3]) for part in (layer.keys, layer.values))
        cache.update(keys, values, number)
    return {**plain, next(iter(state)): cache}, {name: prefill[name].flip(1) for name in plain}


def _layers(what: str, state: Mapping[str, Any]) -> list[Any]:
    """The layers of the one cache in what a model keeps between tokens; CaptureError when it keeps anything else."""
    caches: list[Any] = [value for value in state.values() if isinstance(value, DynamicCache)]
    layers = [layer for cache in caches for layer in cache.layers]
    if caches and not any(getattr(layer, "is_initialized", True) for layer in layers):
        raise CaptureError(f"{what}: it has no cache, and reads the whole text again for each token; {ELSE}")
    odd = odd_layers(layers)
    if len(state) != 1 or not layers or odd or type(caches[0]) is not DynamicCache:
        kinds = ", ".join(odd or sorted({type(value).__name__ for value in state.values()})) or "nothing"
        raise CaptureError(f"{what}: between tokens it keeps {kinds}, no plain cache of keys and values; {ELSE}")
    return layers


#: The free sizes of a decode graph, by the axes of its tokens and of each tensor of its cache.
FREE: dict[str, dict[int, Any]] = {
    "tokens": {0: Dim("batch"), 1: Dim("sequence")},
    "cache": {0: Dim("batch"), 2: Dim("past")},
}


def decode_shapes(inputs: Mapping[str, Any], free: Mapping[str, Mapping[int, Any]] = FREE) -> dict[str, Any]:
    """The free sizes of a decode graph's inputs, as ``torch.export`` takes them: batch, new tokens, past tokens.

    Dimensions that inputs share trace faster than each by itself. The mask is as long as past and new tokens together,
    which is no dimension one can ask for.
    """
    tokens, cache = dict(free["tokens"]), dict(free["cache"])
    shapes: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            shapes[name] = {**tokens, 1: Dim.AUTO} if name == "attention_mask" else tokens
        else:
            shapes[name] = [cache for layer in value.layers for _ in (layer.keys, layer.values)]
    return shapes


class CachedExporter(RewritingExporter):
    """A :class:`RewritingExporter` of a decode graph, whose cache is an input and an output.

    Args:
        program: what to replay
        example: the other inputs of the decode graph for texts without a past, on which passes try what they do
        stand_ins: stand for weights that are computed later
    """

    def __init__(self, program: Program, example: Mapping[str, Tensor], stand_ins: StandIns):
        super().__init__(program, stand_ins)
        self.example = dict(example)

    def _rewrite(self, captured: ExportedProgram, model: nn.Module, inputs: Any, config: Any) -> ExportedProgram:
        check_reach(captured, {name: inputs[name] for name in config.dynamic_shapes}, _sized, model)
        return super()._rewrite(captured, model, inputs, config)

    def replayed(
        self, captured: ExportedProgram, model: nn.Module, names: Mapping[int, str], inputs: Any, config: Any
    ) -> ExportedProgram:
        """The capture with the program's history, traced again with a cache of what stayed; see the module."""
        unlifted = captured.module(check_guards=False)
        view, order, given = _without_past(unlifted, Source(model), self.example, names)
        view.source, view.heads = self.rewritten.source, self.rewritten.heads
        self.stand_ins.give_place(view.root)
        replayed = replay(self.rewritten, view)
        _give_past(replayed, order, given)
        shapes = config.dynamic_shapes
        leaves = pytree.tree_leaves(shapes, is_leaf=_is_axes)
        example = _example(replayed.graph, list(get_leaf_tensors({name: inputs[name] for name in shapes}).values()))
        read = {str(node.target) for node in replayed.graph.find_nodes(op="get_attr") if node.users}
        self.stand_ins.take_place(replayed.root, read)
        return torch.export.export(fx.GraphModule(replayed.root, replayed.graph), example, dynamic_shapes=tuple(leaves))


# As in `replay`: that is how transformers declares a back end.
class CachedOnnxExporter(OnnxExporter, CachedExporter):  # pyright: ignore[reportIncompatibleMethodOverride]
    """transformers' ONNX exporter over the rewritten decode graph."""


def _is_axes(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(axis, int) for axis in value)


def _sized(name: str, value: Tensor, new: int, past: int) -> tuple[int, ...]:
    """The shape of an input of a decode graph for so many new tokens after so many."""
    if value.dim() == 2:
        return len(value), past + new if name == "attention_mask" else new
    return len(value), value.shape[1], past, value.shape[3]


# ---- the past is empty


def _without_past(
    unlifted: Any, source: Source, example: Mapping[str, Tensor], names: Mapping[int, str]
) -> tuple[Program, list[str], list[int]]:
    """The decode graph as a program of the inputs in ``example``, every past empty.

    Returns:
        the program; the names of all inputs in their order; and what the outputs are: -1 for logits, else an index in
        the cache
    """
    what, signature = type(source.model).__name__, _signature(example)
    program = dataclasses.replace(program_of(unlifted, source, example, signature, names), captured=None)
    edit, graph = Edit(program, Tidy()), program.graph
    inputs = graph.find_nodes(op="placeholder")
    plain = {node.name: node for node in inputs if node.name in example}
    if list(plain) != list(example) or not {"input_ids", "attention_mask"} <= plain.keys():
        raise CaptureError(f"{what}: its decode graph takes {', '.join(node.name for node in inputs)}; {ELSE}")
    pasts = [node for node in inputs if node.name not in plain]
    empty_pasts(program, pasts, *_sizes(graph, plain["input_ids"], plain["attention_mask"]))
    found = results(graph)
    given = [cached(node) for node in found]
    if sorted(given) != list(range(-1, len(pasts))) or given[0] != -1:
        raise CaptureError(f"{what}: its decode graph gives other things than logits and a cache; {ELSE}")
    graph.output_node().args = ((found[0],),)
    order = [node.name for node in inputs]
    for past in pasts:
        graph.erase_node(past)
    ids = plain["input_ids"].meta["val"]
    plain["attention_mask"].meta["val"] = ids.new_empty(ids.shape, dtype=example["attention_mask"].dtype)
    graph.eliminate_dead_code()
    edit.recompute()
    return program, order, given


def _signature(example: Mapping[str, Tensor]) -> Signature:
    in_spec = pytree.tree_structure(((), dict(example)))
    out_spec = pytree.tree_structure({"logits": 0})
    domain = Domain(dict.fromkeys(example, ("batch", "length")), {"batch": Range(1), "length": Range(1)})
    return Signature(tuple(example), in_spec, out_spec, domain)


def _sizes(graph: fx.Graph, ids: fx.Node, mask: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The axes of a past that are free, from the other inputs: how many texts, and how long the past is."""
    first = next(node for node in graph.nodes if node.op == "call_function")
    with graph.inserting_before(first):
        batch, new, total = (graph.call_function(aten.sym_size.int, place) for place in ((ids, 0), (ids, 1), (mask, 1)))
        return batch, graph.call_function(operator.sub, (total, new))


# ---- the past is given


def _give_past(program: Program, order: list[str], given: list[int]) -> None:
    """Make each past an input again and what it becomes an output; CaptureError when a pass took it away."""
    graph = program.graph
    found = present(program, len(given) - 1)
    plain = {node.name: node for node in graph.find_nodes(op="placeholder")}
    place, rest = None, iter(found)
    for name in order:
        place = plain[name] if name in plain else give_past(graph, name, next(rest), place)
    logits = results(graph)[0]
    graph.output_node().args = (tuple(logits if result < 0 else found[result] for result in given),)
    measure_past(graph)


def _example(graph: fx.Graph, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Inputs of the decode graph whose cache is as wide as what stayed."""
    given = []
    for node, value in zip(graph.find_nodes(op="placeholder"), leaves, strict=True):
        wide = width(node)
        given.append(value if wide is None else value.new_zeros(len(value), wide[0], value.shape[2], wide[1]))
    return tuple(given)
