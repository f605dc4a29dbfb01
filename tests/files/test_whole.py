"""Files that are whole or not there: whatever fails to write is one line, and leaves what was there as it was."""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from tqdm.auto import tqdm

from lorafx.backends.archives import save_archive
from lorafx.cli import main
from lorafx.errors import ArtifactError, UsageError
from lorafx.files.folder import check_writable, new_folder
from lorafx.files.whole import NotWrittenError, write_whole, writing
from lorafx.training.folder import MARK, training_folder

LARGE = bytes(1 << 16)


@contextmanager
def no_room(size: int = 1 << 12) -> Iterator[None]:
    """No file may become larger than ``size`` bytes: each way of writing fails where it would on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(action: Callable[[], object], *words: str) -> None:
    with no_room(), pytest.raises(NotWrittenError) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


# ---- files


def test_a_file_that_finds_no_room_leaves_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_whole(file, "before")
    refused(lambda: write_whole(file, LARGE), f"{file}: cannot be written: ", "; ")
    assert contents(tmp_path) == {"page.html": b"before"}
    write_whole(file, LARGE)
    assert contents(tmp_path) == {"page.html": LARGE}


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(tmp_path / "pipe", "text")
        assert os.read(reader, 10) == b"text"
    finally:
        os.close(reader)


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_holds_is_not(tmp_path: Path) -> None:
    dead, held, other = (tmp_path / f".{name}" for name in ("a.tmp-1-x", "a.tmp-2-x", "b.tmp-1-x"))
    for file in (dead, held, other):
        file.write_text("half")
    with held.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        write_whole(tmp_path / "a", "text")
    assert {file.name for file in tmp_path.iterdir()} == {"a", held.name, other.name}


# ---- folders, by whatever writes into them


def save_tensors(file: Path) -> None:
    save_file({"a": torch.zeros(1 << 14)}, file)


def save_torch(file: Path) -> None:
    torch.save({"a": torch.zeros(1 << 14)}, file)


def save_program(file: Path) -> None:
    save_archive(torch.export.export(torch.nn.Linear(64, 64), (torch.zeros(2, 64),)), file)


def save_numpy(file: Path) -> None:
    torch.zeros(1 << 14).numpy().tofile(file)


def save_text(file: Path) -> None:
    write_whole(file, LARGE)


@pytest.mark.parametrize("save", [save_tensors, save_torch, save_program, save_numpy, save_text])
def test_a_folder_that_finds_no_room_is_named_and_not_there(save: Callable[[Path], None], tmp_path: Path) -> None:
    def write() -> None:
        with new_folder(tmp_path / "out", "run", {}) as folder:
            save(folder / "file.pt2")

    refused(write, f"{tmp_path / 'out'}: cannot be written: ")
    assert not list(tmp_path.iterdir())
    write()
    assert (tmp_path / "out" / "file.pt2").stat().st_size > 1 << 12


def test_a_program_that_is_saved_by_way_of_python_is_the_same(tmp_path: Path) -> None:
    save_program(tmp_path / "ours.pt2")
    held = torch.export.load(tmp_path / "ours.pt2").state_dict
    assert {name: tuple(value.shape) for name, value in held.items()} == {"weight": (64, 64), "bias": (64,)}


def test_what_cannot_be_read_is_named_and_not_what_was_to_be_written(tmp_path: Path) -> None:
    def write() -> None:
        with new_folder(tmp_path / "out", "run", {}):
            (tmp_path / "base" / "shard").read_bytes()

    (tmp_path / "base" / "shard").mkdir(parents=True)
    refused(write, f"{tmp_path / 'base' / 'shard'}: cannot be used: Is a directory")


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for error in (UsageError("no"), ValueError("no"), OSError("not found")):
        with pytest.raises(type(error)) as caught, writing(tmp_path, alone=False):
            raise error
        assert caught.value is error


def test_a_place_below_a_file_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot be written: .*file is a file; choose another place"):
        check_writable(tmp_path / "file" / "out", overwrite=False)


@pytest.mark.parametrize("save", [save_tensors, save_torch])
def test_a_checkpoint_that_finds_no_room_leaves_the_ones_before(save: Callable[[Path], None], tmp_path: Path) -> None:
    def train() -> None:
        with training_folder(tmp_path / "kept", {"data": "a"}) as folder:
            (folder / "checkpoint-2").mkdir()
            save(folder / "checkpoint-2" / "optimizer.pt")

    refused(train, f"{tmp_path / 'kept'}: cannot be written: ")
    assert not list(tmp_path.iterdir())
    assert MARK not in contents(tmp_path)


def test_two_trainings_in_one_folder_are_one_too_many(tmp_path: Path) -> None:
    with training_folder(tmp_path / "kept", {"data": "a"}) as folder:
        (folder / "checkpoint-2").mkdir()
        with (
            pytest.raises(UsageError, match="kept: another process is training there; wait for it"),
            training_folder(folder, {"data": "a"}),
        ):
            pass
        assert (folder / "checkpoint-2").is_dir()
    assert not folder.exists()


# ---- commands


def test_a_pass_that_finds_no_room_is_begun_again(tmp_path: Path) -> None:
    words = ["new-pass", "my-thing", "--package", "-o", str(tmp_path)]
    with no_room(1000):
        result = CliRunner().invoke(main, words)
    assert result.exit_code == ArtifactError.exit_code
    assert "cannot be written" in result.stderr
    assert not list(tmp_path.iterdir())
    assert CliRunner().invoke(main, words).exit_code == 0


def test_a_report_that_finds_no_room_is_drawn_again(tmp_path: Path, tiny_checkpoint: Path) -> None:
    run, page = tmp_path / "run", tmp_path / "page.html"
    words = ["rewrite", str(tiny_checkpoint), "--pass", "lora", "-o", str(run), "--dump", str(tmp_path / "graphs")]
    with no_room(1000):
        result = CliRunner().invoke(main, words)
    assert result.exit_code == ArtifactError.exit_code, result.stderr
    assert "01-lora.txt: cannot be written" in result.stderr
    assert not contents(tmp_path)
    assert CliRunner().invoke(main, words).exit_code == 0
    with no_room():
        result = CliRunner().invoke(main, ["report", str(run), "-o", str(page)])
    assert result.exit_code == ArtifactError.exit_code, result.stderr
    assert not page.exists()
    assert CliRunner().invoke(main, ["report", str(run), "-o", str(page)]).exit_code == 0


def test_a_standard_output_without_room_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **more: object) -> None:
        if not more.get("err"):
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr("lorafx.commands.shared.click.echo", full)
    result = CliRunner().invoke(main, ["passes"])
    assert result.exit_code == ArtifactError.exit_code


def test_a_refusal_is_a_line_of_its_own_below_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    def halfway(*_: object) -> None:
        bars.append(tqdm(total=9, initial=4))
        raise UsageError("no")

    monkeypatch.setattr("lorafx.commands.look.emit", halfway)
    result = CliRunner().invoke(main, ["passes"])
    assert result.stderr.splitlines()[-1] == "lorafx: error: no"
    assert bars[0].disable  # closed
