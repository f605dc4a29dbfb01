"""Files that are whole or not there, and the one line that is said when one cannot be written.

Python tells of a failed write by OSError, libraries in compiled code by errors of their own: both become that line.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ArtifactError, LorafxError, first_line

try:
    import fcntl
except ImportError:  # no such locks on this platform: leftovers of killed writers stay until removed by hand
    fcntl = None

#: What to do about the failures that a file system reports, by their numbers.
_ROOM = "make room there, then do it again"
_RIGHTS = "change its permissions, or choose another place"
_TO_DO = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "larger files are not allowed there (see `ulimit -f`); choose another place",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: "choose another place",
    errno.ENOTDIR: "choose another place",
    errno.EIO: "see to that disk, or choose another place",
}
#: How the libraries that are written in Rust end the message of such a failure.
_NUMBERED = re.compile(r"\(os error (\d+)\)")
#: How PyTorch's writer of archives tells that its file took less than it was given; it gives no number.
_ARCHIVE = ("PytorchStreamWriter failed", "inline_container.cc")


class NotWrittenError(ArtifactError):
    """A file or folder that cannot be written; ``failure`` is what the system said."""

    def __init__(self, target: Path, failure: OSError):
        super().__init__(f"{place_of(failure, target)}{said(failure)}")
        self.failure = failure


def failure_of(error: BaseException) -> OSError | None:
    """The failure of a file system that an error tells of; None for errors of other kinds."""
    if isinstance(error, NotWrittenError):
        return error.failure
    if isinstance(error, LorafxError):
        return None
    if isinstance(error, OSError):
        return error if error.errno in _TO_DO else None
    numbered = _NUMBERED.search(str(error))
    if numbered:
        number = int(numbered[1])
        return OSError(number, os.strerror(number)) if number in _TO_DO else None
    archive = isinstance(error, RuntimeError) and any(words in str(error) for words in _ARCHIVE)
    return OSError(first_line(error)) if archive else None


def said(failure: OSError) -> str:
    """What is wrong, and what to do about it."""
    to_do = _TO_DO.get(failure.errno or 0, "see that there is room, and that it may be written to")
    return f"{failure.strerror or first_line(failure)}; {to_do}"


def place_of(failure: OSError, target: Path) -> str:
    """Where a failure of writing ``target`` was: there, unless the system names a file that is elsewhere."""
    # Where it names two, one was read and the other written.
    if not isinstance(failure.filename, (str, bytes)) or failure.filename2 is not None:
        return f"{target}: cannot be written: "
    named, place = (Path(os.path.realpath(os.fsdecode(path))) for path in (failure.filename, target))
    beside = named.relative_to(place.parent).parts[:1] if place.parent in named.parents else ()
    own = beside and (beside[0] == place.name or beside[0].startswith(f".{place.name}."))
    if own or named in place.parents:
        return f"{target}: cannot be written: "
    return f"{os.fsdecode(failure.filename)}: cannot be used: "


@contextmanager
def writing(target: Path, *, alone: bool = True) -> Iterator[None]:
    """Raise :class:`NotWrittenError` for ``target`` where the block fails to write; ``alone``: any OSError is that."""
    try:
        yield
    except BlockingIOError:  # a lock that another process holds
        raise
    except Exception as error:
        failure = failure_of(error) or (error if alone and isinstance(error, OSError) else None)
        if failure is None:
            raise
        raise NotWrittenError(target, failure) from error


def write_whole(file: Path, data: str | bytes) -> None:
    """Write a file that appears whole or not at all, in place of one of its name; its folders are made too.

    A device or a pipe is written to as it is. NotWrittenError where it cannot be written.
    """
    with writing(file):
        data = data.encode() if isinstance(data, str) else data
        target = file.resolve()
        if target.exists() and not target.is_file():
            target.write_bytes(data)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            with temporary.open("wb") as stream:
                _lock(stream.fileno())
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
                if os.name != "nt":  # renamed under its lock; there, an open file cannot be
                    temporary.replace(target)
            if os.name == "nt":
                temporary.replace(target)
        finally:
            with suppress(OSError):
                temporary.unlink()


def _lock(handle: int) -> None:
    """Hold a file until it is closed or the process ends; BlockingIOError where another process does."""
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sweep(target: Path) -> None:
    """Remove what killed writers of ``target`` left beside it: temporary files that no process holds."""
    if fcntl is None:
        return
    for left in target.parent.glob(f".{glob.escape(target.name)}.tmp-*"):
        with suppress(OSError), left.open("rb") as stream:
            _lock(stream.fileno())
            left.unlink()
