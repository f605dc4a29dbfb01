"""A graph of an encoder-decoder cut in two at what the encoder gives; see :mod:`lorafx.backends.halves`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.fx.node import map_arg

from ..errors import CaptureError
from ..graph.operands import argument
from ..public import Program
from .past import ELSE, cached, give_past, measure_past, present, results, width

aten = torch.ops.aten

Axes = Mapping[str, tuple[str, ...]]
#: What a model is given, in the order of its graph, and what the axes of that are; "" for one of one size. A model
#: reads texts, or sound of one length.
READS: tuple[Axes, ...] = (
    {"input_ids": ("batch", "source"), "attention_mask": ("batch", "source"), "decoder_input_ids": ("batch", "new")},
    {"input_features": ("batch", "", ""), "decoder_input_ids": ("batch", "new")},
)
WRITTEN, _MASK = "decoder_input_ids", "attention_mask"
_STATES = ("batch", "source")
_RESHAPES = (aten.view.default, aten.reshape.default, aten.expand.default)
#: Sizes of the examples that graphs are traced with: a cache that holds some of what was read and some that was
#: written, none of them 0 or 1, which a tracer tells from all others, and no two alike.
SIZES = {"batch": 2, "source": 7, "new": 3, "past": 4, "read": 5}


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
        sizes = {name: Dim.AUTO if name in ("source", "read") else Dim(name) for name in SIZES}
        return {name: {axis: sizes[size] for axis, size in axes.items()} for name, axes in self.axes.items()}


def past_name(number: int, layers: int) -> str:
    """The name of a tensor of the cache after ``past_key_values`` or ``present``: those of the decoder come first."""
    side, rest = ("decoder", number) if number < 2 * layers else ("encoder", number - 2 * layers)
    return f"{rest // 2}_{side}_{('key', 'value')[rest % 2]}"


def axes_of(example: Iterable[str]) -> Axes | None:
    """Which of :data:`READS` inputs of these names are; None for others."""
    names = set(example)
    return next((axes for axes in READS if axes.keys() == names), None)


def cut(program: Program, axes: Axes, layers: int) -> tuple[Half, Half]:
    """The encoder, up to its states, and the decoder from there on, with its cache."""
    graph, count = program.graph, 4 * layers
    logits, states = results(graph)
    made = present(program, count)
    given_by = {node.name: node for node in graph.find_nodes(op="placeholder")}
    read, written = {given_by[name]: (name, axes[name]) for name in axes if name != WRITTEN}, given_by[WRITTEN]
    pasts = [written]
    for number, node in enumerate(made):
        pasts.append(give_past(graph, f"past_key_values_{past_name(number, layers)}", node, pasts[-1]))
    measure_past(graph)
    _leave_read(program, states, pasts[1 + count // 2])
    inputs: dict[fx.Node, tuple[str, Sequence[str]]] = {written: ("input_ids", axes[WRITTEN])}
    if _MASK in axes:
        inputs[given_by[_MASK]] = (f"encoder_{_MASK}", axes[_MASK])
    inputs[states] = ("encoder_hidden_states", _STATES)
    for number, past in enumerate(pasts[1:]):
        inputs[past] = (past.name, ("batch", "", "past" if number < count // 2 else "read"))
    given = {f"present_{past_name(number, layers)}": node for number, node in enumerate(made)}
    first = _Cut(program, read).half({"last_hidden_state": states})
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
    longer, fixed = {rest}, states.meta["val"].shape[1]
    for node in list(graph.nodes):
        if node.op == "output" or cached(node) >= 0 or not longer & set(node.all_input_nodes) or node is length:
            continue
        longer.add(node)
        with graph.inserting_before(node):
            both: Any = map_arg((node.args, node.kwargs), lambda read: _as_long(graph, read, length))
        node.args, node.kwargs = both
        if isinstance(fixed, int):
            _reshape_as_long(node, fixed, length)
    if results(graph)[0] in longer:
        raise CaptureError(f"{program.name}: more of its decoder than keys and values reads the encoder; {ELSE}")


def _reshape_as_long(node: fx.Node, fixed: int, length: fx.Node) -> None:
    """Where states are of one length, code that reshapes ``[batch, length, …]`` has the number; ``length`` instead.

    A number that is left is an error in the trace of the half, whose example has fewer.
    """
    if node.target not in _RESHAPES:
        return
    sizes: Any = node.args[1]
    before = node.all_input_nodes[0].meta.get("val")
    if sizes[1] == fixed and (before is None or before.shape[1] == fixed):
        node.args = (node.args[0], [*sizes[:1], length, *sizes[2:]], *node.args[2:])


def _as_long(graph: fx.Graph, read: fx.Node, length: fx.Node) -> fx.Node:
    """A number that was computed from the length of all that was read, computed from ``length``."""
    if _size(read) == _STATES[1]:
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
        sizes = [SIZES[name] if name else int(size) for name, size in zip(names, fixed, strict=True)]
        return torch.ones(sizes, dtype=value.dtype, device=self.program.device)


def _size(node: fx.Node) -> str | None:
    """What a size is that is read of one of the texts; None for any other node."""
    read = argument(node, "self") if node.target is aten.sym_size.int else None
    named = {name: axes for one in READS for name, axes in one.items()}
    return named[read.name][argument(node, "dim")] or None if isinstance(read, fx.Node) and read.name in named else None
