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
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.exporters.configs import DynamoConfig
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.exporters.utils import apply_patches

from ..errors import CaptureError
from ..frontend.capture import program_of
from ..frontend.trace import gradients_on, trace_with
from ..graph.domain import Domain, Range
from ..graph.edit import Edit
from ..graph.operands import argument
from ..graph.program import Signature, Source
from ..graph.tree import named_tensors
from ..passes.tidy import Tidy
from ..public import Program
from .past import ELSE, cached, empty_pasts, give_past, measure_past, present, results, stages_of, width
from .replay import replay

aten = torch.ops.aten

#: What the model is given, in the order of its graph, and what its axes are.
AXES = {
    "input_ids": ("batch", "source"),
    "attention_mask": ("batch", "source"),
    "decoder_input_ids": ("batch", "new"),
}
#: Sizes of the examples that graphs are traced with: a cache that holds some of what was read and some that was
#: written, none of them 0 or 1, which a tracer tells from all others, and no two alike.
_SIZES = {"batch": 2, "source": 7, "new": 3, "past": 4, "read": 5}


@dataclass(frozen=True)
class Half:
    """One of the two graphs.

    Attributes:
        module: takes tensors by the names of ``inputs``, and gives a dict
        inputs: examples, by name
        axes: of each input, what its free axes are
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    axes: Mapping[str, Mapping[int, str]]

    def shapes(self) -> dict[str, dict[int, Any]]:
        """The free axes as ``torch.export`` takes them.

        How much of what was read is in the cache is at most all of it: a relation that only the tracer can name.
        """
        sizes = {name: Dim.AUTO if name in ("source", "read") else Dim(name) for name in _SIZES}
        return {name: {axis: sizes[size] for axis, size in axes.items()} for name, axes in self.axes.items()}


def past_name(number: int, layers: int) -> str:
    """The name of a tensor of the cache after ``past_key_values`` or ``present``: those of the decoder come first."""
    side, rest = ("decoder", number) if number < 2 * layers else ("encoder", number - 2 * layers)
    return f"{rest // 2}_{side}_{('key', 'value')[rest % 2]}"


def halves(program: Program) -> tuple[Half, Half]:
    """The encoder and the decoder of a folded program of an encoder-decoder.

    Raises:
        CaptureError: what it keeps between tokens is not a plain cache of keys and values, or the decoder reads more of
            the encoder than its last states
    """
    model: Any = program.source.model
    text = {name: program.example[name] for name in AXES}
    name, cache = _cache(model, text)
    layers = len(cache.self_attention_cache.layers)
    view = _without_past(program, _captured(model, {**text, name: cache}), text, 4 * layers)
    view.source, view.heads = program.source, program.heads
    return _cut(replay(program, view), layers)


def _cache(model: Any, text: Mapping[str, Tensor]) -> tuple[str, Any]:
    """The argument that takes the cache, and a cache of some tokens that were written and none that were read.

    transformers' own generation says of what kind and how wide it is.
    """
    what = type(model).__name__
    stages = stages_of(model, {name: text[name] for name in ("input_ids", "attention_mask")})
    found = {
        name: value for name, value in stages["decode"][1].items() if not isinstance(value, (Tensor, bool, type(None)))
    }
    caches = {name: value for name, value in found.items() if isinstance(value, EncoderDecoderCache)}
    if set(found) - set(caches) != {"encoder_outputs"} or len(caches) != 1:
        raise CaptureError(f"{what}: between tokens it keeps {', '.join(sorted(found)) or 'nothing'}; {ELSE}")
    name, held = caches.popitem()
    written = _emptied(what, held.self_attention_cache, _SIZES["past"])
    read = _emptied(what, held.cross_attention_cache, 0)
    if len(written.layers) != len(read.layers) or not read.layers:
        raise CaptureError(f"{what}: not every layer of its decoder reads its own text and another; {ELSE}")
    return name, EncoderDecoderCache(written, read)


def _emptied(what: str, part: Any, length: int) -> DynamicCache:
    """A cache as wide as ``part``, of this many tokens."""
    if not all(isinstance(layer, DynamicLayer) for layer in part.layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in part.layers}))
        raise CaptureError(f"{what}: its cache is of {kinds}, no plain keys and values; {ELSE}")
    cache = DynamicCache()
    for number, layer in enumerate(part.layers):
        both = (layer.keys, layer.values)
        keys, values = (value.new_zeros(*value.shape[:2], length, value.shape[3]) for value in both)
        cache.update(keys, values, number)
    return cache


def _captured(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The whole model as a graph, made for conversion to ONNX; its cache an input and an output."""
    sizes = {name: Dim(name) for name in ("batch", "source", "new", "past")}
    shapes: dict[str, Any] = {name: {axis: sizes[size] for axis, size in enumerate(AXES[name])} for name in AXES}
    cache = inputs[next(name for name in inputs if name not in AXES)]
    count = 2 * len(cache.self_attention_cache.layers)
    axes = [{0: sizes["batch"], 2: sizes["past"]}] * count + [{0: sizes["batch"]}] * count
    shapes |= {name: axes for name in inputs if name not in AXES}

    def attempt(free: Any) -> Any:
        exporter, given = DynamoExporter(), {**inputs, "use_cache": True, "return_dict": True}
        captured, _ = exporter.export_program(cast(Any, model), given, DynamoConfig(dynamic=True, dynamic_shapes=free))
        return captured.module(check_guards=False)

    with apply_patches("onnx"), gradients_on(True):
        return trace_with(attempt, model, shapes)


# ---- the past is empty


def _without_past(program: Program, unlifted: Any, text: Mapping[str, Tensor], count: int) -> Program:
    """The graph as a program of texts, every past empty, that gives logits and the encoder's states."""
    model = program.source.model
    names = {id(value): name for name, value in named_tensors(model)}
    made = program_of(unlifted, Source(model), text, _signature(text), names)
    view = dataclasses.replace(made, captured=None)
    edit, graph = Edit(view, Tidy()), view.graph
    inputs = graph.find_nodes(op="placeholder")
    pasts = [node for node in inputs if node.name not in text]
    if [node.name for node in inputs if node.name in text] != list(text) or len(pasts) != count:
        raise CaptureError(f"{view.name}: its graph takes {', '.join(node.name for node in inputs)}; {ELSE}")
    written = next(node for node in inputs if node.name == "decoder_input_ids")
    with graph.inserting_before(next(node for node in graph.nodes if node.op == "call_function")):
        batch, new = (graph.call_function(aten.sym_size.int, (written, axis)) for axis in (0, 1))
        none = graph.call_function(operator.sub, (new, new))
    empty_pasts(view, pasts, batch, none)
    found = results(graph)
    if [cached(node) for node in found] != [-1, *range(count), -1]:
        raise CaptureError(f"{view.name}: its graph gives other things than logits, a cache and states; {ELSE}")
    graph.output_node().args = ((found[0], found[-1]),)
    for past in pasts:
        graph.erase_node(past)
    graph.eliminate_dead_code()
    edit.recompute()
    return view


def _signature(text: Mapping[str, Tensor]) -> Signature:
    in_spec = pytree.tree_structure(((), dict(text)))
    out_spec = pytree.tree_structure({"logits": 0, "encoder_last_hidden_state": 0})
    domain = Domain(dict(AXES), {size: Range(1) for size in ("batch", "source", "new")})
    return Signature(tuple(text), in_spec, out_spec, domain)


# ---- two graphs


def _cut(program: Program, layers: int) -> tuple[Half, Half]:
    """The encoder, up to its states, and the decoder from there on, with its cache."""
    graph, count = program.graph, 4 * layers
    logits, states = results(graph)
    made = present(program, count)
    text, mask, written = (next(n for n in graph.find_nodes(op="placeholder") if n.name == name) for name in AXES)
    pasts = [written]
    for number, node in enumerate(made):
        pasts.append(give_past(graph, f"past_key_values_{past_name(number, layers)}", node, pasts[-1]))
    measure_past(graph)
    _leave_read(program, states, pasts[1 + count // 2])
    encoder = _Cut(program, {text: ("input_ids", AXES["input_ids"]), mask: ("attention_mask", AXES["attention_mask"])})
    inputs: dict[fx.Node, tuple[str, Sequence[str]]] = {
        written: ("input_ids", AXES["decoder_input_ids"]),
        mask: ("encoder_attention_mask", AXES["attention_mask"]),
        states: ("encoder_hidden_states", AXES["input_ids"]),
    }
    for number, past in enumerate(pasts[1:]):
        inputs[past] = (past.name, ("batch", "", "past" if number < count // 2 else "read"))
    given = {f"present_{past_name(number, layers)}": node for number, node in enumerate(made)}
    first = encoder.half({"last_hidden_state": states})
    return first, _Cut(program, inputs).half({"logits": logits, **given})


def _leave_read(program: Program, states: fx.Node, past: fx.Node) -> None:
    """Compute keys and values from those states only that ``past`` does not hold yet; in place.

    What lies between is as long as those then; a mask stays as long as all that was read. CaptureError: more of the
    decoder than keys and values reads states.
    """
    graph = program.graph
    with graph.inserting_after(states):
        rest = graph.call_function(aten.slice.Tensor, (states, 1, 0, sys.maxsize))
    with graph.inserting_before(rest):
        held = graph.call_function(aten.sym_size.int, (past, 2))
    with graph.inserting_after(rest):
        length = graph.call_function(aten.sym_size.int, (rest, 1))
    states.replace_all_uses_with(rest, delete_user_cb=lambda user: user.op != "output" and user is not rest)
    rest.args = (states, 1, held, sys.maxsize)
    longer = {rest}
    for node in list(graph.nodes):
        if node.op == "output" or cached(node) >= 0 or not longer & set(node.all_input_nodes) or node is length:
            continue
        longer.add(node)
        with graph.inserting_before(node):
            both: Any = map_arg((node.args, node.kwargs), lambda read: _as_long(graph, read, length))
        node.args, node.kwargs = both
    if results(graph)[0] in longer:
        raise CaptureError(f"{program.name}: more of its decoder than keys and values reads the encoder; {ELSE}")


def _as_long(graph: fx.Graph, read: fx.Node, length: fx.Node) -> fx.Node:
    """A number that was computed from the length of all that was read, computed from ``length``."""
    if _size(read) == AXES["input_ids"][1]:
        return length
    if not isinstance(read.meta.get("val"), (int, torch.SymInt)) or read.op != "call_function":
        return read
    inner = {one: _as_long(graph, one, length) for one in read.all_input_nodes}
    return read if all(old is new for old, new in inner.items()) else graph.node_copy(read, inner.__getitem__)


class _Plain(nn.Module):
    """The code and tensors of a graph module in a plain one: an exporter puts a function of its own before ``forward``,
    which the tracer passes over in a graph module.
    """

    def __init__(self, body: fx.GraphModule):
        super().__init__()
        self.code: Any = type(body).forward
        for name, part in body.named_children():
            self.add_module(name, part)
        for name, value in body.named_parameters(recurse=False):
            self.register_parameter(name, value)
        for name, value in body.named_buffers(recurse=False):
            self.register_buffer(name, value)

    def forward(self, **inputs: Tensor) -> Any:
        return self.code(self, **inputs)


class _Cut:
    """A part of a program's graph that begins at some of its values.

    Args:
        program: whose graph it is a part of
        inputs: the values that it is given, each with its name and with what its first axes are; "" for one of one size
    """

    def __init__(self, program: Program, inputs: Mapping[fx.Node, tuple[str, Sequence[str]]]):
        self.program, self.graph, self.inputs = program, fx.Graph(), dict(inputs)
        self.given = {node: self.graph.placeholder(name) for node, (name, _) in inputs.items()}

    def half(self, outputs: Mapping[str, fx.Node]) -> Half:
        """What computes ``outputs``; CaptureError when the inputs are not enough."""
        needed, made = self._needed(outputs.values()), dict(self.given)
        for node in self.program.graph.nodes:
            if node in needed:
                place = self._place(node)
                if place is None:
                    made[node] = self.graph.node_copy(node, made.__getitem__)
                else:
                    made[node] = self.graph.call_function(aten.sym_size.int, place)
        self.graph.output({name: made[node] for name, node in outputs.items()})
        examples = {name: self._example(node, axes) for node, (name, axes) in self.inputs.items()}
        free = {name: {axis: size for axis, size in enumerate(axes) if size} for name, axes in self.inputs.values()}
        return Half(_Plain(fx.GraphModule(self.program.root, self.graph)), examples, free)

    def _needed(self, outputs: Iterable[fx.Node]) -> set[fx.Node]:
        """The nodes between the inputs, which are left out, and the outputs."""
        needed: set[fx.Node] = set()
        left = [node for node in outputs if node not in self.given]
        while left:
            node = left.pop()
            if node.op == "placeholder":
                kept = ", ".join(name for name, _ in self.inputs.values())
                raise CaptureError(f"{self.program.name}: a half of it reads {node.name} beside {kept}; {ELSE}")
            needed.add(node)
            if self._place(node) is None:
                left += [read for read in node.all_input_nodes if read not in self.given and read not in needed]
        return needed

    def _place(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        """Where to read a size that the graph reads of a text that this part is not given; None for anything else."""
        size = _size(node)
        if size is None or argument(node, "self") in self.given:
            return None
        places = ((given, axes.index(size)) for given, (_, axes) in self.inputs.items() if size in axes)
        return next(((self.given[given], axis) for given, axis in places), None)

    def _example(self, node: fx.Node, axes: Sequence[str]) -> Tensor:
        wide = width(node)
        value = next(iter(node.users)).meta["val"] if wide else node.meta["val"]
        fixed = (0, wide[0], 0, wide[1]) if wide else value.shape
        names = [*axes, *[""] * (len(fixed) - len(axes))]
        sizes = [_SIZES[name] if name else int(size) for name, size in zip(names, fixed, strict=True)]
        return torch.ones(sizes, dtype=value.dtype, device=self.program.device)


def _size(node: fx.Node) -> str | None:
    """What a size is that is read of one of the texts; None for any other node."""
    read = argument(node, "self") if node.target is aten.sym_size.int else None
    return AXES[read.name][argument(node, "dim")] if isinstance(read, fx.Node) and read.name in AXES else None
