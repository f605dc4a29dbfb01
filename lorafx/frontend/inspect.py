"""What a program or a folder holds, as a report: the same whether it was captured, trained, folded or exported."""

from __future__ import annotations

from os import PathLike
from typing import Any

from ..errors import UsageError
from ..files.folder import find_manifest
from ..models.hub import local_folder
from ..public import Program
from ..reporting.report import Report, read_report
from .load import load


def inspect(source: Program | str | PathLike[str], **options: Any) -> Report:
    """The report of a program, or of a folder.

    Args:
        source: a program; a run or a checkpoint, which is opened; or what lorafx exported, whose report is read
        options: how a folder is opened, as for :func:`lorafx.load`

    Raises:
        ArtifactError: the folder cannot be used, or is not of a model
        UsageError: options for a folder that is not opened
    """
    source = source if isinstance(source, Program) else local_folder(source)
    manifest = None if isinstance(source, Program) else find_manifest(source)
    if not isinstance(source, Program) and (manifest is None or manifest.kind in ("run", "hf")):
        return load(source, **options).report
    if options:
        raise UsageError(f"{next(iter(options))} is for opening a run or a checkpoint; leave it out")
    return source.report if isinstance(source, Program) else read_report(source)
