"""`lorafx run` keeps what it did not make, never loses a trained run, and does again only what its inputs ask for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorafx.commands import job as workflow
from lorafx.commands.job import Job, run_job
from lorafx.errors import ArtifactError, LorafxError, ParityError, UsageError
from lorafx.files.folder import MANIFEST, new_folder
from lorafx.passes.lora import Lora
from lorafx.recipes.recipe import Recipe
from lorafx.reporting.report import Report
from lorafx.training.folder import MARK, training_folder

STAGES = ["run", "folded", "onnx"]
TOLD = Report({"class": "Model", "checkpoint": None})


@pytest.fixture
def job(tiny_checkpoint: Path, tiny_table: Path, tmp_path: Path) -> Job:
    base = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    table = Path(shutil.copy(tiny_table, tmp_path / "train.csv"))
    recipe = Recipe((Lora(rank=2),), {"task": "text-classification", "num_labels": 2})
    return Job(recipe, base, table, None, tmp_path / "out", {"epochs": 1.0})


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that worked. They write folders as the real ones do, without the minutes of training."""
    done: list[str] = []

    def train(job: Job, folder: Path, inputs: Any) -> None:
        with (
            training_folder(job.out / workflow.CHECKPOINTS, inputs),
            new_folder(folder, "run", {"made_from": dict(inputs)}) as made,
        ):
            (made / "report.json").write_text(json.dumps(TOLD.to_json()))
            (made / "learned").write_text(str(len(done)))
        done.append("run")

    def derived(name: str) -> Callable[..., None]:
        def stage(trained: Any, provider: Any, folder: Path, made_from: Any) -> None:
            with new_folder(folder, name, {"made_from": dict(made_from)}, overwrite=True) as made:
                (made / "model").write_text(name)
                (made / "report.json").write_text(json.dumps(TOLD.to_json()))
            done.append(name)

        return stage

    monkeypatch.setattr(workflow, "_train", train)
    monkeypatch.setattr(workflow, "_opened", lambda job, run, base: None)
    monkeypatch.setattr(workflow, "_fold", derived("folded"))
    monkeypatch.setattr(workflow, "_export", derived("onnx"))
    monkeypatch.setattr(workflow, "_timed", lambda job, trained, say: None)
    return done


def go(job: Job) -> None:
    run_job(job, lambda line: None)


def everything(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the bytes of files."""
    found = sorted(folder.rglob("*")) if folder.exists() else []
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in found}


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    there, before = folder.exists(), everything(folder)
    yield
    assert (folder.exists(), everything(folder)) == (there, before)


def refused(error: type[LorafxError], job: Job, *words: str) -> None:
    with untouched(job.out), pytest.raises(error) as caught:
        go(job)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def change_in_place(file: Path) -> None:
    """Other bytes under the same name, size and time."""
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    with file.open("r+b") as stream:
        stream.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def set_option(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def interrupted_training(job: Job) -> None:
    with training_folder(job.out / workflow.CHECKPOINTS, job.training_inputs()) as folder:
        (folder / "checkpoint-5").mkdir()
        (folder / "checkpoint-5" / "optimizer.pt").write_text("hours")
        raise KeyboardInterrupt


# ---- what is done again


def test_what_is_done_is_not_done_again(job: Job, work: list[str]) -> None:
    go(job)
    assert work == STAGES
    assert sorted(path.name for path in job.out.iterdir()) == sorted([*STAGES, "report.html", "report.json"])
    with untouched(job.out):
        go(job)
    assert work == STAGES


def test_another_provider_makes_the_onnx_folder_again_and_nothing_else(job: Job, work: list[str]) -> None:
    go(job)
    with untouched(job.out / "run"), untouched(job.out / "folded"):
        go(replace(job, provider="cuda"))
    assert work == [*STAGES, "onnx"]


def test_a_base_at_another_place_is_the_same_base(job: Job, work: list[str]) -> None:
    go(job)
    job.checkpoint.rename(job.checkpoint.with_name("elsewhere"))
    go(replace(job, checkpoint=job.checkpoint.with_name("elsewhere")))
    assert work == STAGES


def test_other_generation_settings_reach_the_exports_without_training(job: Job, work: list[str]) -> None:
    go(job)
    (job.checkpoint / "generation_config.json").write_text("{}")
    with untouched(job.out / "run"):
        go(job)
    assert work == [*STAGES, "folded", "onnx"]


@pytest.mark.parametrize("name", ["folded", "onnx"])
def test_a_damaged_or_missing_export_is_made_again(name: str, job: Job, work: list[str]) -> None:
    go(job)
    (job.out / name / "model").unlink()
    go(job)
    shutil.rmtree(job.out / name)
    go(job)
    assert work == [*STAGES, name, name]


def test_a_run_that_was_moved_away_is_trained_again(job: Job, work: list[str]) -> None:
    go(job)
    (job.out / "run").rename(job.out / "first")
    other = replace(job, train={"epochs": 2.0})
    with untouched(job.out / "first"):
        go(other)
    assert work == [*STAGES, *STAGES]


# ---- a trained run is never lost


CHANGES: dict[str, tuple[Callable[[Job], Job | None], str]] = {
    "recipe": (lambda job: replace(job, recipe=Recipe((Lora(rank=3),), job.recipe.model)), "recipe"),
    "task": (lambda job: replace(job, recipe=Recipe(job.recipe.passes, {"num_labels": 3})), "recipe"),
    "options": (lambda job: replace(job, train={"epochs": 2.0}), "training options"),
    "data": (lambda job: change_in_place(job.data), "data"),
    "evaluation": (lambda job: replace(job, eval_data=job.data), "evaluation data"),
    "weights": (lambda job: change_in_place(job.checkpoint / "model.safetensors"), "model.safetensors of the base"),
    "vocabulary": (lambda job: change_in_place(job.checkpoint / "tokenizer.json"), "tokenizer.json of the base"),
    "config": (lambda job: set_option(job.checkpoint / "config.json", layer_norm_eps=1e-6), "config.json of the base"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_of_other_inputs_is_named_and_kept(what: str, job: Job, work: list[str]) -> None:
    go(job)
    change, words = CHANGES[what]
    refused(UsageError, change(job) or job, f"{job.out / 'run'}: trained from other inputs ({words})", "move")
    assert work == STAGES


@pytest.mark.parametrize("what", CHANGES)
def test_a_training_that_was_interrupted_is_kept_for_its_own_inputs(what: str, job: Job, work: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_training(job)
    change, words = CHANGES[what]
    refused(UsageError, change(job) or job, f"unfinished training of other inputs ({words})")
    assert work == []


def test_it_goes_on_with_its_own_inputs_and_clears_away_what_it_resumed_from(job: Job, work: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_training(job)
    go(job)
    assert work == STAGES
    assert not (job.out / "checkpoints").exists()


def test_a_damaged_run_is_kept(job: Job, work: list[str]) -> None:
    go(job)
    (job.out / "run" / "report.json").unlink()
    refused(ArtifactError, job, "report.json is missing")
    (job.out / "run" / MANIFEST).write_text("{")
    refused(ArtifactError, job, "broken manifest")


# ---- what lorafx did not write


@pytest.mark.parametrize("name", [*STAGES, "checkpoints"])
@pytest.mark.parametrize("before", ["nothing done", "all done"])
def test_folders_of_others_are_refused_and_kept(name: str, before: str, job: Job, work: list[str]) -> None:
    if before == "all done":
        go(job)
        shutil.rmtree(job.out / name, ignore_errors=True)
    (job.out / name / "checkpoint-1").mkdir(parents=True)
    (job.out / name / "thesis.tex").write_text("years of work")
    done = list(work)
    if before == "all done" and name == "checkpoints":  # nothing is trained any more, so it is not in the way
        with untouched(job.out):
            go(job)
    else:
        refused(UsageError, job, str(job.out / name), "lorafx did not write this")
    assert work == done


@pytest.mark.parametrize("name", STAGES)
def test_folders_of_other_commands_are_refused_and_kept(name: str, job: Job, work: list[str]) -> None:
    """What `lorafx train` or `lorafx fold` wrote there may be wanted."""
    with new_folder(job.out / name, name, {}) as folder:
        (folder / "model").write_text("by hand")
    refused(UsageError, job, f"{job.out / name}: `lorafx run` did not make this")


@pytest.mark.parametrize("name", ["folded", "onnx"])
def test_a_file_put_into_an_export_is_refused_and_kept(name: str, job: Job, work: list[str]) -> None:
    go(job)
    (job.out / name / "notes.md").write_text("mine")
    refused(UsageError, replace(job, provider="cuda"), "holds notes.md, which lorafx did not write")


def test_a_file_where_a_folder_should_be(job: Job, work: list[str]) -> None:
    job.out.write_text("mine")
    with pytest.raises(UsageError, match="not a folder"):
        go(job)
    assert job.out.read_text() == "mine"


# ---- early failures leave all as it was


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda job: replace(job, checkpoint=job.checkpoint / "none"), "no such checkpoint folder"),
        (lambda job: replace(job, data=job.data.with_name("none.csv")), "none.csv: no such data file"),
        (lambda job: replace(job, eval_data=job.data.with_name("no.csv")), "no.csv: no such data file"),
        (lambda job: (job.checkpoint / "model.safetensors").unlink(), "no weights"),
        (lambda job: os.truncate(job.checkpoint / "model.safetensors", 500), "model.safetensors"),
    ],
)
def test_missing_inputs_leave_the_folder_as_it_was(
    there: bool, broken: Callable[[Job], Job | None], words: str, job: Job
) -> None:
    """Also folders of the project's own that bear the names of the stages."""
    for name in [*STAGES, "checkpoints"] if there else []:
        (job.out / name).mkdir(parents=True)
        (job.out / name / "own.txt").write_text("mine")
    refused(ArtifactError, broken(job) or job, words)


def test_a_training_that_cannot_start_leaves_the_folder_as_it_was(job: Job) -> None:
    """With the real stages: the recipe fits nothing; then, in a folder that is there, the table lacks its column."""
    refused(LorafxError, replace(job, recipe=Recipe((Lora(targets="qeury"),), job.recipe.model)), "qeury")
    job.out.mkdir()
    (job.out / "readme.txt").write_text("mine")
    refused(LorafxError, replace(job, train={"label": "lable"}), "lable")


def test_a_failed_export_keeps_the_run(job: Job, work: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ParityError("differs")

    with monkeypatch.context() as patch:
        patch.setattr(workflow, "_export", fails)
        with pytest.raises(ParityError):
            go(job)
    assert work == ["run", "folded"]
    go(job)
    assert work == STAGES


# ---- the folder of checkpoints


def test_the_folder_of_checkpoints_keeps_what_training_did_not_write(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "checkpoints"
    with pytest.raises(ValueError, match="early"), training_folder(folder, {}):
        raise ValueError("early")
    assert list(tmp_path.iterdir()) == []
    with training_folder(folder, {}):
        (folder / "checkpoint-1").mkdir()
        (folder / "events.log").write_text("a logger's")
    assert everything(folder) == {"events.log": b"a logger's"}
    with pytest.raises(UsageError, match="lorafx did not write this"), training_folder(folder, {}):
        raise AssertionError("entered")
    (folder / "events.log").unlink()
    with training_folder(folder, {"data": "1"}):
        pass
    assert not folder.exists()


def test_a_checkpoint_whose_writer_was_killed_is_not_in_the_way(job: Job, work: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_training(job)  # of its files, most are missing
    with training_folder(job.out / workflow.CHECKPOINTS, job.training_inputs()) as folder:
        assert [path.name for path in folder.iterdir()] == [MARK]


def test_a_broken_mark_does_not_pass_for_ones_own(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / MARK).write_text("{")
    with pytest.raises(UsageError, match="unfinished training of other inputs"), training_folder(tmp_path, {}):
        raise AssertionError("entered")
    (tmp_path / MARK).write_text(json.dumps({}))
    with training_folder(tmp_path, {}):
        pass
    assert not tmp_path.exists()


# ---- what came of it all


def test_what_came_of_it_is_told_again_only_when_the_model_is_another(
    job: Job, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []
    monkeypatch.setattr(workflow, "_timed", lambda job, trained, say: timed.append("timed"))
    go(job)
    before = everything(job.out)
    go(job)
    assert (timed, everything(job.out)) == (["timed"], before)
    go(replace(job, provider="cuda"))
    assert timed == ["timed", "timed"]
    (job.out / "report.html").unlink()
    (job.out / "report.json").unlink()
    go(replace(job, provider="cuda"))
    assert timed == ["timed"] * 3
    assert (job.out / "report.html").is_file(), "made again"


@pytest.mark.parametrize("name", ["report.html", "report.json"])
def test_a_report_of_others_is_refused_and_kept(name: str, job: Job, work: list[str]) -> None:
    job.out.mkdir()
    (job.out / name).write_text("my own", encoding="utf-8")
    refused(UsageError, job, "report.json", "did not write this")
    assert work == []


def test_a_model_that_cannot_be_timed_is_told_all_the_same(
    job: Job, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*candidates: Any, **options: Any) -> Any:
        raise UsageError("no inputs of that kind can be made")

    monkeypatch.undo()
    monkeypatch.setattr("lorafx.proof.bench.bench", never)
    said: list[str] = []
    trained: Any = SimpleNamespace(source=SimpleNamespace(model=None))
    assert workflow._timed(job, trained, said.append) is None
    assert said == ["not timed: no inputs of that kind can be made"]


def test_images_that_a_table_names_are_inputs_of_training(job: Job) -> None:
    pictures = replace(job, recipe=replace(job.recipe, model={"task": "image-classification"}))
    job.data.write_text("image,label\na.png,x\nb.png,y\n", encoding="utf-8")
    for name in ("a", "b", "c"):
        job.data.with_name(f"{name}.png").write_bytes(b"1")
    before, text_before = pictures.training_inputs(), job.training_inputs()
    job.data.with_name("c.png").write_bytes(b"2")  # which no row names
    assert pictures.training_inputs() == before
    job.data.with_name("b.png").write_bytes(b"2")
    assert [name for name, digest in pictures.training_inputs().items() if digest != before[name]] == ["data"]
    assert job.training_inputs() == text_before, "of a model of texts they are none"


def test_all_files_of_a_folder_of_images_are_inputs_of_training(job: Job) -> None:
    folder = job.data.with_name("images")
    (folder / "x").mkdir(parents=True)
    (folder / "x" / "a.png").write_bytes(b"1")
    before = replace(job, data=folder).training_inputs()
    assert replace(job, data=folder).training_inputs() == before
    (folder / "x" / "a.png").rename(folder / "x" / "b.png")
    assert replace(job, data=folder).training_inputs()["data"] != before["data"]
