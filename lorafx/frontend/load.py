"""Opening folders as programs: a run as it was saved, any checkpoint as a new capture."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ArtifactError, LorafxError, UsageError
from ..files.folder import MANIFEST, Manifest, find_manifest, read_manifest
from ..files.places import found_from
from ..formats.peft import adapter_keys
from ..formats.run import INPUTS, RECIPE, VALUES
from ..graph.tree import has_tensor
from ..models.checkpoint import check_safetensors, read_config
from ..models.hub import local_folder
from ..models.identity import has_identity, modified
from ..pipeline import rewrite
from ..public import Program
from ..recipes.recipe import Recipe
from ..reporting.answer import EARLIER
from ..reporting.report import REPORT
from .adapters import Adapters
from .capture import capture

_log = logging.getLogger(__name__)


def load(
    path: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    task: str | None = None,
    num_labels: int | None = None,
    meta: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    check: bool = True,
    adapter: Adapters | None = None,
) -> Program:
    """Open a folder as a program: a run as it was saved; any checkpoint, exported by lorafx or not, as a new capture.

    Args:
        path: the folder, or ``org/name`` on Hugging Face's hub
        base: where a run's base checkpoint is now, if it was moved
        task: as for :func:`lorafx.capture`; a run knows its own
        num_labels: as for :func:`lorafx.capture`
        meta: rebuild on the meta device; a run only if it was saved from there
        allow_pickle: whether weights in ``.bin`` files may be read
        trust_remote_code: whether the model may run code of its own; never read from the folder
        check: compare the capture with the model, and check what the recipe's passes promise
        adapter: as for :func:`lorafx.capture`, over a checkpoint

    Raises:
        ArtifactError: the folder is incomplete or changed, or a run's base is missing or not the one it was made from
        UsageError: the folder holds no program that can be rewritten (an ONNX folder), or an option does not apply to
            it
    """
    allowed: dict[str, Any] = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code, "check": check}
    path = local_folder(path, allow_pickle=allow_pickle)
    manifest = find_manifest(path)
    if manifest is None or manifest.kind == "hf":
        if base is not None:
            raise UsageError(f"{path}: a checkpoint has no base of its own")
        return capture(path, task, num_labels, meta=meta, adapter=adapter, **allowed)
    if manifest.kind != "run":
        raise UsageError(f"{path}: an exported {manifest.kind} folder cannot be rewritten; load the run it came from")
    if adapter is not None:
        raise UsageError(f"{path}: a run has adapters of its own; put others on a checkpoint, e.g. the run folded")
    if task is not None or num_labels is not None:
        raise UsageError(f"{path}: a run knows its task; rewrite its base checkpoint to change that")
    run = _record(read_manifest(path, hashes=True))
    if run.options.get("trust_remote_code") and not trust_remote_code:
        remedy = "if you trust it, pass trust_remote_code (--trust-remote-code)"
        raise UsageError(f"{path}: its base runs code of its own; {remedy}")
    if meta and not run.meta:
        raise UsageError(f"{path}: this run has weights; load it without meta")
    return _rebuilt(run, lambda: _recapture(run, local_folder(base or run.base), meta, allowed), check)


def load_over(path: str | PathLike[str], captured: Program) -> Program:
    """A run as :func:`load` opens it, over an existing capture of its base.

    Both share tensors, which get the run's values: ``captured`` must not be used afterwards.

    Raises:
        ArtifactError: the run is incomplete or changed, or its base is no longer the one it was made from
    """
    run = _record(read_manifest(path, hashes=True))
    _check_base(Path(str(captured.source.path)), run.hashes, {})
    return _rebuilt(run, lambda: captured, check=True)


def _rebuilt(run: _Run, base: Callable[[], Program], check: bool) -> Program:
    """The program of a run, over its base."""
    # Values that the run does not hold (those of a head, saved from the meta device) come from this seed, and the
    # caller's random state stays as it is.
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(run.seed)
        program = rewrite(base(), run.path / RECIPE, check=check)
    _load_values(program, run)
    _name_classes(program, run)
    program.trained, program.earlier = _trainings(run.path / REPORT)
    return program


def weight_bytes(path: str | PathLike[str], base: str | PathLike[str] | None = None) -> int:
    """The size of the weight files that a program opened from ``path`` reads: a checkpoint's own, or a run's base's."""
    path = local_folder(path)
    manifest = find_manifest(path)
    if manifest is not None and manifest.kind == "run":
        path = base or _record(manifest).base
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))


def run_recipe(path: str | PathLike[str]) -> Recipe:
    """The recipe of a run folder, with the training options it was given."""
    manifest = read_manifest(path, hashes=True)
    if manifest.kind != "run":
        raise UsageError(f"{path}: a folder of kind {manifest.kind}, not a run")
    return Recipe.read(manifest.path / RECIPE)


@dataclass(frozen=True)
class _Run:
    """What a run's manifest records."""

    path: Path
    base: str
    task: str | None
    options: dict[str, Any]
    hashes: dict[str, str]
    meta: bool
    dynamic: bool
    inputs: list[str] | None
    seed: int
    aliases: dict[str, str]
    of_weights: frozenset[str]


def _record(manifest: Manifest) -> _Run:
    try:
        base, capturing = manifest.meta["base"], manifest.meta["capture"]
        return _Run(
            path=manifest.path,
            base=str(found_from(manifest.path, str(base["path"]))),
            task=base["task"],
            options=dict(base["options"]),
            hashes=dict(base["hashes"]),
            meta=bool(capturing["meta"]),
            dynamic=bool(capturing["dynamic"]),
            inputs=capturing.get("inputs"),
            seed=int(manifest.meta["seed"]),
            aliases=dict(manifest.meta["aliases"]),
            of_weights=frozenset(manifest.meta.get("of_weights", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ArtifactError(f"{manifest.path / MANIFEST}: broken manifest; write the run again") from None


def _recapture(run: _Run, folder: Path, meta: bool, allowed: dict[str, Any]) -> Program:
    """The base, captured again; ArtifactError when it is not the one the run was made from."""
    if not folder.is_dir():
        raise ArtifactError(f"{run.path}: its base checkpoint {folder} is gone; give its new place (base=…, --base)")
    inputs = None
    if run.inputs is not None:
        stored = _read_tensors(run.path / INPUTS)
        inputs = {name: stored[name] for name in run.inputs}
    opening = {**run.options, **allowed, "dynamic": run.dynamic}
    try:
        program = capture(folder, run.task, inputs=inputs, meta=meta, **opening)
    except LorafxError:
        # If the folder was changed, report that, not what it led to.
        _check_base(folder, run.hashes, {})
        raise
    _check_base(folder, run.hashes, program.source.hashes)
    return _doubted(program, folder, run.hashes)


def _doubted(program: Program, folder: Path, expected: Mapping[str, str]) -> Program:
    """The program with a word about weight files that nobody read when the run was written, and that were modified
    since. No error: copying a checkpoint does that too. Inodes would tell no more."""
    names = tuple(name for name, identity in expected.items() if modified(folder / name, identity))
    if not names:
        return program
    _log.warning(
        "%s: %s was modified (or copied) since the rewrite, which read no weights: of the same size and names, but "
        "whether the weights are the same cannot be told; rewrite again if they should not be these",
        folder,
        names[0],
    )
    return dataclasses.replace(program, source=dataclasses.replace(program.source, modified=names))


def _check_base(folder: Path, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compare the base's files with what was recorded of them; ``found`` is what is known of them already."""
    for name, digest in expected.items():
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder}: base checkpoint changed since the rewrite: {name} is gone")
        if found.get(name) != digest and not has_identity(folder / name, digest):
            raise ArtifactError(f"{folder}: base checkpoint changed since the rewrite: {name}; restore or rewrite it")


def _load_values(program: Program, run: _Run) -> None:
    """Fill in what was learned. A run from the meta device has no values for what the base's class adds (a head), nor
    for what is computed from weights: these come from rewriting the base with its weights."""
    file = run.path / VALUES
    stored = _read_tensors(file)
    names = {key: name for name, key in adapter_keys(program).items()}
    inserted = set(program.names("adapter", "gate", "statistic")) - run.of_weights
    unknown = sorted(stored.keys() - names.keys())
    missing = [name for key, name in names.items() if key not in stored and (name in inserted or not run.meta)]
    if unknown or missing:
        what = f"holds {unknown[0]}, which its recipe does not make" if unknown else f"lacks {missing[0]}"
        raise ArtifactError(f"{file}: {what}; write the run again")
    for alias, name in run.aliases.items():
        if not (has_tensor(program.root, alias) and program.tensor(alias) is program.tensor(name)):
            raise ArtifactError(f"{run.path}: {alias} was one tensor with {name} and is no longer; write the run again")
    try:
        program.load({names[key]: value for key, value in stored.items()})
    except ValueError as error:
        raise ArtifactError(f"{file}: {error}; write the run again") from None


def _trainings(file: Path) -> tuple[Mapping[str, Any] | None, tuple[Mapping[str, Any], ...]]:
    """The results of the last training and those before it, from the run's report."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))["sections"]
        return told.get("training"), tuple(told.get(EARLIER, ()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{file}: broken report; write the run again") from None


def _name_classes(program: Program, run: _Run) -> None:
    """Take over the class names from training: the run's config has them, the base's does not."""
    names = read_config(run.path).get("id2label")
    if names:
        program.config.id2label = {int(number): name for number, name in names.items()}
        program.config.label2id = {name: number for number, name in program.config.id2label.items()}


def _read_tensors(file: Path) -> dict[str, Tensor]:
    check_safetensors(file)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ArtifactError(f"{file}: corrupted ({error}); write the run again") from None
