"""Ordinary transformers checkpoints: the model class and the config that say a program's shapes, if there are any."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
import transformers
from torch import nn

from ..errors import UsageError, first_line
from ..graph.facts import Gathered
from ..graph.program import Program
from ..graph.tree import named_tensors
from ..models.layered import is_layered, own_configs
from .depth import Shallower, computes
from .sizes import Shapes, of_config, settings_for, with_settings

_log = logging.getLogger(__name__)

#: Where PEFT keeps the module that an adapter stands around, and one that it trained in full.
_TRAINED = ".modules_to_save."
_WRAPPER = re.compile(r"\.base_layer(?=\.)|\.original_module(?=\.)|\.modules_to_save\.[^.]+(?=\.)")


def hf_model(program: Program, dtype: torch.dtype | None = None) -> nn.Module:
    """The program as an ordinary transformers model, in another ``dtype`` if one is given.

    UsageError when its config cannot say the program's shapes. Deferred tensors stay deferred.
    """
    source = program.source.model
    if not hasattr(source, "save_pretrained"):
        raise UsageError(f"{program.name} is not a transformers model; export it as onnx or pt2")
    unknown = [name for name in program.names("adapter", "gate", "statistic") if name != "clock"]
    if unknown:
        raise UsageError(f"a checkpoint cannot hold {unknown[0]}; fold the program first, or export it as onnx or pt2")
    gathered = Gathered.noted(program)
    if gathered:
        raise UsageError(
            f"a checkpoint cannot hold {gathered[0].weight}, which was left with the columns it uses; fold with "
            'gather-columns at when = "never" (fold(program, gather="never")), or export it as onnx or pt2'
        )
    held = {**dict(source.named_buffers(remove_duplicate=False)), **dict(named_tensors(program.root))}
    values = _unwrapped(held, program)
    before = {name: slot.shape for name, slot in _unwrapped(dict(named_tensors(source)), program).items()}
    less = Shallower.of(program)
    if less is not None:
        model = _shallower(program, less, values, before, dtype)
        if model is not None:
            return model
    return _filled(_model_of_shapes(program, values, program.config, before), values, dtype)


def _shallower(
    program: Program, less: Shallower, values: Mapping[str, torch.Tensor], before: Shapes, dtype: torch.dtype | None
) -> nn.Module | None:
    """The model with fewer layers; None where its class gives something else then."""
    fewer, old = less.renumbered(values), less.renumbered(before)
    try:
        model = _model_of_shapes(program, fewer, less.config(program.config), old, less)
        if computes(_filled(model, fewer, None), program):
            return _filled(model, fewer, dtype)
    except Exception as error:  # each class checks its config, and its inputs, in its own way
        _log.debug("no checkpoint with fewer layers: %s", first_line(error))
    return None


def _filled(model: nn.Module, values: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> nn.Module:
    shared: dict[int, torch.Tensor] = {}
    for name, _ in list(named_tensors(model)):
        value = shared.setdefault(id(values[name]), _as_parameter(values[name], dtype))
        _assign(model, name, value)
    return model.eval()


def _unwrapped(values: Mapping[str, torch.Tensor], program: Program) -> dict[str, torch.Tensor]:
    """The tensors under the names that the model's class has for them. Another library's adapters, captured with the
    model, keep what they adapt in a module inside their own; of a module that they trained in full, the trained copy
    counts."""
    if not program.source.adapters:
        return dict(values)
    plain = {name: _WRAPPER.sub("", name) for name in values}
    trained = {new: values[name] for name, new in plain.items() if _TRAINED in name}
    return {new: trained.get(new, values[name]) for name, new in plain.items()}


def _model_of_shapes(
    program: Program,
    values: Mapping[str, torch.Tensor],
    config: Any,
    before: Shapes,
    less: Shallower | None = None,
) -> nn.Module:
    """The model's class, without values, under the config that gives the tensors their shapes, which were ``before``
    those that ``config`` says."""
    source = program.source.model
    after = {name: value.shape for name, value in values.items()}
    misfit = ""
    for sizes in settings_for(type(source), config, before, after):
        try:
            model = of_config(type(source), with_settings(config, {**sizes, **program.config_changes}))
        except Exception as error:  # each architecture checks its sizes with errors of its own
            misfit = misfit or first_line(error)
            continue
        found = _misfit(model, values) or _homeless(model, program, less)
        if not found:
            return model
        misfit = misfit or found
    shrunk = any(after.get(name, shape) != shape for name, shape in before.items())
    raise UsageError(
        f"a {type(source).__name__} checkpoint cannot hold this program: {misfit}; {_remedy(program, shrunk=shrunk)}"
    )


def _remedy(program: Program, *, shrunk: bool) -> str:
    """What to do with a program that no checkpoint holds."""
    if not shrunk:  # of a model that something was built into, its class and its config say too little
        return "merge what was built into it before capturing, or export it as onnx or pt2"
    return f"{_made_uniform(program)}export it as onnx or pt2"


def _made_uniform(program: Program) -> str:
    """The advice to fold with uniform widths, to whom has not done so."""
    done = any(getattr(applied.step, "uniform", False) for applied in program.history)
    return "" if done else "fold it with uniform widths (--uniform), or "


def _misfit(model: nn.Module, values: Mapping[str, torch.Tensor]) -> str:
    """The first tensor whose shape is not the architecture's, and both shapes; nothing when all fit."""
    for name, slot in named_tensors(model):
        value = values.get(name)
        if value is None or value.shape != slot.shape:
            found = "nothing" if value is None else f"shape {tuple(value.shape)}"
            return f"{name} is {tuple(slot.shape)} in its architecture, {found} here"
    return ""


def _homeless(model: nn.Module, program: Program, less: Shallower | None) -> str:
    """A tensor that the program reads and the architecture has no place for: a bias that an adapter brought, say."""
    places = dict(named_tensors(model))
    for node in program.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        own: str | None = _WRAPPER.sub("", name) if program.source.adapters else name
        own = less.name(own) if less is not None and own is not None else own
        if own not in places and node.users and program.roles.get(name, "constant") not in ("constant", "statistic"):
            return f"its architecture has no {own}"
    return ""


def folded_format(program: Program) -> Literal["hf", "layered", "pt2"]:
    """What a folded program is written as: an ordinary transformers checkpoint; one that says the widths of each layer,
    where the model's class does not read them yet; or where none can hold it a ``.pt2``. The log says why."""
    try:
        model = hf_model(program)
    except UsageError as error:
        _log.warning("%s; written as a .pt2", error)
        return "pt2"
    try:
        refuse_unread(program, model)
    except UsageError as error:
        _log.warning("%s", error)
        return "layered"
    return "hf"


def refuse_unread(program: Program, model: Any) -> None:
    """UsageError when transformers by itself would not build ``model``, which holds ``program``, from its config: the
    widths of its layers differ and its class does not read them layer by layer."""
    if not is_layered(model.config):
        return
    kind, config = type(model), type(model.config)
    with own_configs(model.config):
        said = model.config.to_dict()
    try:
        with torch.device("meta"):
            misfit = _misfit(kind(config.from_dict(said)), dict(named_tensors(model)))
    except Exception as error:  # each class asks its config in its own way
        misfit = first_line(error)
    if misfit:
        raise UsageError(
            f"the layers of this {kind.__name__} have widths of their own, which its class in transformers "
            f"{transformers.__version__} does not read ({misfit.partition('. ')[0]}): {_made_uniform(program)}"
            "write it as layered, which lorafx opens"
        )


def _as_parameter(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    held = value.detach().to(dtype) if dtype is not None and value.is_floating_point() else value.detach()
    return nn.Parameter(held, requires_grad=False) if isinstance(value, nn.Parameter) else held


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    table: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
    table[leaf] = value
