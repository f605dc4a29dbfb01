"""Anything that computes a model's outputs as a runner: programs, modules, and every kind of folder."""

from __future__ import annotations

import copy
import inspect
import logging
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..files.folder import Manifest, find_manifest, read_manifest
from ..frontend.capture import capture
from ..graph.precision import coarsest
from ..graph.tree import named_tensors
from ..models.checkpoint import open_model
from ..models.eager import in_mode
from ..models.examples import example_inputs
from ..models.hub import local_folder
from ..parity.inputs import InputSpec, specs_of
from ..parity.runner import LABELS, PROVIDERS, Place, Runner, program_runner
from ..public import Program
from ..training.module import RewrittenModel
from .decoder import is_decoder, open_decoder
from .encoder_decoder import is_encoder_decoder, open_encoder_decoder

_log = logging.getLogger(__name__)


def open_runner(
    source: Any,
    provider: str = "cpu",
    threads: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    label: str | None = None,
    by_block: bool = False,
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
        label: its name; the path or the class by default
        by_block: of a program, have the tensors of one block at a time in memory; of a graph in ONNX, leave its weights
            in their file, for which ONNX Runtime has to optimise nothing
        sealed: refuse a folder that lorafx did not finish writing
        trust_remote_code: whether code that comes with a folder may run: a checkpoint's own, that in a pickled .pt2
        allow_pickle: whether weights in ``.bin`` files may be read
        base: where a run's base checkpoint is now, if it was moved

    Raises:
        ArtifactError: the folder is not a model, is incomplete, was changed since lorafx wrote it, or cannot be opened
        UsageError: a program without weights, a provider that is not there, an exported model in another ``dtype``, a
            folder with code that is not trusted
    """
    if provider not in PROVIDERS:
        raise UsageError(f"unknown provider {provider!r}; known: {', '.join(PROVIDERS)}")
    place = Place(provider, threads or torch.get_num_threads(), dtype, by_block)
    if isinstance(source, Program):
        return program_runner(source, place, label or f"{source.name} program")
    if isinstance(source, nn.Module):
        return _of_module(source, place, label or type(_inner(source)).__name__)
    if not isinstance(source, (str, PathLike)):
        raise UsageError(f"cannot run {type(source).__name__}; give a program, a module or a folder")
    opening = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    folder = local_folder(source, allow_pickle=allow_pickle)
    return _of_folder(folder, place, label or str(source), sealed, opening, base)


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
        return program_runner(program or capture(inner), place, label, kind)
    device, config = place.device(), getattr(inner, "config", None)
    devices = {value.device.type for _, value in named_tensors(module)}
    if "meta" in devices:
        raise UsageError(f"{label}: on the meta device, so it computes nothing; load its weights")
    if devices - {device.type}:
        module = copy.deepcopy(module).to(device)
    specs = _specs(inner, folder) if program is None else specs_of(program.example, config)
    known = inspect.signature(inner.forward).parameters
    fixed = {"use_cache": False} if "use_cache" in known and program is None else {}

    def call(inputs: dict[str, Any]) -> Any:
        taken = {name: value for name, value in inputs.items() if name in known}
        with in_mode(module, training=False):
            return module(**taken, **fixed)

    lowest = coarsest(value.dtype for value in module.parameters())
    of = f"torch {place.provider}"
    return Runner(
        label, kind, of, place.threads, lowest, specs, call, config, folder, fresh, optional=frozenset(known) - {LABELS}
    )


def _specs(module: nn.Module, folder: Path | None) -> tuple[InputSpec, ...]:
    """What a model takes; empty where that is not known: the other side of a comparison may say it."""
    config = getattr(module, "config", None)
    try:
        return specs_of(example_inputs(module, folder), config) if config is not None else ()
    except UsageError as error:
        _log.debug("%s", error)
        return ()


def _of_folder(
    folder: Path, place: Place, label: str, sealed: bool, opening: dict[str, Any], base: str | PathLike[str] | None
) -> Runner:
    """A folder that lorafx wrote is held to its manifest, each byte: files are hashed beside the opening, or before
    it where code that comes with them may run."""
    manifest = find_manifest(folder) if sealed or not folder.is_dir() else None
    if manifest is None or manifest.kind == "run":  # a run is held to it as it is loaded
        return _opened(folder, manifest, place, label, opening, base)
    with ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(read_manifest, folder, hashes=True)
        if opening["trust_remote_code"]:
            hashed.result()
        try:
            return _opened(folder, manifest, place, label, opening, base)
        finally:
            hashed.result()  # what was changed explains an error better than what it led to


def _opened(
    folder: Path,
    manifest: Manifest | None,
    place: Place,
    label: str,
    opening: dict[str, Any],
    base: str | PathLike[str] | None,
) -> Runner:
    if is_decoder(folder):
        return open_decoder(folder, place, label, opening["trust_remote_code"])
    if is_encoder_decoder(folder):
        return open_encoder_decoder(folder, place, label, opening["trust_remote_code"])
    if (folder / "export.json").is_file():
        from .exported import open_exported

        return open_exported(folder, place, label, opening["trust_remote_code"])
    if manifest is not None and manifest.kind == "run":
        from ..frontend.load import load

        return program_runner(load(folder, base=base, **opening), place, label, "run")
    trusted = {"trust_remote_code": True} if opening["trust_remote_code"] else {}
    model, fresh = open_model(folder, None, trusted, allow_pickle=opening["allow_pickle"])
    kind = "checkpoint" if manifest is None else "folded"
    return _of_module(model, place, label, kind, folder, fresh)
