"""The commands of knowledge editing: edit, and patch to put what it makes on and off.

Imports inside the functions keep ``lorafx --help`` fast: torch and transformers load when a command needs them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..editing.requests import EditOptions
from .flags import option_flags, option_values
from .shared import PATH, as_json_option, emit, out_option, overwrite_option, quiet, read_lines

if TYPE_CHECKING:
    from ..editing.edit import EditResult

_CHECKPOINT = click.argument("checkpoint", type=PATH)
_PATCH = click.argument("patch", type=PATH)


@click.command()
@_CHECKPOINT
@click.option("--edits", required=True, type=PATH, help="JSON Lines: prompt, target, …")
@out_option
@click.option("--prompts", type=PATH, help="Unrelated prompts, one a line, to measure side effects.")
@click.option(
    "--sequential/--separate",
    default=True,
    show_default=True,
    help="Make each edit on the result of the one before, into one patch; or each on CHECKPOINT, into its own patch.",
)
@option_flags(EditOptions)
@overwrite_option
@as_json_option
def edit(checkpoint: Path, edits: Path, out: Path, prompts: Path | None, sequential: bool, **o: Any) -> None:
    """Teach a causal language model new continuations and write them as sparse patches.

    A row of the edits file has a prompt and a target; paraphrases (further prompts the target should follow) and
    locality (prompts whose continuation should stay) are optional lists of texts.
    """
    from ..editing.requests import read_edits
    from ..files.folder import check_writable

    options = EditOptions(**option_values(EditOptions, o))
    requests, unrelated = read_edits(edits), read_lines(prompts) if prompts is not None else ()
    check_writable(out, o["overwrite"])

    from ..editing.edit import edit as run

    with quiet():
        result = run(
            checkpoint,
            requests,
            prompts=unrelated,
            sequential=sequential,
            options=options,
            say=lambda line: click.echo(line, err=True),
        )
    _write(result, checkpoint, out, o["overwrite"])
    emit(result.to_json(), result.text(), o["as_json"])


def _write(result: EditResult, checkpoint: Path, out: Path, overwrite: bool) -> None:
    from ..editing.patch import PATCH
    from ..files.folder import new_folder
    from ..files.places import checkpoint_name
    from ..models.identity import weight_hashes

    names = [PATCH] if result.sequential else [f"patch-{n:03d}.safetensors" for n in range(len(result.patches))]
    base = {"name": checkpoint_name(checkpoint), "hashes": weight_hashes(checkpoint)}
    meta = {"base": base, "patches": names, "options": dataclasses.asdict(result.options)}
    with new_folder(out, "edit", meta, overwrite) as folder:
        for name, patch in zip(names, result.patches, strict=True):
            patch.save(folder / name)
        text = json.dumps(result.to_json(), indent=2, ensure_ascii=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")


@click.group()
def patch() -> None:
    """Put sparse patches on checkpoints and take them off, bit by bit."""


@patch.command()
@_CHECKPOINT
@_PATCH
@out_option
@overwrite_option
def apply(checkpoint: Path, patch: Path, out: Path, overwrite: bool) -> None:
    """Write CHECKPOINT with PATCH applied."""
    from ..editing.patch import Patch
    from ..editing.patch_folder import apply as run

    loaded = Patch.load(patch)
    run(checkpoint, loaded, out, overwrite=overwrite)
    click.echo(f"{out}: {loaded.changed:,} weights changed in {len(loaded.changes)} tensors")


@patch.command()
@_CHECKPOINT
@_PATCH
@out_option
@overwrite_option
def revert(checkpoint: Path, patch: Path, out: Path, overwrite: bool) -> None:
    """Write CHECKPOINT as it was before PATCH was applied, byte by byte."""
    from ..editing.patch import Patch
    from ..editing.patch_folder import revert as run

    loaded = Patch.load(patch)
    run(checkpoint, loaded, out, overwrite=overwrite)
    click.echo(f"{out}: {loaded.changed:,} weights put back in {len(loaded.changes)} tensors")


@patch.command()
@click.argument("base", type=PATH)
@click.argument("edited", type=PATH)
@click.option("--out", "-o", required=True, type=PATH, help="The patch file to make.")
@overwrite_option
def make(base: Path, edited: Path, out: Path, overwrite: bool) -> None:
    """Write the patch that leads from BASE to EDITED, two checkpoints of the same tensors."""
    from ..editing.patch_folder import between

    made = between(base, edited)
    made.save(out, overwrite=overwrite)
    click.echo(f"{out}: {made.changed:,} weights in {len(made.changes)} tensors")


@patch.command()
@_PATCH
@as_json_option
def inspect(patch: Path, as_json: bool) -> None:
    """Show what PATCH changes."""
    from ..editing.patch import Patch
    from ..reporting.render import draw_text, section_of

    loaded = Patch.load(patch)
    shown = ("dtype", "shape", "changed", "share", "largest_change")
    rows = [{"tensor": change.name} | {key: change.to_json()[key] for key in shown} for change in loaded.changes]
    sections = [section_of("Made for", loaded.about)] if loaded.about else []
    lines = [f"{loaded.changed:,} weights in {len(loaded.changes)} tensors"]
    emit(loaded.to_json(), draw_text(lines, [*sections, section_of("Tensors", rows)], 120), as_json)
