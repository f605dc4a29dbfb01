"""The whole path as one resumable job: rewrite, train, fold, export. Each stage is a folder that is whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ArtifactError, UsageError
from .folder import file_hash, read_manifest
from .recipe import Recipe
from .report import Report

#: Remembers what the folders below were made from.
RECORD = "workflow.json"
#: Where training keeps what it resumes from.
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Job:
    """What ``lorafx run`` does.

    Attributes:
        recipe: passes, and the defaults of the model and of training
        checkpoint: the base folder
        data, eval_data: tables to train and evaluate on
        out: the folder that gets ``run``, ``folded`` and ``onnx``
        train: training options
        provider: ONNX Runtime provider
    """

    recipe: Recipe
    checkpoint: Path
    data: Path
    eval_data: Path | None
    out: Path
    train: Mapping[str, Any]
    provider: Any = "cpu"

    def key(self) -> str:
        """A digest of everything the result depends on: another key means that nothing done before counts."""
        files = [path for path in (self.data, self.eval_data) if path is not None]
        missing = next((path for path in files if not path.is_file()), None)
        if missing is not None:
            raise ArtifactError(f"{missing}: no such data file")
        parts = [self.recipe.to_toml(), str(self.checkpoint.resolve()), json.dumps(dict(self.train), sort_keys=True)]
        parts += [self.provider, *(file_hash(path) for path in files)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def checkpoint_of(recipe: Recipe, given: Path | None) -> Path:
    """The base folder: the one given, else the recipe's."""
    named = recipe.model.get("checkpoint")
    if given is None and named is None:
        raise UsageError('no checkpoint: give --checkpoint FOLDER, or checkpoint = "…" under [model] in the recipe')
    return given if given is not None else Path(str(named))


def run_job(job: Job, say: Callable[[str], None]) -> Report:
    """Do what is not done yet and return the report of the run. ``say`` gets one line a stage."""
    job.out.mkdir(parents=True, exist_ok=True)
    stages = {"run": _train, "folded": _fold, "onnx": _export}
    key, record = job.key(), job.out / RECORD
    if not record.is_file() or json.loads(record.read_text(encoding="utf-8")).get("key") != key:
        # Made from other inputs: gone before the new key is written, so that an interruption cannot mix the two.
        for name in (*stages, CHECKPOINTS):
            shutil.rmtree(job.out / name, ignore_errors=True)
        _write(record, {"key": key})
    for name, stage in stages.items():
        if _whole(job.out / name):
            say(f"{name}: done before")
        else:
            say(f"{name}: working")
            stage(job, job.out / name)
    return Report.from_json(json.loads((job.out / "run" / "report.json").read_text(encoding="utf-8")))


def _write(file: Path, value: Any) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, file)


def _whole(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except ArtifactError:
        return False
    return True


def _train(job: Job, folder: Path) -> None:
    from transformers import set_seed

    from .capture import capture
    from .pipeline import rewrite
    from .store import save_run
    from .training import last_checkpoint, train

    model = job.recipe.model
    set_seed(int(model.get("seed", 0)))
    dtype = {"dtype": model["dtype"]} if "dtype" in model else {}
    program = rewrite(capture(job.checkpoint, model.get("task"), model.get("num_labels"), **dtype), job.recipe)
    checkpoints = job.out / CHECKPOINTS
    resume = last_checkpoint(checkpoints) is not None
    result = train(program, job.data, eval_data=job.eval_data, output_dir=checkpoints, resume=resume, **job.train)
    report = program.report.plus(training=result.to_json())
    save_run(program, folder, overwrite=True, train=job.train, report=report)
    shutil.rmtree(checkpoints, ignore_errors=True)


def _fold(job: Job, folder: Path) -> None:
    from .export import export
    from .hf_format import fits_checkpoint
    from .pipeline import fold
    from .store import load

    folded = fold(load(job.out / "run"), gather="never")
    export(folded, folder, "hf" if fits_checkpoint(folded) else "pt2", overwrite=True)


def _export(job: Job, folder: Path) -> None:
    from .export import export
    from .store import load

    export(load(job.out / "run"), folder, "onnx", provider=job.provider, overwrite=True)
