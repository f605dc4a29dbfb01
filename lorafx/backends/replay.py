"""Rewriting between transformers' capture and its conversion: the exporters that replay a program's history.

ONNX needs other traces than training, so each back end captures the model its own way; a program's passes run again on
that capture and take the program's values, which keeps all of the back end's fixes and fusions.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from transformers.exporters.configs import DynamoConfig, OnnxConfig
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.exporters.exporter_onnx import OnnxExporter

from ..base import passes_of
from ..deferred.programs import deferring, is_deferring
from ..errors import CaptureError
from ..frontend.capture import program_from
from ..frontend.trace import gradients_on, trace_with
from ..graph.program import Source, structure
from ..graph.rows import read_rows
from ..graph.tree import get_tensor, has_tensor, named_tensors, put_tensor
from ..models.intact import intact
from ..pipeline import run, to_eval
from ..public import Program
from .late_weights import StandIns

aten = torch.ops.aten


class RewritingExporter(DynamoExporter):
    """A :class:`DynamoExporter` that replays a program's history between capture and conversion.

    Combine it with a back end by cooperative inheritance: ``class X(OnnxExporter, RewritingExporter)`` — the back end's
    own ``export_program`` then calls this one where it would have called the plain capture.
    """

    def __init__(self, program: Program, stand_ins: StandIns | None = None):
        super().__init__()
        self.rewritten = program
        self.stand_ins = stand_ins or StandIns()

    def export_program(self, model: Any, sample_inputs: Any, config: Any) -> tuple[ExportedProgram, Any]:
        """Capture ``model`` (the program's source, or a component of it) and rewrite the capture."""
        with gradients_on(True):  # as the program was captured, so that both have the same weights to rewrite
            captured, metadata = super().export_program(model, sample_inputs, config)
        rewritten = self._rewrite(captured, model, sample_inputs, config)
        if isinstance(config, OnnxConfig):
            _lay_out(rewritten)
        return rewritten, metadata

    def _rewrite(self, captured: ExportedProgram, model: nn.Module, inputs: Any, config: Any) -> ExportedProgram:
        root = self.rewritten.source.model
        names = {id(value): name for name, value in named_tensors(root)}
        if not only_values_differ(self.rewritten):
            return self.replayed(captured, model, names, inputs, config)
        local = {names.get(id(value), name): name for name, value in named_tensors(model)}
        valued = _with_values(captured, self.rewritten, local)
        valued.state_dict.update(self.stand_ins.of(valued.state_dict, _read(valued)))
        module: Any = valued.module(check_guards=False)
        if not self.narrowed(module.graph, config):
            return valued
        module.recompile()
        return torch.export.export(module, (), dict(inputs), dynamic_shapes=config.dynamic_shapes)

    def narrowed(self, graph: fx.Graph, config: Any) -> int:
        """Make a graph compute less before it is converted, in place; returns how many nodes do. Here: none."""
        return 0

    def replayed(
        self, captured: ExportedProgram, model: nn.Module, names: Mapping[int, str], inputs: Any, config: Any
    ) -> ExportedProgram:
        """The capture with the program's history replayed on it; ``names`` are those of the program's tensors by id."""
        base = program_from(captured, Source(model), inputs, names)
        base.source, base.heads = self.rewritten.source, self.rewritten.heads
        replayed = replay(self.rewritten, base, whole=model is self.rewritten.source.model)
        unlifted: Any = captured.module(check_guards=False)
        module = fx.GraphModule(replayed.root, replayed.graph)
        module.graph.set_codegen(unlifted.graph._codegen)
        self.narrowed(module.graph, config)
        module.recompile()
        return torch.export.export(module, (), dict(inputs), dynamic_shapes=config.dynamic_shapes)


def _lay_out(exported: ExportedProgram) -> None:
    """Give complex numbers a new axis by their real parts, in place: of the operators that Llama 4 rotates with, it is
    the one that torch's converter has for real numbers alone."""
    graph = exported.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=aten.unsqueeze.default):
        source, axis = node.args
        if not node.meta["val"].is_complex():
            continue
        with graph.inserting_before(node):
            parts = graph.call_function(aten.view_as_real.default, (source,))
            parts.meta["val"] = torch.view_as_real(source.meta["val"])
            wide = graph.call_function(aten.unsqueeze.default, (parts, axis if axis >= 0 else axis - 1))
            wide.meta["val"] = torch.view_as_real(node.meta["val"])
        node.target, node.args = aten.view_as_complex.default, (wide,)
    exported.graph_module.recompile()


# The back end's methods stand for their base's, over another kind of program: that is how transformers declares them.
class RewritingOnnxExporter(OnnxExporter, RewritingExporter):  # pyright: ignore[reportIncompatibleMethodOverride]
    """transformers' ONNX exporter over the rewritten graph: its patches before, its conversion and fusions after."""

    def narrowed(self, graph: fx.Graph, config: Any) -> int:
        """Compute only the tokens that are read; with CUDA from the last attention on, which is one operator there."""
        return read_rows(graph, through_attention=config.ort_fusions != "cuda")


def replay(program: Program, base: Program, *, whole: bool = True) -> Program:
    """Apply ``program``'s history to ``base``, another capture of the same model, and give it ``program``'s values.

    Passes after training (folding, removing dead channels) run on the trained values, which decide what they do.
    ``whole`` says that ``base`` is the whole model, not a component of it. Raises CaptureError when a pass then inserts
    other tensors than it did in ``program``, or leaves others behind.
    """
    trained = program.origin or program
    trained = deferring(trained) if is_deferring(program) else trained
    steps = passes_of(program)
    result = run(base, steps[: len(trained.history)], check=False)
    for applied, again in zip(trained.history, result.history, strict=True):
        ours = {name for inserted in applied.inserted for name in inserted.tensors.values()}
        theirs = {name for inserted in again.inserted for name in inserted.tensors.values()}
        if theirs - ours or (whole and ours - theirs):
            odd = sorted(ours ^ theirs)[0]
            raise CaptureError(f"{applied.step.pass_name()}: {odd} is not in both captures of {program.name}")
    _take_values(result, trained)
    if program.origin is not None:
        result = run(result, steps[len(trained.history) :], check=False)
        _take_values(result, program)
    return result


def _take_values(result: Program, program: Program) -> None:
    """Give ``result`` the values ``program`` has under the same names; CaptureError where their shapes differ.

    Tensors that ``program`` no longer reads have no values to give: those of a sublayer removed from its graph, while
    ``result`` still passes its keys and values to a cache, after the same folding.
    """
    without = {*program.names("constant"), *program.names("unread")}
    shared: dict[int, torch.Tensor] = {}
    for name, value in named_tensors(program.root):
        if name in without or not has_tensor(result.root, name):
            continue
        slot = get_tensor(result.root, name)
        if slot.shape != value.shape:
            shapes = f"{tuple(slot.shape)} and {tuple(value.shape)}"
            raise CaptureError(f"{name} has two shapes, {shapes}, in two captures of {program.name}; export it as pt2")
        put_tensor(result.root, name, shared.setdefault(id(value), _cast(value, slot)))  # a tied one stays tied


def _cast(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if value.dtype == like.dtype or not value.is_floating_point():
        return value
    cast = value.detach().to(like.dtype)
    return nn.Parameter(cast, requires_grad=False) if isinstance(value, nn.Parameter) else cast


def only_values_differ(program: Program) -> bool:
    """Whether ``program`` computes what was captured with other values in its tensors, as after merging adapters."""
    if program.captured is None or program.config_changes:
        return False
    return structure(program.graph) == structure(to_eval(program.captured).graph)


def _with_values(captured: ExportedProgram, program: Program, local: Mapping[str, str]) -> ExportedProgram:
    """The capture with the program's values; it needs no second trace."""
    shared: dict[int, torch.Tensor] = {}
    for name, value in named_tensors(program.root):
        slot = captured.state_dict.get(local.get(name, name))
        if slot is not None:
            captured.state_dict[local.get(name, name)] = shared.setdefault(id(value), _cast(value, slot))
    return captured


def _read(captured: ExportedProgram) -> Iterator[str]:
    """The names of the parameters that a capture reads."""
    names = captured.graph_signature.inputs_to_parameters
    for node in captured.graph.find_nodes(op="placeholder"):
        if node.users and node.name in names:
            yield names[node.name]


@contextmanager
def exportable(program: Program, dtype: torch.dtype | None, stand_ins: StandIns | None = None) -> Iterator[nn.Module]:
    """The eager model in evaluation mode, put back afterwards. Where another dtype is asked for, a converted copy: with
    ``stand_ins`` for its matrices if the program's are computed later."""
    model = program.source.model
    if dtype is not None and stand_ins is not None and is_deferring(program):
        yield stand_ins.hollow(model, dtype).eval()
        return
    if dtype is not None:
        yield copy.deepcopy(model).to(dtype).eval()
        return
    with intact(model):
        yield model.eval()


def with_model(program: Program, model: nn.Module) -> Program:
    """The program as one of ``model``, its own or a converted copy of it."""
    return dataclasses.replace(program, source=dataclasses.replace(program.source, model=model))


def converted(program: Program, kind: str, provider: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """A folded (or evaluation-form) program as transformers' ``ExportedModel``, not written yet; see :func:`export`."""
    # The converter prints its progress to stdout, which is kept for results.
    with redirect_stdout(sys.stderr), exportable(program, dtype) as model:
        target = with_model(program, model)

        def attempt(shapes: Any) -> Any:
            exporter, config = _back_end(target, kind, provider, shapes, free=shapes is not None)
            return exporter.export(model, dict(program.example), config)

        shapes = program.signature.domain.dynamic_shapes(program.example)
        return trace_with(attempt, model, shapes)


def _back_end(program: Program, kind: str, provider: str, shapes: Any, *, free: bool) -> tuple[Any, Any]:
    if kind == "onnx":
        config = OnnxConfig(dynamic=free, dynamic_shapes=shapes, ort_fusions=cast(Any, provider))
        return RewritingOnnxExporter(program), config
    return RewritingExporter(program), DynamoConfig(dynamic=free, dynamic_shapes=shapes)
