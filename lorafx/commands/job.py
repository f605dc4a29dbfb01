"""The whole path as one resumable job: rewrite, train, fold, export.

Each stage is a folder that is complete or absent, and its manifest says what it was made from. A stage is done when it
was made from what it would be made from now. Otherwise folders that can be made again (folded, onnx) are replaced; a
trained run never is, nor anything that ``lorafx run`` did not write.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, UsageError
from ..files.folder import MANIFEST, check_free, file_hash, is_free, manifest_of, read_manifest
from ..files.table import read_table
from ..models.hub import local_folder
from ..recipes.recipe import Recipe
from ..reporting.report import PAGE, REPORT, Report, read_report, write_report
from ..reporting.scored import SCORED, forms_of, scored
from ..training.folder import check_training_folder, differences, training_folder

if TYPE_CHECKING:
    from ..proof.bench import BenchResult
    from ..public import Program

#: What the classes of models are called that learn images.
_OF_IMAGES = "ForImageClassification"
#: Where training keeps what it resumes from.
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Job:
    """What ``lorafx run`` does.

    Attributes:
        recipe: passes, and the defaults of the model and of training
        checkpoint: the base folder
        data, eval_data: tables, or folders of images, to train and evaluate on
        out: the folder that gets ``run``, ``folded`` and ``onnx``
        train: training options
        provider: ONNX Runtime provider
        allow_pickle, trust_remote_code: how the base may be opened; see :func:`lorafx.capture`
    """

    recipe: Recipe
    checkpoint: Path
    data: Path
    eval_data: Path | None
    out: Path
    train: Mapping[str, Any]
    provider: Any = "cpu"
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def training_inputs(self) -> dict[str, str]:
        """Digests of everything that decides what is learned, contents of files included, by names for people.

        ArtifactError when a data file or the base is missing or damaged.
        """
        tables = {"data": self.data, "evaluation data": self.eval_data}
        missing = next((path for path in tables.values() if path is not None and not path.exists()), None)
        if missing is not None:
            raise ArtifactError(f"{missing}: no such data file")
        base = {f"{name} of the base": digest for name, digest in _base_hashes(self.checkpoint).items()}
        model = {name: value for name, value in self.recipe.model.items() if name != "checkpoint"}
        return {
            "recipe": _digest(Recipe(self.recipe.passes, model).to_toml()),
            "training options": _digest(json.dumps(dict(self.train), sort_keys=True)),
            **{name: _data_digest(path, self._images()) for name, path in tables.items() if path is not None},
            **base,
        }

    def _images(self) -> str | None:
        """The column of images of a table, for a base that learns them."""
        from ..models.checkpoint import read_config

        named = read_config(self.checkpoint).get("architectures") or ()
        task = self.recipe.model.get("task")
        if task != "image-classification" and (task or not any(name.endswith(_OF_IMAGES) for name in named)):
            return None
        return str(self.train.get("text") or "image")

    def opening(self) -> dict[str, Any]:
        """How the base may be opened."""
        return {"allow_pickle": self.allow_pickle, "trust_remote_code": self.trust_remote_code}


def checkpoint_of(recipe: Recipe, given: Path | None) -> Path:
    """The base folder: the one given, else the recipe's."""
    named = recipe.model.get("checkpoint")
    if given is None and named is None:
        raise UsageError('no checkpoint: give --checkpoint FOLDER, or checkpoint = "…" under [model] in the recipe')
    return local_folder(given if given is not None else str(named))


def run_job(job: Job, say: Callable[[str], None]) -> Report:
    """Do what is not done yet, and return the result: the report of the ONNX folder, with its speed.

    It is also written into ``out``, as JSON and as a page. ``say`` is called with one line for each stage.

    Raises:
        UsageError: something stands in the way that ``lorafx run`` did not write, or a run trained from other inputs;
            nothing was touched
        ArtifactError: the base, a data file, or the trained run cannot be used
    """
    inputs, run = job.training_inputs(), job.out / "run"
    trained = _checked(job, inputs)
    say("run: done before" if trained else "run: working")
    base = None if trained else _train(job, run, inputs)
    opened = cache(lambda: _opened(job, run, base))  # once, if at all
    for name, stage, more in (("folded", _fold, {}), ("onnx", _export, {"provider": job.provider})):
        wanted = {**_derived_inputs(job, run), **more}
        done = _is_made_from(job.out / name, wanted)
        say(f"{name}: done before" if done else f"{name}: working")
        if not done:
            stage(opened(), job.provider, job.out / name, wanted)
    return _told(job, opened, say)


# ---- existing folders


def _checked(job: Job, inputs: Mapping[str, str]) -> bool:
    """Whether the run is trained already; refuses, before any work, folders that must be neither used nor replaced."""
    if job.out.exists() and not job.out.is_dir():
        raise UsageError(f"{job.out}: not a folder; choose another -o")
    made_from = {name: _made_from(job.out / name) for name in ("run", "folded", "onnx")}
    trained = made_from["run"]
    if trained is None:
        check_training_folder(job.out / CHECKPOINTS, inputs)
    else:
        changed = differences(trained, inputs)
        if changed:
            raise UsageError(
                f"{job.out / 'run'}: trained from other inputs ({', '.join(changed)}); "
                "choose another -o, or move that folder away to train again"
            )
        read_manifest(job.out / "run")
    for name in ("folded", "onnx"):
        check_free(job.out / name, overwrite=True)
    if any((job.out / name).exists() for name in (REPORT, PAGE)) and _told_of(job.out) is None:
        raise UsageError(f"{job.out / REPORT}: `lorafx run` did not write this; choose another -o, or move it away")
    return trained is not None


def _made_from(folder: Path) -> dict[str, str] | None:
    """What a stage's folder was made from, None where there is none; UsageError when no job made it."""
    if is_free(folder):
        return None
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder}: lorafx did not write this; choose another -o, or move it away")
    made_from = manifest_of(folder).meta.get("made_from")
    if not isinstance(made_from, Mapping):
        raise UsageError(f"{folder}: `lorafx run` did not make this; choose another -o, or move it away")
    return dict(made_from)


def _is_made_from(folder: Path, wanted: Mapping[str, str]) -> bool:
    """Whether a folder is complete and made from ``wanted``."""
    if _made_from(folder) != wanted:
        return False
    try:
        read_manifest(folder)
    except ArtifactError:  # damaged since: it is made again
        return False
    return True


def _derived_inputs(job: Job, run: Path) -> dict[str, str]:
    """What is folded and exported: the run, and those of the base's files that only go along."""
    from ..formats.companions import GENERATION

    along = job.checkpoint / GENERATION
    return {"run": file_hash(run / MANIFEST), **({GENERATION: file_hash(along)} if along.is_file() else {})}


def _base_hashes(checkpoint: Path) -> dict[str, str]:
    """Digests of the files of the base by which it is opened and trained.

    Always of their contents: sizes and times can stay the same when weights are changed in place.
    """
    from ..formats.companions import GENERATION, companions
    from ..models.checkpoint import check_kind, read_config
    from ..models.identity import weight_hashes

    check_kind(checkpoint)
    read_config(checkpoint)
    weights = weight_hashes(checkpoint)
    if not weights:
        raise ArtifactError(f"{checkpoint}: no weights (*.safetensors); fetch the checkpoint")
    beside = [name for name in companions(checkpoint) if name != GENERATION and (checkpoint / name).is_file()]
    beside += ["config.json", *(file.name for file in checkpoint.glob("*.index.json"))]
    return weights | {name: file_hash(checkpoint / name) for name in sorted(beside)}


def _data_digest(path: Path, images: str | None) -> str:
    """The digest of a table, with the files that its column of images names, or of all files of a folder."""
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    elif images is not None:
        named = dict.fromkeys(str(name) for name in read_table(path).columns.get(images, ()))
        files = [path, *(path.parent / name for name in named if (path.parent / name).is_file())]
    else:
        return file_hash(path)
    return _digest(json.dumps({os.path.relpath(file, path): file_hash(file) for file in files}))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---- the stages


def _train(job: Job, folder: Path, inputs: Mapping[str, str]) -> Program | None:
    """Train the run, and return the capture it was made from; None if the capture no longer matches the run."""
    from transformers import set_seed

    from ..formats.run import save_run
    from ..frontend.capture import capture
    from ..pipeline import rewrite
    from ..training.fit import train
    from ..training.trainer import last_checkpoint

    model = job.recipe.model
    set_seed(int(model.get("seed", 0)))
    opening = {**job.opening(), **job.recipe.opening}
    base = capture(job.checkpoint, model.get("task"), model.get("num_labels"), **opening)
    before = _configs(base)
    program = rewrite(base, job.recipe)
    with training_folder(job.out / CHECKPOINTS, inputs) as checkpoints:
        resume = last_checkpoint(checkpoints) is not None
        train(program, job.data, eval_data=job.eval_data, output_dir=checkpoints, resume=resume, **job.train)
        save_run(program, folder, train=job.train, made_from=inputs)
    return base if _as_captured(base, before) else None


def _configs(base: Program) -> list[dict[str, Any]]:
    """What the configs of a model say, names of classes aside: training gives these, and a run has them."""
    said = [config.to_dict() for config in _held(base)]
    return [{key: value for key, value in one.items() if key not in ("id2label", "label2id")} for one in said]


def _held(base: Program) -> list[Any]:
    model: Any = base.source.model
    return [config for config in (model.config, getattr(model, "generation_config", None)) if config is not None]


def _as_captured(base: Program, before: list[dict[str, Any]]) -> bool:
    """Whether configs say what they did ``before`` training, what that noted in them (the kind of the loss) taken
    back: the run's config has it, its base's has not."""
    for config, said, now in zip(_held(base), before, _configs(base), strict=True):
        for key in [key for key, value in now.items() if isinstance(value, str) and said.get(key) != value]:
            setattr(config, key, said.get(key))
    return _configs(base) == before


def _fold(trained: Program, _provider: str, folder: Path, made_from: Mapping[str, str]) -> None:
    from ..backends.export import export
    from ..formats.hf import folded_format
    from ..pipeline import fold

    folded = fold(trained, gather="never")
    export(folded, folder, folded_format(folded), overwrite=True, made_from=made_from)


def _export(trained: Program, provider: Any, folder: Path, made_from: Mapping[str, str]) -> None:
    from ..backends.export import export

    export(trained, folder, "onnx", provider=provider, overwrite=True, made_from=made_from)


#: Under this name the report of a job says which ONNX folder it tells of.
_TOLD = "made from"
#: A single short text and a small batch, and seconds to spend on both: a rough measurement, not a benchmark.
_SHAPES, _SECONDS = ((1, 64), (8, 64)), 20.0
#: What is timed.
_BASE, _MADE = "the base in PyTorch", "lorafx, ONNX"


def _told_of(out: Path) -> str | None:
    """The digest of the ONNX folder that the report in ``out`` tells of; None without a report that a job wrote."""
    try:
        return str(dict(read_report(out).sections[_TOLD])["onnx"])
    except (ArtifactError, KeyError, TypeError, ValueError):
        return None


def _told(job: Job, opened: Callable[[], Program], say: Callable[[str], None]) -> Report:
    """The result of a job, from its report if that still holds; else timed against the base, and written."""
    onnx = job.out / "onnx"
    digest = file_hash(onnx / MANIFEST)
    if _told_of(job.out) == digest and (job.out / PAGE).is_file():
        return read_report(job.out)
    say("report: working")
    report = read_report(onnx).plus(benchmark=_timed(job, opened(), say), **{_TOLD: {"onnx": digest}})
    report = report.plus(**{SCORED: scored(report, forms_of(report, _BASE, _MADE)) or None})
    write_report(report, job.out, "onnx/")
    return report


def _timed(job: Job, trained: Program, say: Callable[[str], None]) -> BenchResult | None:
    """Timings of the ONNX model and of the base in PyTorch; None, with a message, where inputs cannot be made."""
    from ..proof.bench import bench

    candidates = (_BASE, trained.source.model), (_MADE, job.out / "onnx")
    try:
        return bench(*candidates, shapes=_SHAPES, seconds=_SECONDS, provider=job.provider, memory=False)
    except UsageError as error:
        say(f"not timed: {error}")
        return None


def _opened(job: Job, run: Path, base: Program | None) -> Program:
    """The run as it was written, not the program that was trained; over its base where that was just captured."""
    from ..frontend.load import load, load_over

    return load_over(run, base) if base is not None else load(run, base=job.checkpoint, **job.opening())
