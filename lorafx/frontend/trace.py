"""Tracing: from an eager model to an exported program, in the mode that keeps both training and evaluation right.

The trace is made in training mode; the pass ``to-eval`` derives the evaluation graph from it. Modules with noise that
it has no rule for (stochastic depth, router jitter) and branches on values (layer drop) are traced in evaluation mode.
"""

from __future__ import annotations

import gc
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx import config as fx_config
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..graph.domain import FLAGS, input_nodes, is_axes, leaves_of
from ..graph.evaluation import RULES
from ..graph.likes import remembered_likes
from ..graph.shapes import told_at_once
from ..graph.site import module_path
from ..graph.symbols import remembered_sizes
from ..models.eager import cacheless, in_mode
from .notices import without_notices
from .stand_ins import StandIns
from .taken import check_read
from .tuners import choosing

T = TypeVar("T")
_DRAWS = "draws random numbers that a graph cannot turn off"
_DECIDES = "decides by random numbers or other values of tensors in training, which a graph cannot"
_log = logging.getLogger(__name__)


def export_graph(
    model: nn.Module, example: Mapping[str, Any], shapes: Any, *, training: bool = True
) -> ExportedProgram:
    """Trace ``model`` and leave it as it was.

    Args:
        model: the eager model
        example: keyword inputs, batch ≥ 2
        shapes: dynamic shapes by input name, or None when the shapes of ``example`` are fixed
        training: trace in training mode, except for modules whose noise has no evaluation form; else in evaluation mode

    Raises:
        CaptureError: names the line, the guard or the dimension
        UsageError: an input that the model does not read
    """
    left_out: dict[str, list[str]] = {}
    with in_mode(model, training=training):
        while True:
            exported, noisy = _attempt(model, example, shapes)
            if exported is not None and not noisy:
                for why, paths in left_out.items():  # of a capture that there is: what helped none stood in no way
                    _log.warning("%s %s; captured without them: %s", type(model).__name__, why, ", ".join(paths))
                check_read(model, exported, example)
                return exported
            paths = left_out.setdefault(_DECIDES if exported is None else _DRAWS, [])
            for path in sorted(noisy):
                model.get_submodule(path).training = False
                paths.append(path or "(the model itself)")


def _attempt(model: nn.Module, example: Mapping[str, Any], shapes: Any) -> tuple[ExportedProgram | None, set[str]]:
    """One trace, if there was one, and the paths of the modules whose training mode has to go."""
    try:
        exported = trace_with(lambda candidate: _trace(model, example, candidate), model, shapes)
    except CaptureError as error:
        branching = _branching_module(model, error)
        if not branching:
            raise
        return None, branching
    return exported, {path for path in _noisy_modules(exported.graph_module) if model.get_submodule(path).training}


def _noisy_modules(graph_module: fx.GraphModule) -> set[str]:
    """Paths of the modules that draw random numbers ``to-eval`` cannot turn off, inner graphs included."""
    return {
        module_path(node, "")
        for module in graph_module.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
        if node.target not in RULES and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    }


def _branching_module(model: nn.Module, error: CaptureError) -> set[str]:
    """The innermost module in training mode whose code branched on a value of a tensor, found in the traceback."""
    cause = error.__cause__
    if "data-dependent" not in str(cause):
        return set()
    paths = {id(module): path for path, module in model.named_modules() if module.training}
    found, traceback = set(), cause and cause.__traceback__
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if id(owner) in paths:
            found = {paths[id(owner)]}
        traceback = traceback.tb_next
    return found


#: How the tracer says that the model's own guards refuse the dimensions asked for; the second where it fails to say.
_REFUSED_DIMENSIONS = ("Constraints violated", "Cannot create Dim with inconsistent")


def trace_with(attempt: Callable[[Any], T], model: nn.Module, shapes: Any) -> T:
    """``attempt(shapes)``: shared named dimensions first, which trace faster and read better; then, if the model's own
    guards refuse them (a position table that ends early, say), with every free axis left to the tracer.

    Raises:
        CaptureError: both failed
    """
    with (
        cacheless(model),
        lean(),
        remembered_likes(),
        _patched_where_loaded(),
        _masks_at_once(),
        without_notices(),
        choosing(),
    ):
        try:
            return attempt(shapes)
        except CaptureError:  # it says what it is about
            raise
        except Exception as error:  # the tracer raises many classes; each is reported or retried
            if shapes is None or not any(sign in str(error) for sign in _REFUSED_DIMENSIONS):
                raise _capture_error(model, error) from error
        try:
            return attempt(pytree.tree_map(_left_to_tracer, shapes, is_leaf=is_axes))
        except CaptureError:
            raise
        except Exception as error:
            raise _capture_error(model, error) from error


def _left_to_tracer(axes: Any) -> Any:
    return axes and dict.fromkeys(axes, Dim.AUTO)


@contextmanager
def lean() -> Iterator[None]:
    """Trace without what nobody reads, a fifth of the time of a large model or an export: searches for garbage among
    millions of small objects that hold few cycles, and a stack trace for each node (errors have theirs). What frequent
    operators give is told at once, up to a third of the time of a small model; what symbolic sizes give is remembered,
    a fifth of the time of a large one."""
    # torch 2.11 does not read the switch: it traces all the same, in more time.
    collecting, quiet = gc.isenabled(), getattr(fx_config, "do_not_emit_stack_traces", False)
    gc.disable()
    fx_config.do_not_emit_stack_traces = True
    try:
        with told_at_once(), remembered_sizes():
            yield
    finally:
        fx_config.do_not_emit_stack_traces = quiet
        if collecting:
            gc.enable()


#: Where transformers has a model's code.
_CODE = re.compile(r"transformers\.models\.\w+\.modeling_\w+")


@contextmanager
def _patched_where_loaded() -> Iterator[None]:
    """transformers' exporters patch classes of some forty models while they trace, and load the code of each for it.
    Where it is not loaded there is no model of that class: it stays so, which saves most of a second."""
    from transformers.exporters import utils

    find = utils.import_dotted_path

    def loaded(path: str, missing_ok: bool = False) -> Any:
        code = _CODE.match(path)
        absent = missing_ok and code is not None and code[0] not in sys.modules
        return None if absent else find(path, missing_ok)

    utils.import_dotted_path = loaded
    try:
        yield
    finally:
        utils.import_dotted_path = find


def _trace(model: nn.Module, example: Mapping[str, Any], shapes: Any) -> ExportedProgram:
    # A tracer that fails prints the whole graph it had; the error says what a user needs, the log keeps the rest.
    said = io.StringIO()
    try:
        with redirect_stderr(said), _idle_moves(), warnings.catch_warnings():
            # What a model assigns to itself while it is traced is taken out again (lorafx.models.intact).
            warnings.filterwarnings("ignore", message="(?s).*assigned during export", category=UserWarning)
            exported = _exported(model, example, shapes)
            fixed = {} if hasattr(model, "config") else _fixed(exported, shapes)
            if fixed:  # that a model without a config takes texts, of any length, was a guess
                shapes = _without(shapes, fixed)
                exported = _exported(model, example, shapes)
    finally:
        _log.debug("%s", said.getvalue())
    _check_free(exported, shapes, example)
    return exported


def _exported(model: nn.Module, example: Mapping[str, Any], shapes: Any) -> ExportedProgram:
    if not hasattr(model, "config"):
        with StandIns():
            return torch.export.export(model, (), dict(example), dynamic_shapes=shapes)
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter

    # The exporter takes settings of the model out of its inputs.
    inputs = shapes and {name: axes for name, axes in shapes.items() if name not in FLAGS}
    config = DynamoConfig(dynamic=shapes is not None, dynamic_shapes=inputs)
    with gradients_on(model.training):
        return DynamoExporter().export(cast(Any, model), dict(example), config).program


@contextmanager
def _masks_at_once() -> Iterator[None]:
    """transformers makes some masks by a function that is called for each element (torch.vmap), which a trace cannot
    hold. Its exporters to other formats call it once for all elements; so does this trace, by their patch, and indexes
    whole tensors as such, not as torch does for single elements."""
    from transformers import masking_utils
    from transformers.exporters import utils

    made = [patch for _, name, patch in utils._PATCHES["onnx"] if name == "_vmap_expansion_sdpa"]
    patches: list[Any] = [(masking_utils, "_vmap_expansion_sdpa", patch) for patch in made]
    with utils.patch_attributes([*patches, (masking_utils, "TransformGetItemToIndex", lambda _: nullcontext)]):
        yield


@contextmanager
def _idle_moves() -> Iterator[None]:
    """A module told to go to the dtype and device it has stays as it is: a trace cannot exchange its parameters."""
    module: Any = nn.Module  # the method that stands in has one signature for all of its overloads
    move, parse = module.to, cast(Any, torch._C)._nn._parse_to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, layout = parse(*args, **kwargs)
        held = [*self.parameters(), *self.buffers()]
        at_home = all(device is None or value.device == torch.device(device) for value in held)
        changes = any(value.is_floating_point() and value.dtype != (dtype or value.dtype) for value in held)
        return self if at_home and not changes and layout is None else move(self, *args, **kwargs)

    module.to = to
    try:
        yield
    finally:
        module.to = move


@contextmanager
def gradients_on(wanted: bool) -> Iterator[None]:
    """Trace as training runs. transformers' exporter turns gradients off, and then the regions in which the model
    itself turns them off leave no mark: their weights would train."""
    export = torch.export.export

    def with_gradients(*args: Any, **kwargs: Any) -> ExportedProgram:
        with torch.enable_grad():
            return export(*args, **kwargs)

    torch.export.export = with_gradients if wanted else export
    try:
        yield
    finally:
        torch.export.export = export


def _fixed(exported: ExportedProgram, shapes: Any) -> dict[str, set[int]]:
    """The axes that were to stay free and got the size of the example, of each input that has any."""
    wanted = {name: axes for name, axes in (shapes or {}).items() if name not in FLAGS}
    found: dict[str, set[int]] = {}
    for (name, axes), node in zip(leaves_of(wanted, is_axes).items(), input_nodes(exported), strict=False):
        value = node.meta.get("val")
        sizes: Any = value.shape if isinstance(value, Tensor) else ()
        for axis in axes or ():
            if sizes and is_concrete_int(sizes[axis]):
                found.setdefault(name, set()).add(axis)
    return found


def _check_free(exported: ExportedProgram, shapes: Any, example: Mapping[str, Any]) -> None:
    """Refuse a trace in which a dimension that was to stay free got the size of the example."""
    leaves = leaves_of(example)
    for name, axes in _fixed(exported, shapes).items():
        axis = min(axes)
        size = leaves[name].shape[axis]
        raise RuntimeError(f"the model's code fixes dimension {axis} of input {name!r} to {size}")


def _without(shapes: Any, fixed: Mapping[str, set[int]]) -> Any:
    """``shapes`` where no axis of ``fixed`` is free but a batch."""
    leaves = leaves_of(shapes, is_axes)
    free = [
        axes and {axis: dim for axis, dim in axes.items() if axis == 0 or axis not in fixed.get(name, ())}
        for name, axes in leaves.items()
    ]
    return pytree.tree_unflatten(free, pytree.tree_structure(dict(shapes), is_leaf=is_axes))


def _capture_error(model: nn.Module, error: Exception) -> CaptureError:
    text = str(error)
    user_frames = re.findall(r'File "([^"]*(?:transformers/models|/)[^"]*\.py)", line (\d+), in (\w+)', text)
    where = ""
    traceback = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if code.co_name == "forward" and "/torch/" not in code.co_filename:
            where = f" at {code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    if not where and user_frames:
        where = f" at {user_frames[-1][0]}:{user_frames[-1][1]}"
    failed = "converted" if "ONNX" in text else "captured"
    return CaptureError(f"{type(model).__name__} cannot be {failed}{where}: {_reason(error)}; {_advice(text)}")


#: What helps, by what the tracer says; the first that it says counts.
_ADVICE = {
    "data-dependent": "a graph cannot branch on values: choose a config or example inputs of your own that do not",
    "fixes dimension": "its code computes with that size as a number: dynamic=False captures it for this size alone",
    "padding token": "set model.config.pad_token_id",
    "ONNX": "what is no ONNX needs no conversion: a checkpoint (hf), or a graph without a cache (pt2)",
    "": "try dynamic=False, example inputs of your own, or attn_implementation='eager'",
}


def _advice(text: str) -> str:
    return next(advice for sign, advice in _ADVICE.items() if sign in text)


def _reason(error: BaseException) -> str:
    """One line that says why a tracer or converter failed: the innermost cause, which says what, not where to look."""
    while type(error).__name__ == "ConversionError" and error.__cause__ is not None:
        error = error.__cause__
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in str(error).splitlines()]
    said = [line for line in lines if line]
    guard = next((line for line in said if "guard" in line.lower() or "constraint" in line.lower()), "")
    return f"{type(error).__name__}: {guard[:300] or ' '.join(said)[:300]}".removesuffix(".").removesuffix(": ")
