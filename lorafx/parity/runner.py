"""Anything that computes a model's outputs, behind one call: programs, modules, and every kind of folder.

A runner takes a dict of tensors and gives a dict of tensors. It drops inputs its model does not take, fills masks and
token types that were left out, and runs in evaluation mode without gradients. Verification and timing see nothing else.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .capture import capture, example_inputs
from .checkpoint import open_model
from .errors import UsageError
from .folder import find_manifest
from .inputs import InputSpec, specs_of
from .module import RewrittenModel
from .pipeline import to_eval
from .precision import coarsest, recast
from .program import Program
from .segments import compile_graph
from .tree import named_tensors

#: Outputs that are no result of the function compared: a loss needs labels, a cache only saves later work.
_LEFT_OUT = ("loss", "past_key_values")

#: ONNX Runtime's names of the providers.
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class Runner:
    """Computes a model's outputs: ``runner({name: tensor})`` gives ``{name: tensor}``.

    Attributes:
        label: how messages and tables name it
        kind: ``program``, ``module``, ``checkpoint``, ``run``, ``onnx``, …
        provider: what really runs it: ``torch cpu``, ``torch cuda``, or ONNX Runtime's provider
        threads: CPU threads it uses
        dtype: its lowest precision
        inputs: what it takes; empty when it does not say
        config: the Hugging Face config, if there is one
        folder: where its files (and its tokenizer) are, if anywhere
        fresh: parameters that no file held, so that their values are random
        note: what to know about it, e.g. that the provider asked for is not the one that runs it
    """

    label: str
    kind: str
    provider: str
    threads: int
    dtype: torch.dtype
    inputs: tuple[InputSpec, ...]
    call: Callable[[dict[str, Any]], Any] = field(repr=False)
    config: Any = field(default=None, repr=False)
    folder: Path | None = None
    fresh: frozenset[str] = frozenset()
    note: str = ""

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, the loss and the cache left out; UsageError when an input is missing."""
        given = {spec.name: self._input(spec, inputs) for spec in self.inputs} if self.inputs else dict(inputs)
        with torch.no_grad(), _threads(self.threads):
            outputs = self.call(given)
            if self.provider == "torch cuda":
                torch.cuda.synchronize()
        return named_outputs(outputs)

    def _input(self, spec: InputSpec, inputs: Mapping[str, Tensor]) -> Tensor:
        device = "cuda" if self.provider == "torch cuda" else "cpu"
        value = inputs.get(spec.name)
        if value is not None:
            return value.to(device=device, dtype=spec.dtype if value.is_floating_point() else None)
        like = next((other for other in inputs.values() if other.dim() == 2), None)
        if like is None or not (spec.is_mask or spec.name == "token_type_ids"):
            raise UsageError(f"{self.label}: missing input {spec.name!r}; it takes {[s.name for s in self.inputs]}")
        fill = torch.ones_like if spec.is_mask else torch.zeros_like
        return fill(like, dtype=spec.dtype, device=device)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def named_outputs(value: Any, name: str = "") -> dict[str, Tensor]:
    """A model's result as tensors by name: keys of mappings and positions in tuples, joined by dots."""
    if isinstance(value, Tensor):
        return {name or "output": value}
    if isinstance(value, Mapping):
        items = [(str(key), inner) for key, inner in value.items() if key not in _LEFT_OUT]
    elif isinstance(value, (list, tuple)):
        items = [(str(position), inner) for position, inner in enumerate(value)]
    else:
        return {}
    return {
        key: tensor
        for part, inner in items
        for key, tensor in named_outputs(inner, f"{name}.{part}" if name else part).items()
    }


# ---- opening


def open_runner(
    source: Any,
    provider: str = "cpu",
    threads: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    label: str | None = None,
    sealed: bool = True,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    base: str | PathLike[str] | None = None,
) -> Runner:
    """A runner for a Program, an ``nn.Module``, or a folder: a checkpoint, a run, a folded model, an exported model.

    Args:
        provider: ``cpu`` or ``cuda``
        threads: CPU threads; torch's current number when None
        dtype: compute in this dtype; a checkpoint or a module is then captured, so that the whole graph is converted
        label: how to name it; the path or the class by default
        sealed: refuse a folder lorafx began to write and did not finish
        trust_remote_code: whether code that comes with a folder may run: a checkpoint's own, that in a pickled .pt2
        allow_pickle: whether weights in ``.bin`` files may be read
        base: where a run's base checkpoint is now, if it was moved

    Raises:
        ArtifactError: the folder is no model, incomplete, or cannot be opened
        UsageError: a program without weights, a provider that is not there, an exported model in another ``dtype``, a
            folder with code that is not trusted
    """
    if provider not in PROVIDERS:
        raise UsageError(f"unknown provider {provider!r}; known: {', '.join(PROVIDERS)}")
    place = Place(provider, threads or torch.get_num_threads(), dtype)
    if isinstance(source, Program):
        return _of_program(source, place, label or f"{source.name} program")
    if isinstance(source, nn.Module):
        return _of_module(source, place, label or type(_inner(source)).__name__)
    if not isinstance(source, (str, PathLike)):
        raise UsageError(f"cannot run {type(source).__name__}; give a program, a module or a folder")
    opening = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    return _of_folder(Path(source), place, label or str(source), sealed, opening, base)


@dataclass(frozen=True)
class Place:
    """Where and in which precision to run."""

    provider: str
    threads: int
    dtype: torch.dtype | None

    def device(self) -> torch.device:
        """torch's device; UsageError when it is not there."""
        if self.provider == "cuda" and not torch.cuda.is_available():
            raise UsageError("no CUDA device here; run on the CPU (provider cpu)")
        return torch.device(self.provider)


def _of_program(program: Program, place: Place, label: str, kind: str = "program") -> Runner:
    if program.device.type == "meta":
        raise UsageError(f"{label}: captured without weights, so it computes nothing; capture it with meta=False")
    evaluation = to_eval(program)
    device = place.device()
    if place.dtype is not None or program.device != device:
        evaluation = recast(evaluation, place.dtype, device)
    graph, root = compile_graph(evaluation.graph), evaluation.root
    constants = {name: value for name, value in program.example.items() if not isinstance(value, Tensor)}

    def call(inputs: dict[str, Any]) -> Any:
        flat = graph(root, evaluation.flatten({**constants, **inputs}))
        return pytree.tree_unflatten(flat, evaluation.signature.out_spec)

    return Runner(
        label,
        kind,
        f"torch {place.provider}",
        place.threads,
        place.dtype or coarsest(value.dtype for value in root.parameters()),
        _graph_specs(evaluation),
        call,
        program.config,
        Path(program.source.path) if program.source.path is not None else None,
    )


def _graph_specs(program: Program) -> tuple[InputSpec, ...]:
    """What a program takes: the axes that are free in its graph, and the sizes they may have."""
    domain = program.signature.domain
    specs = []
    for spec in specs_of(program.example, program.config):
        shape = domain.shapes.get(spec.name)
        if shape is not None:
            sizes = tuple(size if isinstance(size, int) else None for size in shape)
            ranges = {axis: domain.bounds(spec.name, axis) for axis, size in enumerate(sizes) if size is None}
            spec = dataclasses.replace(spec, sizes=sizes, ranges=ranges)
        specs.append(spec)
    return tuple(specs)


# ---- modules


def _inner(module: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile and PEFT."""
    compiled: Any = getattr(module, "_orig_mod", module)
    return compiled.get_base_model() if hasattr(compiled, "get_base_model") else compiled


def _of_module(
    module: nn.Module,
    place: Place,
    label: str,
    kind: str = "module",
    folder: Path | None = None,
    fresh: frozenset[str] = frozenset(),
) -> Runner:
    inner = _inner(module)
    program = inner.program if isinstance(inner, RewrittenModel) else None
    if place.dtype is not None:
        return _of_program(program or capture(inner), place, label, kind)
    device, config = place.device(), getattr(inner, "config", None)
    devices = {value.device.type for _, value in named_tensors(module)}
    if "meta" in devices:
        raise UsageError(f"{label}: on the meta device, so it computes nothing; load its weights")
    if devices - {device.type}:
        module = copy.deepcopy(module).to(device)
    if program is not None:
        specs = specs_of(program.example, config)
    else:
        specs = specs_of(example_inputs(inner, folder), config) if config is not None else ()
    known = inspect.signature(inner.forward).parameters
    fixed = {"use_cache": False} if "use_cache" in known and program is None else {}

    def call(inputs: dict[str, Any]) -> Any:
        taken = {name: value for name, value in inputs.items() if name in known}
        with _evaluating(module):
            return module(**taken, **fixed)

    lowest = coarsest(value.dtype for value in module.parameters())
    return Runner(label, kind, f"torch {place.provider}", place.threads, lowest, specs, call, config, folder, fresh)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()] if module.training else []
    if modes:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


# ---- folders


def _of_folder(
    folder: Path, place: Place, label: str, sealed: bool, opening: dict[str, Any], base: str | PathLike[str] | None
) -> Runner:
    manifest = find_manifest(folder) if sealed or not folder.is_dir() else None
    if (folder / "export.json").is_file():
        from .exported import open_exported

        return open_exported(folder, place, label, opening["trust_remote_code"])
    if manifest is not None and manifest.kind == "run":
        from .store import load

        return _of_program(load(folder, base=base, **opening), place, label, "run")
    trusted = {"trust_remote_code": True} if opening["trust_remote_code"] else {}
    model, fresh = open_model(folder, None, trusted, allow_pickle=opening["allow_pickle"])
    kind = "checkpoint" if manifest is None else "folded"
    return _of_module(model, place, label, kind, folder, fresh)
