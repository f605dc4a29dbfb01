"""The front end: any transformers model or plain module becomes a Program.

This module opens the model, chooses example inputs and dynamic shapes, has it traced once in training mode
(:mod:`lorafx.trace`), and checks that the evaluation graph derived from the trace computes the model's function.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from .checkpoint import open_model, open_tokenizer, weight_hashes
from .domain import domain_of
from .eager import judged, unjudged
from .errors import ArtifactError, CaptureError, UsageError
from .gradients import functions_laid_open, same_gradients
from .inputs import find_tokenizer, length_limit, pad_token
from .intact import intact
from .masks import check_unpadded
from .module import loss_type
from .normal import normalise
from .pipeline import to_eval
from .program import Program, Signature, Source
from .trace import export_graph, lean
from .tree import has_tensor, named_tensors, put_tensor, tensor_hash
from .tuners import adapter_tensors

_log = logging.getLogger(__name__)

#: Height and width of images where neither config nor processor says: what most are trained on.
_USUAL_PIXELS = 224
#: Losses of encoder-decoders that make the decoder's input from the encoder's, and look for its end-of-text tokens.
_DERIVED = ("ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification")


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
    **options: Any,
) -> Program:
    """Capture a model as a Program.

    Args:
        source: a checkpoint folder, a ``PreTrainedModel``, or any ``nn.Module`` (then give ``inputs``)
        task: opens a folder for a task (``text-classification``, …), so that a bare encoder gets a head
        num_labels: size of that head
        inputs: example keyword inputs, batch ≥ 2; made up when None
        meta: capture on the meta device from the config alone, in seconds and within 1 GB for any size
        dynamic: batch and sequence length stay free; else the shapes of ``inputs`` are fixed
        options: passed to transformers when a folder is opened (``dtype``, …)

    Raises:
        ArtifactError: the folder cannot be opened
        CaptureError: the model cannot be captured; names the line, the guard or the dimension
    """
    if isinstance(source, nn.Module):
        weightless = all(value.is_meta for value in source.parameters())
        given = {**options, "num_labels": num_labels, "meta": (meta and not weightless) or None}
        given = [name for name, value in given.items() if value is not None]
        if given:
            raise UsageError(f"{given[0]} is for opening a folder; a model in memory is captured as it is")
        origin = Source(source, task=task)
        checkpoint = None
    else:
        options = {**options, **({"num_labels": num_labels} if num_labels is not None else {})}
        opened = {**options, **({"trust_remote_code": True} if trust_remote_code else {})}
        checkpoint = Path(source)
        model, fresh = open_model(checkpoint, task, opened, meta=meta, allow_pickle=allow_pickle)
        _find_padding(model, checkpoint, trust_remote_code)
        hashes = weight_hashes(checkpoint)
        drawn = {} if meta else {name: tensor_hash(model.get_parameter(name)) for name in fresh}
        origin = Source(model, str(checkpoint.absolute()), task, opened, hashes, fresh, drawn)
    origin = dataclasses.replace(origin, adapters=adapter_tensors(origin.model))
    example = dict(inputs) if inputs is not None else example_inputs(origin.model, checkpoint)
    shapes = dynamic_shapes(origin.model, example) if dynamic else None
    return _captured(origin, example, shapes, check=not meta)


def _find_padding(model: nn.Module, folder: Path, trusted: bool) -> None:
    """Tell a classifier that has no padding token which one its texts are padded with: its tokenizer's, or the
    end-of-text token. A decoder's finds the last token of each text by it, and refuses more than one text without."""
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
    """Traced in training mode if that gives the model's evaluation too, else in evaluation mode."""
    with intact(origin.model):
        return _judged(origin, example, shapes, check=check)


def _judged(origin: Source, example: dict[str, Any], shapes: Any, *, check: bool) -> Program:
    failure = None
    for training in (True, False):
        try:
            with functions_laid_open() as functions:
                exported = export_graph(origin.model, example, shapes, training=training)
            program = program_from(exported, origin, example, shapes=shapes)
            program = judged(program) if check else unjudged(program)
        except CaptureError as error:
            failure = failure or error
            continue
        if not training:
            _log.warning("%s can be captured in evaluation mode only: it trains without dropout", program.name)
        return trainable(program, functions, check=check)
    assert failure is not None
    raise failure


def trainable(program: Program, functions: Iterable[str], *, check: bool) -> Program:
    """``program``, or its evaluation form when autograd functions of the model's give it gradients that a graph does
    not have. They often only save time or memory; what they do is found by comparing (not on the meta device).
    CaptureError when it is right for padded texts alone."""
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


# ---- example inputs


def example_inputs(model: nn.Module, checkpoint: Path | None = None, batch: int = 2, length: int = 7) -> dict[str, Any]:
    """Example inputs for a transformers model: two rows, one of them padded (an all-ones mask can be traced away)."""
    config = getattr(model, "config", None)
    if config is None:
        raise UsageError(f"{type(model).__name__} has no config to make inputs from; pass inputs={{name: tensor}}")
    try:
        example = _made_up(model, config, checkpoint, batch, length)
    except (AttributeError, TypeError) as error:  # a config that lacks a size, or has one of another kind
        raise UsageError(
            f"no inputs can be made up for {type(model).__name__} ({error}); pass inputs={{name: tensor}}"
        ) from error
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {
        name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
        for name, value in example.items()
    }


def _made_up(model: nn.Module, config: Any, checkpoint: Path | None, batch: int, length: int) -> dict[str, Tensor]:
    parameters = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values" or (main not in parameters and "pixel_values" in parameters):
        return {"pixel_values": _pixels(config, checkpoint, batch)}
    if main == "input_features":
        bins, frames = config.num_mel_bins, 2 * config.max_source_positions
        return {"input_features": torch.randn(batch, bins, frames, generator=_generator())}
    return _text(model, config, parameters, checkpoint, batch, length)


def _generator() -> torch.Generator:
    # Example inputs never depend on, or disturb, the caller's random state.
    return torch.Generator().manual_seed(0)


def _pixels(config: Any, checkpoint: Path | None, batch: int) -> Tensor:
    """Images of the size the config names; else of the size the folder's image processor makes, or the usual one."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or _processed_size(checkpoint) or _USUAL_PIXELS
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, getattr(vision, "num_channels", 3), height, width, generator=_generator())


def _processed_size(checkpoint: Path | None) -> tuple[int, int] | None:
    file = checkpoint / "preprocessor_config.json" if checkpoint is not None else None
    if file is None or not file.is_file():
        return None
    try:
        processor = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{file}: not valid JSON ({error}); fetch the checkpoint again") from None
    size = processor.get("crop_size" if processor.get("do_center_crop") else "size") or {}
    if isinstance(size, int):
        return size, size
    edge = size.get("shortest_edge")
    height, width = size.get("height", edge), size.get("width", edge)
    return (height, width) if height and width else None


def _text(
    model: nn.Module, config: Any, parameters: Mapping[str, Any], checkpoint: Path | None, batch: int, length: int
) -> dict[str, Any]:
    text_config = config.get_text_config()
    # A model of characters takes any number.
    top = min(getattr(text_config, "vocab_size", None) or 1000, 1000)
    pad = pad_token(config)
    ids = torch.randint(min(5, top - 1), top, (batch, length), generator=_generator())
    mask = torch.ones_like(ids)
    mask[-1, length // 2 + 1 :] = 0
    derived = getattr(config, "is_encoder_decoder", False) and loss_type(model) in _DERIVED
    if derived and text_config.eos_token_id is not None:
        ids = _ended(ids, mask, text_config.eos_token_id)
    if pad is not None:
        # Heads of decoders find the last token by looking for the padding token.
        ids = torch.where(mask.bool(), ids, torch.full_like(ids, pad))
    example = {"input_ids": ids}
    if "attention_mask" in parameters:
        example["attention_mask"] = mask
    if "token_type_ids" in parameters and "token_type_ids" in _tokenizer_inputs(model, checkpoint):
        example["token_type_ids"] = torch.zeros_like(ids)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters and not derived:
        example["decoder_input_ids"] = ids.flip(1).contiguous()
    return example


def _ended(ids: Tensor, mask: Tensor, end: int) -> Tensor:
    """Texts that end with the end-of-text token and have no other."""
    ids = ids.where(ids != end, ids + 1)
    last = mask.sum(1, keepdim=True) - 1
    return ids.scatter(1, last, end)


def _tokenizer_inputs(model: nn.Module, checkpoint: Path | None) -> list[str]:
    """What the folder's tokenizer returns; nothing when it has none."""
    if checkpoint is None or not any(checkpoint.glob("tokenizer*")):
        return []
    # Code was trusted where the model itself runs it.
    trusted = getattr(model, "is_remote_code", lambda: False)()
    return list(open_tokenizer(checkpoint, trusted).model_input_names)


def dynamic_shapes(model: nn.Module, example: Mapping[str, Any]) -> dict[str, Any]:
    """Batch is free in every input; so is the length of texts, up to the model's number of positions, and how many of
    them stand side by side in a row (choices). A size of 1 is none that a tracer can leave free: it stays 1."""
    limit = length_limit(getattr(model, "config", None))
    batch, choices = Dim("batch"), Dim("choices")
    dims = {
        side: Dim(name, max=limit) if limit else Dim(name) for side, name in (("", "sequence"), ("decoder_", "target"))
    }

    def axes(name: str, value: Any) -> dict[int, Dim] | None:
        if not isinstance(value, Tensor):
            return None
        side = "decoder_" if name.startswith("decoder_") else ""
        count = _text_axes(value, example.get(f"{side}input_ids"))
        free = {0: batch, **({1: choices} if count == 3 else {}), **({count - 1: dims[side]} if count > 1 else {})}
        return {axis: dim for axis, dim in free.items() if axis < value.dim() and value.shape[axis] != 1} or None

    return {name: pytree.tree_map(lambda leaf, name=name: axes(name, leaf), value) for name, value in example.items()}


def _text_axes(value: Tensor, ids: Any) -> int:
    """How many of an input's first axes are those of the texts: something for each token has them all."""
    if value.is_floating_point():
        return 1
    if isinstance(ids, Tensor) and value.shape[: ids.dim()] == ids.shape:
        return ids.dim()
    return 2 if value.dim() == 2 else 1


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
    codegen = unlifted.graph._codegen
    info = codegen.pytree_info  # type: ignore[attr-defined]
    inputs = tuple(info.in_spec.children()[1].context)  # of positional and keyword arguments the second
    signature = Signature(inputs, info.in_spec, info.out_spec, domain_of(exported, example, inputs, shapes))
    # By identity: a tied tensor is read under one of its names only.
    held = dict(named_tensors(root))
    read = {id(held[str(node.target)]) for node in graph.nodes if node.op == "get_attr" and str(node.target) in held}
    heads = head_modules(model, source.fresh)
    roles = {name: _role(name, id(value) in read, heads) for name, value in held.items()}
    roles.update({name: "constant" for name in held if name not in tensors})
    program = Program(graph, root, roles, signature, dict(example), source, heads)
    return dataclasses.replace(program.copy(), captured=program)


def _adopt(root: nn.Module, graph: fx.Graph, unlifted: nn.Module, names: Mapping[int, str]) -> None:
    """Give ``root`` what the graph reads beyond the model's own tensors: lifted constants and inner graphs."""
    for node in graph.nodes:
        if node.op not in ("get_attr", "call_module"):
            continue
        value = unlifted
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, nn.Module):
            root.add_module(str(node.target), value)
        elif id(value) in names:
            node.target = names[id(value)]
        elif not has_tensor(root, str(node.target)):
            put_tensor(root, str(node.target), value, persistent=False)  # type: ignore[arg-type]


def _role(name: str, read: bool, heads: tuple[str, ...]) -> str:
    if any(name.startswith(head + ".") for head in heads):
        return "head"
    return "base" if read else "unread"


def head_modules(model: nn.Module, fresh: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """Paths of the task head: outside the base model, the last child with parameters, and every other one that the
    checkpoint did not hold (``fresh``); and the output layer wherever it is."""
    base = getattr(model, "base_model", model)
    if base is model or not hasattr(model, "config"):
        return ()
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore
    children = [(name, child) for name, child in model.named_children() if child is not base]
    outside = [name for name, child in children if next(child.parameters(), None) is not None]
    heads = [name for name in outside if name == outside[-1] or any(key.startswith(f"{name}.") for key in fresh)]
    if output is not None:
        heads += [name for name, module in model.named_modules() if module is output and name not in heads]
    return tuple(heads)
