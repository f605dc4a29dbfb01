"""The cache of a graph, taken out while passes run and given back afterwards.

A graph that takes keys and values in and gives them out pins their channels: its caller reads them. But a
cache only ever holds what the graph itself gave, so its channels are those of the new keys and values, and an empty
past is as good as any to argue about them. So each ``cat(past, new)`` becomes ``cat(new[:0], new)``, and afterwards
each past is an input again, as wide as what stayed of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.exporters.utils import decompose_for_generation

from ..errors import CaptureError, UsageError, first_line
from ..graph.domain import domain_of, leaves_of
from ..graph.effects import CACHED
from ..graph.operands import argument
from ..models.tokenizers import length_limit
from ..public import Program

aten = torch.ops.aten

#: What else can be done with a model whose cache is none of these. What a checkpoint cannot hold of it says so itself.
ELSE = "export it without generate, as a checkpoint (--format hf) or a graph without a cache (pt2)"
#: What of a checkpoint's settings generation cannot do without.
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
#: What gives a tensor as it is, where the dtype stays.
_SAME = (aten.clone.default, aten.alias.default, aten.contiguous.default, aten.to.dtype, aten.to.dtype_layout)
#: Layers of a cache that hold keys and values and nothing else. Classes derived of these hold more.
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
#: How long a text may be where no config says it.
_FAR = 1 << 20
#: Texts of so many tokens are tried whole.
_SHORT = 8
#: In the meta of the operator that gives the number of past tokens.
_LENGTH = "lorafx_past_length"
#: In the meta of a past: the shape of what stands behind it.
_SHAPE = "lorafx_past_shape"


def stages_of(model: Any, example: Mapping[str, Tensor], **options: Any) -> dict[str, Any]:
    """What transformers' own generation calls ``model`` with, stage by stage.

    With its cache, and one token after the other: a checkpoint's settings may turn the first off, as training with
    checkpointed activations does, and search by beams, each a row of its own, or ask what language is spoken.

    Raises:
        CaptureError: it generates nothing by itself
    """
    settings = model.generation_config
    tokens = {name: getattr(settings, name, None) for name in _TOKENS}
    model.generation_config = GenerationConfig(use_cache=True, **tokens)
    try:
        return decompose_for_generation(model, dict(example), **options)
    except RuntimeError as error:  # in whose cause is what the model's own code said
        said = first_line(error.__cause__ or error).rstrip(".")
        raise CaptureError(f"{type(model).__name__}: its generation in transformers fails: {said}; {ELSE}") from error
    finally:
        model.generation_config = settings


def odd_layers(layers: Iterable[Any]) -> list[str]:
    """The kinds of layers of a cache that hold more than keys and values, or other things."""
    return sorted({type(layer).__name__ for layer in layers if type(layer) not in _PLAIN})


def check_reach(
    exported: ExportedProgram,
    inputs: Mapping[str, Any],
    sized: Callable[[str, Tensor, int, int], Iterable[int]],
    model: Any,
) -> None:
    """CaptureError unless a trace holds for texts as long as the model takes them.

    A tracer that finds free sizes itself narrows them without a word where the model's code branches on one, and the
    graph has the branch of short texts only. It excludes small sizes as well, as one block of several: these are held
    to what the graph computes.

    Args:
        exported: the trace of a graph with a cache
        inputs: what it was made on
        sized: gives the shape of an input, by its name and what it was, for so many new tokens after so many
        model: says how long texts are
    """
    name, far = type(model).__name__, (length_limit(model.config) or _FAR) - 3
    if far < _SHORT:
        return
    domain = domain_of(exported, inputs, tuple(inputs), None)
    for past in (far // 4, far - far // 4):
        new = far - past
        leaves = {
            path: torch.empty(tuple(sized(path, value, new, past)), dtype=value.dtype, device="meta")
            for path, value in leaves_of(inputs).items()
        }
        try:
            domain.check(leaves, f"{name}: after {past} tokens")
        except UsageError as error:
            raise CaptureError(f"{str(error).split(';')[0]}; {ELSE}") from None


def empty_pasts(program: Program, pasts: Iterable[fx.Node], batch: fx.Node, length: fx.Node) -> None:
    """Take each past out of the graph; in place.

    Args:
        program: whose graph has them as inputs, which stay without a reader
        pasts: in the order of the cache
        batch, length: give the sizes of a past that are read: how many texts, and how many tokens (none)

    Raises:
        CaptureError: a past is read by more than what puts it before the new keys or values
    """
    length.meta[_LENGTH] = True
    for number, past in enumerate(pasts):
        _empty(program, past, number, {0: batch, 2: length})


def _empty(program: Program, past: fx.Node, number: int, sizes: Mapping[int, fx.Node]) -> None:
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
            user.meta[CACHED] = number
        else:
            inner = isinstance(user.target, torch._ops.HigherOrderOperator)
            where = f"in a region of its own ({user.target}), which" if inner else f"by {user.target},"
            why = "no pass looks into" if inner else "not only put before what is new"
            read = f"its cache is read {where} {why}"
            raise CaptureError(f"{program.name}: {read}; {ELSE}")


def _behind(cat: fx.Node, past: fx.Node) -> bool:
    """Whether a concatenation is of a past and what is new, along the tokens."""
    parts = argument(cat, "tensors")
    return len(parts) == 2 and parts[0] is past and parts[1] is not past and cat.args[1:] in ((-2,), (2,))


def cached(node: fx.Node) -> int:
    """Which tensor of the cache an output is, as it is or cast to the dtype that it has; -1 for none."""
    while CACHED not in node.meta and node.target in _SAME:
        source = node.all_input_nodes[0]
        kinds = {one.meta["val"].dtype for one in (node, source)}
        if len(kinds) > 1:
            break
        node = source
    return node.meta.get(CACHED, -1)


def present(program: Program, count: int) -> list[fx.Node]:
    """What puts new keys and values behind a past, in the order of the cache; CaptureError when a pass took one."""
    marked = (node for node in program.graph.nodes if CACHED in node.meta)
    found = {node.meta[CACHED]: node for node in marked if node.target is aten.cat.default}
    if len(found) < count:
        raise CaptureError(f"{program.name}: a pass took keys or values away, so it has no whole cache; {ELSE}")
    return [found[number] for number in range(count)]


def give_past(graph: fx.Graph, name: str, cat: fx.Node, after: fx.Node | None) -> fx.Node:
    """Make the past of ``cat`` an input again, as wide as what is new; the input, which stands behind ``after``."""
    new = argument(cat, "tensors")[1]
    with graph.inserting_after(after) if after is not None else graph.inserting_before(None):
        past = graph.placeholder(name)
    past.meta[_SHAPE] = cat.meta["val"].shape
    cat.args = ([past, new], cat.args[1])
    return past


def measure_past(graph: fx.Graph) -> None:
    """Read the length of the past from the past."""
    inputs = graph.find_nodes(op="placeholder")
    past = next(node for node in inputs if _SHAPE in node.meta)
    for node in [node for node in graph.nodes if _LENGTH in node.meta]:
        with graph.inserting_after(inputs[-1]):
            length = graph.call_function(aten.sym_size.int, (past, 2))
        node.replace_all_uses_with(length)
        graph.erase_node(node)
    graph.eliminate_dead_code()


def width(past: fx.Node) -> tuple[int, int] | None:
    """The heads of an input that is a past, and the size of each; None for any other input."""
    shape = past.meta.get(_SHAPE)
    return None if shape is None else (int(shape[1]), int(shape[3]))


def results(graph: fx.Graph) -> list[fx.Node]:
    """What a graph gives, one after the other."""
    return pytree.tree_leaves(graph.output_node().args[0])
