"""Write .pt2 files so that a full disk is an error: PyTorch's own writer ends the process there (std::terminate)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch


class _Remembering(io.RawIOBase):
    """A stream that never fails while it is written to: what the file refused first is raised by :meth:`settle`."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return 0  # torch.export.save rewinds a stream when it is done with it

    def write(self, data: Any, /) -> int:
        if self._failure is None:
            try:
                self._stream.write(data)
            except OSError as error:
                self._failure = error
        return len(data)

    def settle(self) -> None:
        """Raise the OSError of the first part that was not written."""
        if self._failure is not None:
            raise self._failure


def save_archive(program: torch.export.ExportedProgram, path: str | Path) -> None:
    """``torch.export.save``, but OSError where the file cannot be written."""
    with open(path, "wb") as file:
        stream: Any = _Remembering(file)
        torch.export.save(program, stream)
        stream.settle()


@contextmanager
def refusing_archives() -> Iterator[None]:
    """Let transformers' exporter write by :func:`save_archive`."""
    from transformers.exporters.exporter_dynamo import DynamoExporter

    before = DynamoExporter.__dict__["save_program"]
    DynamoExporter.save_program = staticmethod(save_archive)
    try:
        yield
    finally:
        DynamoExporter.save_program = before
