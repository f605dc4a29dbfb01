"""A decoder with its cache, rewritten: while the passes run, the past is empty.

A graph that takes keys and values in and gives them out holds their channels fast: whoever calls it reads them. But a
cache only ever holds what the graph itself gave, so its channels are those of the new keys and values, and an empty
past is as good as any to argue about them. So each ``cat(past, new)`` becomes ``cat(new[:0], new)``, the history is
replayed on that graph of ordinary inputs, and afterwards each past is an input again, as wide as what stayed of it.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree
from transformers.cache_utils import DynamicLayer
from transformers.exporters.exporter_onnx import OnnxExporter
from transformers.exporters.utils import decompose_for_generation, get_leaf_tensors

from ..errors import CaptureError
from ..frontend.capture import program_of
from ..graph.domain import Domain, Range
from ..graph.edit import Edit
from ..graph.operands import argument
from ..graph.program import Signature, Source
from ..passes.tidy import Tidy
from ..public import Program
from .replay import RewritingExporter, replay

aten = torch.ops.aten

#: In the meta of an operator that puts new keys or values behind the past: the index of the tensor in the cache.
_CACHED = "lorafx_cached"
#: In the meta of the operator that gives the number of past tokens.
_LENGTH = "lorafx_past_length"
_ELSE = "export it without generate, or as an ordinary checkpoint (--format hf)"


def decode_inputs(model: nn.Module, example: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Inputs of ``model`` for some tokens after a past, whose last one is the cache, and the others without a past.

    transformers' own generation makes them. The cache is made anew with every token in every layer: a window slides by
    masking alone in the graph, and what a layer forgets is no function of its inputs.

    Raises:
        CaptureError: generation keeps other things between tokens than keys and values
    """
    from transformers import DynamicCache

    what = type(model).__name__
    left = {name: value.flip(1) for name, value in example.items()}  # texts to go on with are padded on the left
    stages = decompose_for_generation(cast(Any, model), left, multi_token_decode=True)
    if set(stages) != {"prefill", "decode"}:
        raise CaptureError(f"{what}: it generates from more than a text ({', '.join(stages)}); {_ELSE}")
    decode, prefill = stages["decode"][1], stages["prefill"][1]
    state = {name: value for name, value in decode.items() if not isinstance(value, (Tensor, bool, type(None)))}
    plain = {name: value for name, value in decode.items() if isinstance(value, Tensor)}
    layers: list[Any] = [layer for value in state.values() if type(value) is DynamicCache for layer in value.layers]
    if len(state) != 1 or not layers or not all(isinstance(layer, DynamicLayer) for layer in layers):
        kinds = ", ".join(sorted({type(value).__name__ for value in state.values()})) or "nothing"
        raise CaptureError(f"{what}: between tokens it keeps {kinds}, no plain cache of keys and values; {_ELSE}")
    if not {"input_ids", "attention_mask"} <= plain.keys():
        raise CaptureError(
            f"{what}: it generates from {', '.join(plain)}, not from input_ids and attention_mask; {_ELSE}"
        )
    cache, length = DynamicCache(), plain["attention_mask"].shape[1] - plain["input_ids"].shape[1]
    for number, layer in enumerate(layers):
        keys, values = (part.new_zeros(*part.shape[:2], length, part.shape[3]) for part in (layer.keys, layer.values))
        cache.update(keys, values, number)
    return {**plain, next(iter(state)): cache}, {name: prefill[name].flip(1) for name in plain}


def decode_shapes(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The free sizes of a decode graph's inputs, as ``torch.export`` takes them: batch, new tokens, past tokens.

    Dimensions that inputs share trace faster than each by itself. The mask is as long as past and new tokens together,
    which is no dimension one can ask for.
    """
    batch, sequence, past = Dim("batch"), Dim("sequence"), Dim("past")
    shapes: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            shapes[name] = {0: batch, 1: Dim.AUTO if name == "attention_mask" else sequence}
        else:
            shapes[name] = [{0: batch, 2: past} for layer in value.layers for _ in (layer.keys, layer.values)]
    return shapes


class CachedExporter(RewritingExporter):
    """A :class:`RewritingExporter` of a decode graph, whose cache is an input and an output.

    Args:
        program: what to replay
        example: the other inputs of the decode graph for texts without a past, on which passes try what they do
    """

    def __init__(self, program: Program, example: Mapping[str, Tensor]):
        super().__init__(program)
        self.example = dict(example)

    def replayed(
        self, captured: ExportedProgram, model: nn.Module, names: Mapping[int, str], inputs: Any, shapes: Any
    ) -> ExportedProgram:
        """The capture with the program's history, traced again with a cache of what stayed; see the module."""
        unlifted = captured.module(check_guards=False)
        view, order, results = _without_past(unlifted, Source(model), self.example, names)
        view.source, view.heads = self.rewritten.source, self.rewritten.heads
        replayed = replay(self.rewritten, view)
        _give_past(replayed, order, results)
        leaves = pytree.tree_leaves(shapes, is_leaf=_is_axes)
        given = _example(replayed.graph, list(get_leaf_tensors({name: inputs[name] for name in shapes}).values()))
        return torch.export.export(fx.GraphModule(replayed.root, replayed.graph), given, dynamic_shapes=tuple(leaves))


# As in `replay`: that is how transformers declares a back end.
class CachedOnnxExporter(OnnxExporter, CachedExporter):  # pyright: ignore[reportIncompatibleMethodOverride]
    """transformers' ONNX exporter over the rewritten decode graph."""


def _is_axes(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(axis, int) for axis in value)


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
        raise CaptureError(f"{what}: its decode graph takes {', '.join(node.name for node in inputs)}; {_ELSE}")
    sizes = _sizes(graph, plain["input_ids"], plain["attention_mask"])
    pasts = [node for node in inputs if node.name not in plain]
    for number, past in enumerate(pasts):
        _empty(program, past, number, sizes)
    results = [_cached(node) for node in pytree.tree_leaves(graph.output_node().args[0])]
    if sorted(results) != list(range(-1, len(pasts))) or results[0] != -1:
        raise CaptureError(f"{what}: its decode graph gives other things than logits and a cache; {_ELSE}")
    graph.output_node().args = ((pytree.tree_leaves(graph.output_node().args[0])[0],),)
    order = [node.name for node in inputs]
    for past in pasts:
        graph.erase_node(past)
    ids = plain["input_ids"].meta["val"]
    plain["attention_mask"].meta["val"] = ids.new_empty(ids.shape, dtype=example["attention_mask"].dtype)
    graph.eliminate_dead_code()
    edit.recompute()
    return program, order, results


def _signature(example: Mapping[str, Tensor]) -> Signature:
    in_spec = pytree.tree_structure(((), dict(example)))
    out_spec = pytree.tree_structure({"logits": 0})
    domain = Domain(dict.fromkeys(example, ("batch", "length")), {"batch": Range(1), "length": Range(1)})
    return Signature(tuple(example), in_spec, out_spec, domain)


def _sizes(graph: fx.Graph, ids: fx.Node, mask: fx.Node) -> dict[int, fx.Node]:
    """The axes of a past that are free, from the other inputs: how many texts, and how long the past is."""
    first = next(node for node in graph.nodes if node.op == "call_function")
    with graph.inserting_before(first):
        batch, new, total = (graph.call_function(aten.sym_size.int, place) for place in ((ids, 0), (ids, 1), (mask, 1)))
        length = graph.call_function(operator.sub, (total, new))
    length.meta[_LENGTH] = True
    return {0: batch, 2: length}


def _empty(program: Program, past: fx.Node, number: int, sizes: Mapping[int, fx.Node]) -> None:
    """Read the sizes of a past elsewhere, and concatenate nothing to what is new; CaptureError when more is read."""
    graph = program.graph
    for user in list(past.users):
        if user.target is aten.sym_size.int and user.args[1] in sizes:
            user.replace_all_uses_with(sizes[argument(user, "dim")])
            graph.erase_node(user)
        elif user.target is aten.cat.default and _behind(user, past):
            new = argument(user, "tensors")[1]
            with graph.inserting_before(user):
                nothing = graph.call_function(aten.slice.Tensor, (new, 2, 0, 0))
            user.args = ([nothing, new], user.args[1])
            user.meta[_CACHED] = number
        else:
            read = f"its cache is read by {user.target}, not only put before what is new"
            raise CaptureError(f"{program.name}: {read}; {_ELSE}")


def _behind(cat: fx.Node, past: fx.Node) -> bool:
    """Whether a concatenation is of a past and what is new, along the tokens."""
    parts = argument(cat, "tensors")
    return len(parts) == 2 and parts[0] is past and parts[1] is not past and cat.args[1:] in ((-2,), (2,))


def _cached(node: fx.Node) -> int:
    """Which tensor of the cache an output is; -1 for none."""
    while _CACHED not in node.meta and node.target in (aten.clone.default, aten.alias.default):
        node = node.all_input_nodes[0]
    return node.meta.get(_CACHED, -1)


# ---- the past is given


def _give_past(program: Program, order: list[str], results: list[int]) -> None:
    """Make each past an input again and what it becomes an output; CaptureError when a pass took it away."""
    graph = program.graph
    marked = (node for node in graph.nodes if _CACHED in node.meta)
    found = {node.meta[_CACHED]: node for node in marked if node.target is aten.cat.default}
    plain = {node.name: node for node in graph.find_nodes(op="placeholder")}
    if len(found) < len(results) - 1:
        raise CaptureError(f"{program.name}: a pass took keys or values away, so it has no whole cache; {_ELSE}")
    place, number = None, 0
    for name in order:
        if name in plain:
            place = plain[name]
            continue
        cat, number = found[number], number + 1
        new = argument(cat, "tensors")[1]
        with graph.inserting_after(place) if place is not None else graph.inserting_before(None):
            place = graph.placeholder(name)
        place.meta[_CACHED] = cat.meta["val"].shape
        cat.args = ([place, new], cat.args[1])
    logits = pytree.tree_leaves(graph.output_node().args[0])[0]
    graph.output_node().args = (tuple(logits if result < 0 else found[result] for result in results),)
    _measure_past(graph)


def _measure_past(graph: fx.Graph) -> None:
    """Read the length of the past from the past."""
    inputs = graph.find_nodes(op="placeholder")
    past = next(node for node in inputs if _CACHED in node.meta)
    for node in [node for node in graph.nodes if _LENGTH in node.meta]:
        with graph.inserting_after(inputs[-1]):
            length = graph.call_function(aten.sym_size.int, (past, 2))
        node.replace_all_uses_with(length)
        graph.erase_node(node)
    graph.eliminate_dead_code()


def _example(graph: fx.Graph, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Inputs of the decode graph whose cache is as wide as what stayed."""
    given = []
    for node, value in zip(graph.find_nodes(op="placeholder"), leaves, strict=True):
        width = node.meta.get(_CACHED)
        sizes = value.shape if width is None else (len(value), int(width[1]), value.shape[2], int(width[3]))
        given.append(value if width is None else value.new_zeros(sizes))
    return tuple(given)
