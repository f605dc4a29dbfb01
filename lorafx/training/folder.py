"""The folder where a training keeps what it resumes from: marked as lorafx's, removed when training is done.

Other files in such a folder stay; a folder without the mark is not ours and is not written to.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path

from ..errors import ArtifactError, UsageError
from ..files.folder import is_free
from ..files.leftovers import locked
from ..files.whole import NotWrittenError, writing

#: The file that marks the folder, with what the training was made from.
MARK = "lorafx-training.json"


def check_training_folder(folder: Path, made_from: Mapping[str, str]) -> None:
    """UsageError when ``folder`` is not lorafx's, or holds checkpoints of a training on other inputs."""
    if is_free(folder):
        return
    if not (folder / MARK).is_file():
        raise UsageError(f"{folder}: lorafx did not write this, and training keeps its checkpoints there; move it away")
    changed = differences(_recorded(folder), made_from)
    if changed and _checkpoints(folder):
        raise UsageError(
            f"{folder}: an unfinished training of other inputs ({', '.join(changed)}); go on with those, or remove it"
        )


@contextmanager
def training_folder(folder: Path, made_from: Mapping[str, str]) -> Iterator[Path]:
    """A folder for complete checkpoints. When the block ends normally, what training wrote there is removed; when it
    raises, the checkpoints stay for resuming, and if there are none the folder is left as it was.

    Several processes of one training share the folder; the first one looks after it.

    Raises:
        UsageError: see :func:`check_training_folder`; or another process trains there
        ArtifactError: it cannot be written; checkpoints that were whole stay
    """
    if int(os.environ.get("RANK", "0")) > 0:
        yield folder
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with _held_alone(folder):
        check_training_folder(folder, made_from)
        try:
            with writing(folder):
                _drop_incomplete(folder)
                (folder / MARK).write_text(json.dumps(dict(made_from), indent=1), encoding="utf-8")
            with writing(folder, alone=False):
                yield folder
        except BaseException as error:
            if isinstance(error, NotWrittenError):
                _drop_incomplete(folder)
            if not _checkpoints(folder):
                _clear(folder, made)
            raise
        _clear(folder, [folder])


@contextmanager
def _held_alone(folder: Path) -> Iterator[None]:
    """Make ``folder`` and hold it: a second training would mix its checkpoints with those of the first, and remove
    them. UsageError where another process holds it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder))
        except BlockingIOError:
            raise UsageError(
                f"{folder}: another process is training there; wait for it, or choose another -o"
            ) from None
        yield


@contextmanager
def output_folder(output_dir: str | PathLike[str] | None) -> Iterator[Path]:
    """``output_dir``, removed again if it is new and nothing was saved; or a temporary folder."""
    if output_dir is None:
        with tempfile.TemporaryDirectory(prefix="lorafx-") as temporary:
            yield Path(temporary)
        return
    folder, there = Path(output_dir), Path(output_dir).exists()
    try:
        yield folder
    finally:
        first = int(os.environ.get("RANK", "0")) == 0
        if first and not there and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def resumed(folder: Path, resume: bool | str | PathLike[str]) -> str | None:
    """The checkpoint to start from, after checking that it is whole."""
    from .trainer import checkpoint_flaw, last_checkpoint

    if resume is False:
        # Complete or not, ours or not: the Trainer removes the oldest folder of such a name.
        old = max(folder.glob("checkpoint-*"), key=lambda left: (len(left.name), left.name), default=None)
        if old is not None:
            raise UsageError(f"{old}: left by an earlier training; resume it, remove it, or choose another output_dir")
        return None
    if resume is not True:
        flaw = checkpoint_flaw(Path(resume))
        if flaw:
            raise ArtifactError(f"{resume}: not a whole checkpoint: {flaw}")
        return str(resume)
    found = last_checkpoint(folder)
    if found is None:
        raise ArtifactError(f"{folder}: no whole checkpoint to resume from; train without resume")
    return str(found)


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names under which two records differ."""
    return [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]


def _recorded(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / MARK).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return {"its record": "broken"}


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.is_dir()]


def _drop_incomplete(folder: Path) -> None:
    """Remove checkpoints whose writer was killed, or found no room: nothing can be resumed from them."""
    from .trainer import checkpoint_flaw

    for checkpoint in _checkpoints(folder):
        if checkpoint_flaw(checkpoint):
            shutil.rmtree(checkpoint)


def _clear(folder: Path, made: list[Path]) -> None:
    """Remove what training wrote, and the folders of ``made`` that are empty then."""
    for checkpoint in _checkpoints(folder):
        shutil.rmtree(checkpoint)
    (folder / MARK).unlink(missing_ok=True)
    for path in made:
        if not path.is_dir() or path.is_symlink() or any(path.iterdir()):
            break
        path.rmdir()
