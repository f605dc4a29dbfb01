"""Programs on disk: the run folder, which can be trained on, and opening any folder lorafx wrote.

A run refers to its base checkpoint and holds what was learned and the recipe. Opening it captures the base again, runs
the recipe again and loads the values: no pickle, small files, and nothing of torch's internals is stored.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .capture import capture, example_inputs
from .checkpoint import check_safetensors, read_config
from .companions import copy_companions
from .edit import aliases
from .errors import ArtifactError, LorafxError, UsageError
from .folder import MANIFEST, Manifest, file_hash, find_manifest, new_folder, read_manifest
from .peft_format import adapter_config, adapter_keys
from .pipeline import rewrite
from .program import Program
from .recipe import Recipe
from .tree import has_tensor

if TYPE_CHECKING:
    from .report import Report

__all__ = [
    "Manifest",
    "base_record",
    "find_manifest",
    "load",
    "new_folder",
    "read_manifest",
    "recipe_of",
    "run_recipe",
    "save_run",
]

VALUES = "adapter_model.safetensors"
RECIPE = "recipe.toml"
REPORT = "report.json"
INPUTS = "example_inputs.safetensors"


# ---- writing


def save_run(
    program: Program,
    path: str | PathLike[str],
    overwrite: bool = False,
    *,
    train: Mapping[str, Any] | None = None,
    report: Report | None = None,
    seed: int = 0,
    made_from: Mapping[str, str] | None = None,
) -> None:
    """Write a run folder: what was learned, the recipe, the report, and a reference to the base checkpoint.

    Args:
        program: a program captured from a checkpoint folder and not folded
        path: the folder to make; refused if it exists, unless ``overwrite``
        train: options of training to keep in the recipe's ``[train]`` section
        report: what to write instead of ``program.report``, e.g. with the metrics of training
        seed: sets the random state before the run is rebuilt, which fixes what was not saved (a head that has no
            values yet, when the program was captured on the meta device)
        made_from: what the manifest is to say of the inputs; see :func:`lorafx.workflow.run_job`

    Raises:
        UsageError: a model from memory, a folded program, an existing path
        ArtifactError: the folder cannot be written
    """
    source = program.source
    if source.path is None:
        raise UsageError(
            f"{program.name} came from memory, and a run refers to its base on disk: save the model in a folder "
            "(model.save_pretrained) and capture that folder"
        )
    if program.origin is not None:
        raise UsageError("a folded program is no run any more: write it with lorafx.export, or save it before fold()")
    inputs, capturing = _capture_record(program)
    keys = adapter_keys(program)
    values = {keys[name]: plain_tensor(value) for name, value in program.learned().items() if not value.is_meta}
    peft, reason = adapter_config(program)
    meta = {
        "base": base_record(program),
        "capture": capturing,
        "seed": seed,
        "aliases": {alias: name for name in keys for alias in aliases(program.root, name) if alias != name},
        "peft": reason or "adapter_config.json",
        **({"made_from": dict(made_from)} if made_from is not None else {}),
    }
    with new_folder(path, "run", meta, overwrite) as folder:
        _write_config(program, folder)
        (folder / RECIPE).write_text(recipe_of(program, train or {}).to_toml(), encoding="utf-8")
        _write_json(folder / REPORT, (report or program.report).to_json())
        _save_tensors(values, folder / VALUES)
        if inputs:
            _save_tensors(inputs, folder / INPUTS)
        if peft is not None:
            _write_json(folder / "adapter_config.json", peft)
        copy_companions(program, folder)


def base_record(program: Program) -> dict[str, Any]:
    """Where a program's base came from, as JSON values: path, task, options, and the hashes of its files."""
    source = program.source
    hashes = dict(source.hashes)
    if source.path is not None and (Path(source.path) / "config.json").is_file():
        hashes["config.json"] = file_hash(Path(source.path) / "config.json")
    return {
        "path": source.path,
        "model": program.name,
        "task": source.task,
        "options": {name: _option(name, value) for name, value in source.options.items()},
        "hashes": hashes,
    }


def recipe_of(program: Program, train: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that made ``program`` from its base."""
    options = program.source.options
    model = {"task": program.source.task, "num_labels": options.get("num_labels"), "dtype": options.get("dtype")}
    model = {key: _option(key, value) for key, value in model.items() if value is not None}
    return Recipe(tuple(applied.step for applied in program.history), model, dict(train or {}))


def _capture_record(program: Program) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The example inputs to store, none when they are the usual ones, and how the program was captured."""
    meta = program.device.type == "meta"
    record = {"meta": meta, "dynamic": bool(program.signature.dynamic_shapes)}
    try:
        usual = example_inputs(program.source.model, Path(str(program.source.path)))
    except (LorafxError, AttributeError):  # the config does not say the sizes of its inputs: these were given
        usual = {}
    if list(usual) == list(program.example) and all(_same(usual[name], program.example[name]) for name in usual):
        return {}, record
    odd = [name for name, value in program.example.items() if not isinstance(value, Tensor) or value.is_meta]
    if odd:
        raise UsageError(f"the example input {odd[0]!r} is no tensor with values, so the run cannot keep it")
    inputs = {name: plain_tensor(value) for name, value in program.example.items()}
    return inputs, {**record, "inputs": list(inputs)}


def _same(a: Any, b: Any) -> bool:
    if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.is_meta or b.is_meta or torch.equal(a.cpu(), b.cpu())


def _option(name: str, value: Any) -> Any:
    """An option of opening the checkpoint as a JSON value."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UsageError(f"the option {name} = {value!r} cannot be written down; capture with plain values to save a run")


def plain_tensor(value: Tensor) -> Tensor:
    """A tensor as safetensors wants it: on the CPU, contiguous, sharing storage with no other."""
    return value.detach().to("cpu", copy=True).contiguous()


def _save_tensors(values: Mapping[str, Tensor], file: Path) -> None:
    save_file(dict(values), file, metadata={"format": "pt"})


def _write_config(program: Program, folder: Path) -> None:
    config = copy.deepcopy(program.config)
    config.architectures = [program.name]
    config.save_pretrained(folder)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- reading


def load(
    path: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    task: str | None = None,
    num_labels: int | None = None,
    meta: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Program:
    """Open a folder as a program: a run as it was saved; any checkpoint, exported by lorafx or not, as a new capture.

    Args:
        path: the folder
        base: where a run's base checkpoint is now, if it was moved
        task: as for :func:`lorafx.capture`; a run knows its own
        num_labels: as for :func:`lorafx.capture`
        meta: rebuild on the meta device; a run only if it was saved from there
        allow_pickle: whether weights in ``.bin`` files may be read
        trust_remote_code: whether the model may run code of its own; never taken from the folder

    Raises:
        ArtifactError: the folder is incomplete or changed, or a run's base is missing or not the one it was made from
        UsageError: the folder holds no program that can be rewritten (an ONNX folder), or an option that is not for it
    """
    allowed: dict[str, Any] = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    manifest = find_manifest(path)
    if manifest is None or manifest.kind == "hf":
        if base is not None:
            raise UsageError(f"{path}: a checkpoint has no base of its own")
        return capture(Path(path), task, num_labels, meta=meta, **allowed)
    if manifest.kind != "run":
        raise UsageError(f"{path}: an exported {manifest.kind} folder cannot be rewritten; load the run it came from")
    if task is not None or num_labels is not None:
        raise UsageError(f"{path}: a run knows its task; rewrite its base checkpoint to change that")
    run = _record(read_manifest(path, hashes=True))
    if run.options.get("trust_remote_code") and not trust_remote_code:
        remedy = "if you trust it, pass trust_remote_code (--trust-remote-code)"
        raise UsageError(f"{path}: its base runs code of its own; {remedy}")
    if meta and not run.meta:
        raise UsageError(f"{path}: this run has weights; load it without meta")
    # Values that the run does not hold (those of a head, saved from the meta device) come from this seed, and the
    # caller's random state stays as it is.
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(run.seed)
        program = rewrite(_recapture(run, Path(base or run.base), meta, allowed), run.path / RECIPE)
    _load_values(program, run)
    _name_classes(program, run)
    return program


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


def _record(manifest: Manifest) -> _Run:
    try:
        base, capturing = manifest.meta["base"], manifest.meta["capture"]
        return _Run(
            path=manifest.path,
            base=str(base["path"]),
            task=base["task"],
            options=dict(base["options"]),
            hashes=dict(base["hashes"]),
            meta=bool(capturing["meta"]),
            dynamic=bool(capturing["dynamic"]),
            inputs=capturing.get("inputs"),
            seed=int(manifest.meta["seed"]),
            aliases=dict(manifest.meta["aliases"]),
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
        # If the folder was changed, that is what is wrong, not what it led to.
        _check_base(folder, run.hashes, {})
        raise
    _check_base(folder, run.hashes, program.source.hashes)
    return program


def _check_base(folder: Path, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compare the base's files with their recorded hashes; ``found`` are hashes known already."""
    for name, digest in expected.items():
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder}: base checkpoint changed since the rewrite: {name} is gone")
        if (found.get(name) or file_hash(folder / name)) != digest:
            raise ArtifactError(f"{folder}: base checkpoint changed since the rewrite: {name}; restore or rewrite it")


def _load_values(program: Program, run: _Run) -> None:
    """Fill in what was learned. A run from the meta device has no values for what the base's class adds (a head)."""
    file = run.path / VALUES
    stored = _read_tensors(file)
    names = {key: name for name, key in adapter_keys(program).items()}
    inserted = set(program.names("adapter", "gate", "statistic"))
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


def _name_classes(program: Program, run: _Run) -> None:
    """Take over what training called the classes: the run's config has it, the base's has not."""
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
