"""Traces that tests share: a model that is captured or exported again, with other weights or by another command, is
traced once for each.

What decides a trace is asked of the model itself: the classes of its modules and their code, every attribute of theirs,
the form of their tensors, and the example. A model that has anything else in it is traced each time, as are those whose
trace says more than its graph (functions with gradients of their own, noise). Every capture is judged against its model
all the same, and every export against its program. The tests of tracing have no part in this: ``tests/frontend``.
"""

from __future__ import annotations

import copy
import enum
import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo_config
from torch.export import Dim, ExportedProgram
from transformers import Cache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.exporters.base import HfExporter
from transformers.exporters.exporter_dynamo import DynamoExporter

from lorafx.backends.replay import RewritingExporter
from lorafx.frontend import capture, trace
from lorafx.graph.tree import named_tensors, tensor_hash

#: How many traces of either kind are kept, each of a few megabytes.
KEPT = 48

Attempt = Callable[[nn.Module, Mapping[str, Any], Any], tuple[ExportedProgram | None, set[str]]]

_kept: OrderedDict[Any, ExportedProgram] = OrderedDict()
#: Those that exports begin with: of the model in evaluation, patched for the format.
_exports: OrderedDict[Any, ExportedProgram] = OrderedDict()
#: Of the captures under way, what was laid open.
_used: list[set[str]] = []
#: Where a module keeps what is told of apart, and what a call leaves there.
_APART = ("_parameters", "_buffers", "_modules", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks")
_APART += ("_forward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
_APART += ("_load_state_dict_post_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_APART += ("_forward_pre_hooks_with_kwargs", "_is_full_backward_hook", "_is_hf_initialized")
#: What a config says of where it lay.
_PLACE = ("name_or_path", "_name_or_path", "_commit_hash", "transformers_version")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum)
_FUNCTIONS = (types.FunctionType, staticmethod, classmethod, property)
_CODE = (types.FunctionType, types.BuiltinFunctionType, type)


class _Unknown(Exception):  # noqa: N818  (no error: the model is traced)
    """Something that cannot be told from another."""


@contextmanager
def traced_once() -> Iterator[None]:
    """Within it a model that was traced is not traced again."""
    attempt, laid_open = trace._attempt, capture.functions_laid_open

    @contextmanager
    def noted() -> Iterator[set[str]]:
        with laid_open() as used:
            _used.append(used)
            try:
                yield used
            finally:
                _used.pop()

    component, program = HfExporter._export_component, DynamoExporter.export_program
    trace._attempt, capture.functions_laid_open = functools.partial(_once, attempt), noted
    HfExporter._export_component, DynamoExporter.export_program = _named(component), _exported_once(program)
    try:
        yield
    finally:
        trace._attempt, capture.functions_laid_open = attempt, laid_open
        HfExporter._export_component, DynamoExporter.export_program = component, program


def _once(attempt: Attempt, model: nn.Module, example: Mapping[str, Any], shapes: Any) -> Any:
    if not isinstance(model, PreTrainedModel):  # those of tests are each their own
        return attempt(model, example, shapes)
    try:
        key = _key(model, example, shapes)
    except _Unknown:
        return attempt(model, example, shapes)
    tensors = dict(named_tensors(model))
    if key not in _kept:
        exported, noisy = attempt(model, example, shapes)
        if exported is None or noisy or not _used or _used[-1]:
            return exported, noisy
        _keep(_kept, key, _with_tensors(exported, dict.fromkeys(tensors)))
        return exported, noisy
    _kept.move_to_end(key)
    return _with_tensors(_kept[key], tensors), set()


def _keep(kept: OrderedDict[Any, ExportedProgram], key: Any, exported: ExportedProgram) -> None:
    kept[key] = exported
    while len(kept) > KEPT:
        kept.popitem(last=False)


def _with_tensors(exported: ExportedProgram, tensors: Mapping[str, Any]) -> ExportedProgram:
    """The trace with a model's tensors in the place of those it was made with."""
    result = copy.copy(exported)
    result._state_dict = {name: tensors[name] for name in exported.state_dict}
    result._constants = {name: tensors.get(name, value) for name, value in exported.constants.items()}
    return result


# ---- exports


def _named(component: Any) -> Any:
    """``HfExporter._export_component`` that first notes what decides its trace: the exporter patches the model then."""

    @functools.wraps(component)
    def export(self: Any, model: Any, inputs: Any, config: Any) -> Any:
        vars(self)["decides"] = None
        if isinstance(self, RewritingExporter) and isinstance(model, PreTrainedModel):
            options = {name: value for name, value in vars(config).items() if name != "dynamic_shapes"}
            try:
                how = type(self), type(config), _told(options, {})
                vars(self)["decides"] = how, _key(model, _whatever_is_generated(inputs), config.dynamic_shapes)
            except _Unknown:
                pass
        return component(self, model, inputs, config)

    return export


def _whatever_is_generated(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs of a decode graph without the tokens that the model's own weights chose: a trace sees no values."""
    if not any(isinstance(value, Cache) for value in inputs.values()):
        return inputs
    return {name: torch.zeros_like(value) if name == "input_ids" else value for name, value in inputs.items()}


def _exported_once(program: Any) -> Any:
    """``DynamoExporter.export_program`` that takes a trace which is kept for the one it would make."""

    @functools.wraps(program)
    def export(self: Any, model: Any, inputs: Any, config: Any) -> Any:
        key, plain = vars(self).get("decides"), torch.export.export
        if key is None:
            return program(self, model, inputs, config)

        def once(module: nn.Module, args: Any = (), kwargs: Any = None, **options: Any) -> ExportedProgram:
            tensors = dict(named_tensors(module))
            if key in _exports:
                _exports.move_to_end(key)
                with torch.no_grad():  # the exporter names outputs as they are computed, traced or not
                    module(*args, **copy.deepcopy(kwargs))
                result = _with_tensors(_apart(_exports[key]), tensors)
                result._example_inputs = args, kwargs
                return result
            exported = plain(module, args=args, kwargs=kwargs, **options)
            if not any(isinstance(part, fx.GraphModule) for part in exported.graph_module.children()):
                _keep(_exports, key, _with_tensors(_apart(exported), dict.fromkeys(tensors)))
            return exported

        torch.export.export = once
        try:
            return program(self, model, inputs, config)
        finally:
            torch.export.export = plain

    return export


def _apart(exported: ExportedProgram) -> ExportedProgram:
    """A trace whose graph and signature can be changed alone; what is noted of its nodes is the same."""
    result, module = copy.copy(exported), exported.graph_module
    graph = copy.deepcopy(module.graph)
    for node, like in zip(graph.nodes, module.graph.nodes, strict=True):
        node.name = like.name  # by which the signature knows it; a copy names some anew
    result._graph_module = fx.GraphModule(module, graph)
    result._graph_module.meta.update(module.meta)
    result._graph_signature = copy.deepcopy(exported.graph_signature)
    result._module_call_graph = copy.deepcopy(exported.module_call_graph)
    result._range_constraints = dict(exported.range_constraints)
    return result


# ---- what decides a trace


def _key(model: nn.Module, example: Mapping[str, Any], shapes: Any) -> Any:
    modules = {id(module): path for path, module in model.named_modules(remove_duplicate=False)}
    tensors: dict[int, int] = {}
    settings = torch.get_default_dtype(), torch.is_grad_enabled(), dynamo_config.fake_tensor_cache_enabled
    parts = [*model.named_modules(remove_duplicate=False)]
    kinds = dict.fromkeys(kind for module in model.modules() for kind in type(module).__mro__)
    named = [*named_tensors(model)]
    return (
        settings,
        tuple(map(_code, kinds)),
        tuple((path, _module(module, modules)) for path, module in parts),
        tuple((name, tensors.setdefault(id(value), len(tensors)), _form(value)) for name, value in named),
        tuple((name, _input(value, modules)) for name, value in example.items()),
        _told(shapes, modules),
    )


def _module(module: nn.Module, modules: Mapping[int, str]) -> Any:
    if any(getattr(module, name) for name in _HOOKS):
        raise _Unknown
    held = {name: value for name, value in vars(module).items() if name not in (*_APART, *_PLACE)}
    return type(module), _told(held, modules)


def _code(kind: type) -> Any:
    """A class, and what it and its file call functions now: tests put others in their place."""
    spaces = vars(kind), vars(sys.modules.get(kind.__module__, types))
    return kind, tuple(value for space in spaces for value in space.values() if isinstance(value, _FUNCTIONS))


def _form(value: Tensor) -> Any:
    if type(value) not in (Tensor, nn.Parameter) or value._backward_hooks:
        raise _Unknown
    return value.shape, value.stride(), value.dtype, value.device, value.requires_grad, type(value), value.layout


def _input(value: Any, modules: Mapping[int, str]) -> Any:
    if isinstance(value, (Cache, CacheLayerMixin)):
        return type(value), tuple((name, _input(held, modules)) for name, held in vars(value).items())
    if isinstance(value, list):
        return list, tuple(_input(held, modules) for held in value)
    if not isinstance(value, Tensor):
        return _told(value, modules)
    return _form(value), None if value.is_meta else tensor_hash(value)


def _told(value: Any, modules: Mapping[int, str]) -> Any:
    """A value as something that equals that of its like alone."""
    if isinstance(value, (PreTrainedConfig, GenerationConfig)):
        return type(value), _told({name: held for name, held in vars(value).items() if name not in _PLACE}, modules)
    if isinstance(value, Mapping):
        return type(value), tuple((_told(key, modules), _told(held, modules)) for key, held in value.items())
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value), tuple(_told(held, modules) for held in value)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_told(held, modules) for held in value)
    if isinstance(value, nn.Module) and id(value) in modules:
        return "module", modules[id(value)]
    if isinstance(value, functools.partial):
        return "partial", _told([value.func, value.args, value.keywords], modules)
    if isinstance(value, types.MethodType):
        return "method", value.__func__, _told(value.__self__, modules)
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, Dim):
        return "dimension", value.__name__, str(value.min), str(value.max)
    if isinstance(value, type(Dim.AUTO)):
        return "free", repr(value)
    if isinstance(value, _CODE):
        return value
    raise _Unknown
