"""Programs on disk: the run folder, which can be trained on.

A run refers to its base checkpoint and holds what was learned and the recipe. Opening it captures the base again, runs
the recipe again and loads the values: no pickle, small files, and nothing of torch's internals is stored.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base import passes_of
from ..errors import LorafxError, UsageError
from ..files.folder import FileEntry, file_hash, new_folder
from ..files.places import checkpoint_name, place_from
from ..graph.precision import dtype_name
from ..graph.program import Program
from ..graph.tree import ties
from ..models.examples import example_inputs
from ..models.layered import own_configs
from ..recipes.recipe import Recipe
from ..recipes.registry import in_recipes
from ..reporting.report import Report, report_of, write_report
from .companions import copy_companions
from .peft import adapter_config, adapter_keys
from .shards import write_file

VALUES = "adapter_model.safetensors"
RECIPE = "recipe.toml"
INPUTS = "example_inputs.safetensors"


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
        made_from: what the manifest says about the inputs; see :func:`lorafx.commands.job.run_job`

    Raises:
        UsageError: a model from memory, a folded program, an existing path
        ArtifactError: the folder cannot be written
    """
    base = _base_of(program)
    _refuse_foreign(program)
    inputs, capturing = _capture_record(program)
    peft, reason = adapter_config(program)
    meta = {
        "base": {"path": place_from(path, base), **base_record(program)},
        "capture": capturing,
        "seed": seed,
        "peft": reason or "adapter_config.json",
        **_tensor_record(program),
        **({"made_from": dict(made_from)} if made_from is not None else {}),
    }
    known: dict[str, FileEntry] = {}
    with new_folder(path, "run", meta, overwrite, known) as folder:
        _write_config(program, folder)
        (folder / RECIPE).write_text(recipe_of(program, train or {}).to_toml(), encoding="utf-8")
        # Neither copied at once nor read again for hashing: they may be a gigabyte.
        known[VALUES] = write_file(folder / VALUES, _values(program))
        if inputs:
            known[INPUTS] = write_file(folder / INPUTS, inputs)
        if peft is not None:
            _write_json(folder / "adapter_config.json", peft)
        copy_companions(program, folder)
        write_report(report or report_of(program), folder)


def _values(program: Program) -> dict[str, Tensor]:
    """What was learned and has values, by the names under which PEFT stores it."""
    keys = adapter_keys(program)
    return {keys[name]: value.detach() for name, value in program.learned().items() if not value.is_meta}


def _tensor_record(program: Program) -> dict[str, Any]:
    """Which stored tensors have several names, and which are yet to be computed from the base's weights."""
    tied, waiting = ties(program.root), program.waiting()
    aliases = {alias: name for name in adapter_keys(program) for alias in tied[name] if alias != name}
    return {"aliases": aliases, **({"of_weights": waiting} if waiting else {})}


def _base_of(program: Program) -> str:
    """The folder of the base checkpoint; UsageError for a program that cannot be saved as a run of one."""
    if program.source.path is None:
        raise UsageError(
            f"{program.name} came from memory, and a run refers to its base on disk: save the model in a folder "
            "(model.save_pretrained) and capture that folder"
        )
    if program.origin is not None:
        raise UsageError(
            "a folded program can no longer be saved as a run: write it with lorafx.export, or save it before fold()"
        )
    return program.source.path


def _refuse_foreign(program: Program) -> None:
    """UsageError for a program with parts of another library's adapter that no recipe can say."""
    odd = next((step for step in passes_of(program) if not in_recipes(step)), None)
    if odd is None and not program.source.adapters:
        return
    if odd is not None and not type(odd).__module__.startswith("lorafx."):
        raise UsageError(
            f"the pass {odd.pass_name()} is in no installed package, so its run could not be opened again; declare "
            'it under [project.entry-points."lorafx.passes"] (lorafx new-pass NAME --package writes such a package)'
        )
    what = sorted(program.source.adapters)[0] if odd is None else "more than the lora pass makes"
    raise UsageError(
        f"this adapter holds {what}, which a run cannot train on; fold or export it, or train plain LoRA of rank up to "
        "the weights' sizes, and modules in full that are tied to no other"
    )


def base_record(program: Program) -> dict[str, Any]:
    """What a program was made from, as JSON values: the name of its base, task, options, and the hashes of its
    files."""
    source = program.source
    hashes = dict(source.hashes)
    if source.path is not None and (Path(source.path) / "config.json").is_file():
        hashes["config.json"] = file_hash(Path(source.path) / "config.json")
    return {
        "name": checkpoint_name(source.path) if source.path is not None else None,
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
    return Recipe(tuple(passes_of(program)), model, dict(train or {}))


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
        raise UsageError(f"the example input {odd[0]!r} is not a tensor with values, so the run cannot keep it")
    inputs = {name: value.detach() for name, value in program.example.items()}
    return inputs, {**record, "inputs": list(inputs)}


def _same(a: Any, b: Any) -> bool:
    if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.is_meta or b.is_meta or torch.equal(a.cpu(), b.cpu())


def _option(name: str, value: Any) -> Any:
    """An option of opening the checkpoint as a JSON value."""
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UsageError(f"the option {name} = {value!r} cannot be written down; capture with plain values to save a run")


def plain_tensor(value: Tensor) -> Tensor:
    """A tensor as safetensors wants it: on the CPU, contiguous, sharing storage with no other."""
    return value.detach().to("cpu", copy=True).contiguous()


def _write_config(program: Program, folder: Path) -> None:
    config = copy.deepcopy(program.config)
    config.architectures = [program.name]
    with own_configs(config):
        config.save_pretrained(folder)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
