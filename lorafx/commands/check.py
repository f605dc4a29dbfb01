"""The commands that check existing folders: merges by any tool, and certificates that lorafx wrote.

Imports inside the functions keep ``lorafx --help`` fast: torch and transformers load when a command needs them.
"""

from __future__ import annotations

from pathlib import Path

import click

from .shared import PATH, adapters_of, as_json_option, emit, quiet


@click.command("check-merge")
@click.argument("base", type=PATH)
@click.argument("adapters", nargs=-1, required=True)
@click.argument("merged", type=PATH)
@click.option("--task", help="Open both checkpoints for a task, e.g. text-classification.")
@as_json_option
def check_merge(base: Path, adapters: tuple[str, ...], merged: Path, task: str | None, as_json: bool) -> None:
    """Compare MERGED, made by any tool, with BASE plus ADAPTERS (FOLDER or FOLDER=WEIGHT); exit 4 when they differ.

    Names each tensor that is not base + adapter, and the mistake that explains it, if one does.
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


@click.command()
@click.argument("folder", type=PATH)
@click.option("--base", type=PATH, help="Where the base checkpoint is now.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=PATH,
    help="Where its adapter is now; repeat for several, in the order they were put on.",
)
@as_json_option
def check(folder: Path, base: Path | None, adapters: tuple[Path, ...], as_json: bool) -> None:
    """Check the certificate of a folder that lorafx wrote: its files, and what they were made from; exit 4 if broken.

    Where base and adapters are available, every tensor is composed from them again.
    """
    import dataclasses

    from ..errors import ParityError
    from ..proof.certificate import check_folder

    with quiet():
        found = check_folder(folder, base, adapters)
    emit({"ok": found.ok, **dataclasses.asdict(found)}, found.text(), as_json)
    if not found.ok:
        raise ParityError(f"{folder}: its certificate does not hold: {found.broken[0]}")
