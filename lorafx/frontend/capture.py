"""The front end: any transformers model or plain module becomes a Program.

This module opens the model, has it traced once in training mode (:mod:`lorafx.frontend.trace`), and checks that the
evaluation graph derived from the trace computes the model's function.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ..errors import CaptureError, UsageError
from ..formats.adapter import Adapter
from ..graph.domain import domain_of
from ..graph.program import Signature, Source
from ..graph.site import module_path
from ..graph.tree import has_tensor, named_tensors, put_tensor, tensor_hash
from ..models.checkpoint import open_model
from ..models.examples import dynamic_shapes, example_inputs
from ..models.hub import local_folder
from ..models.identity import check_written, weight_hashes
from ..models.intact import intact
from ..models.tasks import head_modules, loss_type
from ..models.tokenizers import find_tokenizer, pad_token
from ..pipeline import to_eval
from ..public import Program
from .adapters import Adapters, adapted, added_record, read_adapters, resize, weighted, with_peft
from .built import build
from .gradients import functions_laid_open, module_hooks, same_gradients
from .judged import judged, unjudged
from .masks import check_unpadded
from .normal import normalise
from .taken import apart, check_taken
from .trace import export_graph, lean
from .tuners import adapter_constants, adapter_tensors, unwrapped

_log = logging.getLogger(__name__)


def capture(
    source: str | PathLike[str] | nn.Module,
    task: str | None = None,
    num_labels: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    meta: bool = False,
    *,
    dynamic: bool = True,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    check: bool = True,
    adapter: Adapters | None = None,
    **options: Any,
) -> Program:
    """Capture a model as a Program.

    Args:
        source: a checkpoint folder, or ``org/name`` on Hugging Face's hub; a ``PreTrainedModel``, or any ``nn.Module``
            (then give ``inputs``); one that PEFT wrapped is captured with its adapters, under the base model's own
            names
        task: opens a folder for a task (``text-classification``, …), so that a bare encoder gets a head
        num_labels: size of that head
        inputs: example keyword inputs, batch ≥ 2; generated when None
        meta: capture on the meta device from the config alone, in seconds and within 1 GB for any size
        dynamic: batch and sequence length stay free (of a module without a config, lengths where its code allows);
            else the shapes of ``inputs`` are fixed
        allow_pickle: whether weights in ``.bin`` files may be read
        trust_remote_code: whether code that comes with the folder may run
        check: compare the graph with the model, which runs it a few times; without it, a later comparison (an export's,
            say) has to catch what a graph cannot follow
        adapter: the folder of a PEFT adapter to put on the model, several, or several with weights
            (``{folder: weight}``), whose sum is taken. LoRA is read without PEFT
        options: passed to transformers when a folder is opened (``dtype``, …)

    Raises:
        ArtifactError: the folder cannot be opened, or an adapter does not fit it
        CaptureError: the model cannot be captured; names the line, the guard or the dimension
    """
    if isinstance(source, nn.Module):
        weightless = all(value.is_meta for value in source.parameters())
        given = {**options, "num_labels": num_labels, "meta": (meta and not weightless) or None}
        given = [name for name, value in given.items() if value is not None]
        if given:
            raise UsageError(f"{given[0]} is for opening a folder; a model in memory is captured as it is")
        origin = Source(unwrapped(source), task=task)
        checkpoint = None
    else:
        options |= {"num_labels": num_labels} if num_labels is not None else {}
        options |= {"trust_remote_code": True} if trust_remote_code else {}
        checkpoint = local_folder(source, allow_pickle=allow_pickle)
        origin = _opened(checkpoint, task, options, meta=meta, allow_pickle=allow_pickle)
    adapters, origin = _prepared(origin, adapter)
    origin = dataclasses.replace(origin, adapters=adapter_tensors(origin.model))
    example = apart(inputs) if inputs is not None else example_inputs(origin.model, checkpoint)
    check_taken(origin.model, example, dynamic=dynamic)
    shapes = dynamic_shapes(origin.model, example) if dynamic else None
    if checkpoint is None:
        return adapted(_captured(origin, example, shapes, check=check and not meta), adapters)
    # Files are hashed beside the trace: each keeps one core busy.
    with ThreadPoolExecutor(1) as pool:
        hashes = pool.submit(weight_hashes, checkpoint, read=not meta)
        program = _captured(origin, example, shapes, check=check and not meta)
        check_written(checkpoint, hashes.result())
        return adapted(_known_by(program, hashes.result()), adapters)


def _opened(folder: Path, task: str | None, options: dict[str, Any], *, meta: bool, allow_pickle: bool) -> Source:
    """The model in a checkpoint folder, and what it was opened with."""
    model, fresh = open_model(folder, task, options, meta=meta, allow_pickle=allow_pickle)
    _find_padding(model, folder, "trust_remote_code" in options)
    drawn = {} if meta else {name: tensor_hash(model.get_parameter(name)) for name in fresh}
    return Source(model, str(folder.absolute()), task, options, {}, fresh, drawn)


def _prepared(origin: Source, adapter: Adapters | None) -> tuple[list[tuple[Adapter, float]], Source]:
    """The LoRA adapters to put on the captured graph, and the model to capture: with any other adapter inside."""
    if adapter is None:
        return [], origin
    folders = weighted(adapter)
    inside = with_peft(origin.model, folders, own=origin.path is not None)
    if inside is not None:
        added = tuple(added_record(folder, 1.0) for folder in folders)
        return [], dataclasses.replace(origin, model=inside, added=added)
    adapters = read_adapters(folders)
    if origin.path is not None:  # a model in memory stays as it is
        resize(origin.model, adapters)
    return adapters, origin


def _known_by(program: Program, hashes: Mapping[str, str]) -> Program:
    """The program with the hashes of its base's files."""
    source = dataclasses.replace(program.source, hashes=hashes)
    captured = program.captured
    if captured is not None:
        captured = dataclasses.replace(captured, source=source)
    return dataclasses.replace(program, source=source, captured=captured)


def _find_padding(model: nn.Module, folder: Path, trusted: bool) -> None:
    """Set the padding token of a classifier that has none: its tokenizer's, or the end-of-text token. A decoder's finds
    the last token of each text by it, and without it refuses more than one text."""
    config: Any = model.config
    if loss_type(model) != "ForSequenceClassification" or pad_token(config) is not None:
        return
    text_config, tokenizer = config.get_text_config(), find_tokenizer(folder, trust_remote_code=trusted)
    known = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
    ends = getattr(text_config, "eos_token_id", None)
    for token in (*known, *(ends if isinstance(ends, list) else [ends])):
        if token is not None and 0 <= token < text_config.vocab_size:
            text_config.pad_token_id = token
            return


@lean()
def _captured(origin: Source, example: dict[str, Any], shapes: Any, *, check: bool) -> Program:
    """Trace in training mode if that gives the model's evaluation too, else in evaluation mode."""
    with intact(origin.model):
        return _judged(origin, example, shapes, check=check)


def _judged(origin: Source, example: dict[str, Any], shapes: Any, *, check: bool) -> Program:
    failure = None
    for training in (True, False):
        try:
            # The program is made from the model's tensors, not from what a forward put in their place during the trace.
            with functions_laid_open() as functions, intact(origin.model):
                exported = export_graph(origin.model, example, shapes, training=training)
            program = program_from(exported, origin, example, shapes=shapes)
            program = judged(program) if check else unjudged(program)
        except CaptureError as error:
            failure = failure or error
            continue
        if not training:
            how = "as it evaluates, without dropout or whatever else its code does in training alone"
            _log.warning("%s can be captured in evaluation mode only: it trains %s", program.name, how)
        return trainable(program, {*functions, *module_hooks(origin.model)}, check=check)
    assert failure is not None
    raise failure


def trainable(program: Program, functions: Iterable[str], *, check: bool) -> Program:
    """``program``, or its evaluation form when autograd functions or hooks of the model's give it gradients that a
    graph does not have. These often only save time or memory, or observe; comparing shows what they do (not on the meta
    device). CaptureError when the graph is right for padded texts only."""
    if check:
        check_unpadded(program)
    if not functions or not check or same_gradients(program):
        return program
    names = ", ".join(sorted(functions))
    why = (
        f"{program.name} has gradients of its own ({names}), which a graph cannot hold: it evaluates, but cannot train"
    )
    _log.warning("%s", why)
    return dataclasses.replace(to_eval(program), history=(), untrainable=why)


# ---- from the tracer's result to a Program


def program_from(
    exported: ExportedProgram,
    source: Source,
    example: Mapping[str, Any],
    names: Mapping[int, str] | None = None,
    shapes: Any = None,
) -> Program:
    """The Program of a traced graph. ``names`` maps tensor ids to names in the root model, if a part was traced;
    ``shapes`` are the dynamic shapes asked for."""
    unlifted = exported.module(check_guards=False)
    codegen: Any = unlifted.graph._codegen  # an exported graph has the one that knows its inputs and outputs
    info = codegen.pytree_info
    inputs = tuple(info.in_spec.children()[1].context)  # of positional and keyword arguments the second
    signature = Signature(inputs, info.in_spec, info.out_spec, domain_of(exported, example, inputs, shapes))
    return program_of(unlifted, source, example, signature, names)


def program_of(
    unlifted: fx.GraphModule,
    source: Source,
    example: Mapping[str, Any],
    signature: Signature,
    names: Mapping[int, str] | None = None,
) -> Program:
    """The Program of a traced graph that reads its tensors by name; see :func:`program_from`."""
    model = source.model
    tensors = dict(named_tensors(model))
    root = nn.Module()
    persistent = set(model.state_dict(keep_vars=True))
    for name, value in tensors.items():
        put_tensor(root, name, value, persistent=isinstance(value, nn.Parameter) or name in persistent)
    graph = fx.Graph()
    result = graph.graph_copy(unlifted.graph, {})
    graph.output(result)
    normalise(graph)
    _adopt(root, graph, unlifted, names or {})
    build(root, graph, [name for name, _ in named_tensors(root) if name not in tensors])
    # By identity: a tied tensor is read under one of its names only.
    held = dict(named_tensors(root))
    read = {id(held[str(node.target)]) for node in graph.nodes if node.op == "get_attr" and str(node.target) in held}
    heads = head_modules(model, source.fresh)
    roles = {name: _role(name, id(value) in read, heads) for name, value in held.items()}
    lifted = [name for name in held if name not in tensors]
    roles.update(dict.fromkeys(lifted, "constant"))
    theirs = adapter_constants(model, root, graph, lifted) if source.adapters else frozenset()
    source = dataclasses.replace(source, adapters=source.adapters | theirs)
    program = Program(graph, root, roles, signature, dict(example), source, heads)
    return dataclasses.replace(program.copy(), captured=program)


def _adopt(root: nn.Module, graph: fx.Graph, unlifted: nn.Module, names: Mapping[int, str]) -> None:
    """Give ``root`` what the graph reads beyond the model's own tensors: lifted constants and inner graphs."""
    for node in graph.nodes:
        if node.op not in ("get_attr", "call_module"):
            continue
        value: Any = unlifted
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, nn.Module):
            for inner in (inner for inner in value.modules() if isinstance(inner, fx.GraphModule)):
                normalise(inner.graph)
                inner.recompile()
            root.add_module(str(node.target), value)
        elif id(value) in names:
            node.target = names[id(value)]
        elif not isinstance(value, Tensor):
            raise CaptureError(
                f"{module_path(node, '') or 'the model'} hands a function of its own to each element of a tensor "
                f"(torch.vmap), which its trace leaves as {node.target}, a {type(value).__name__}: a graph holds "
                "operators and tensors alone; call it on whole tensors"
            )
        elif not has_tensor(root, str(node.target)):
            put_tensor(root, str(node.target), value, persistent=False)


def _role(name: str, read: bool, heads: tuple[str, ...]) -> str:
    if any(name.startswith(head + ".") for head in heads):
        return "head"
    return "base" if read else "unread"
