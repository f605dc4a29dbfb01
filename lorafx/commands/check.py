"""The commands that check what was written, by anyone: merges, and the certificates of folders.

Imports inside the functions keep ``lorafx --help`` fast: torch and transformers load when a command needs them.
"""

from __future__ import annotations

from pathlib import Path

import click

from .shared import adapters_of, as_json_option, emit, quiet


@click.command("check-merge")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapters", nargs=-1, required=True)
@click.argument("merged", type=click.Path(path_type=Path))
@click.option("--task", help="Open both checkpoints for a task, e.g. text-classification.")
@as_json_option
def check_merge(base: Path, adapters: tuple[str, ...], merged: Path, task: str | None, as_json: bool) -> None:
    """Hold MERGED, made by any tool, against BASE with ADAPTERS (FOLDER or FOLDER=WEIGHT); exit 4 when they differ.

    Each tensor that is not base + adapter is named, with what was done to it as far as can be told.
    """
    from ..errors import ParityError
    from ..proof.merges import check_merge as check

    given = adapters_of(adapters)
    assert given is not None
    with quiet():
        result = check(base, given, merged, task=task)
    emit(result.to_json(), result.text(), as_json)
    if not result.ok:
        raise ParityError(f"{merged}: {len(result.faults)} tensors are not base + adapter, first {result.faults[0]}")
