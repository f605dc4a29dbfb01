"""The commands that change nothing: verify, generate, bench, inspect, report, latency, passes.

Imports inside the functions keep ``lorafx --help`` fast: torch and transformers load when a command needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ArtifactError, UsageError
from .flags import parse_shape
from .shared import (
    PATH,
    adapter_option,
    adapters_of,
    as_json_option,
    check_new_file,
    complete_passes,
    details_option,
    emit,
    open_program,
    opening,
    opening_options,
    overwrite_option,
    quiet,
    read_lines,
    task_options,
    tell,
    write_page,
)

if TYPE_CHECKING:
    from ..files.folder import Manifest


@click.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@click.option("--texts", type=PATH, help="Compare on the lines of this file, not random tokens.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random inputs.")
@adapter_option
@opening_options
@as_json_option
def verify(a: Path, b: Path, texts: Path | None, seed: int, as_json: bool, **o: Any) -> None:
    """Compare what two folders compute, on the same inputs at several shapes; exit 4 when they differ.

    With --adapter, A is a checkpoint that is compared with the adapter on it.
    """
    from ..errors import ParityError
    from ..proof.verify import verify as compare

    lines = read_lines(texts) if texts is not None else None
    adapters = adapters_of(o["adapters"])
    with quiet():
        first = a if adapters is None else open_program(a, adapter=adapters, **{**opening(o), "base": None})
        result = compare(first, b, texts=lines, seed=seed, **opening(o))
    emit(result.to_json(), result.text(), as_json)
    if not result.ok:
        raise ParityError(f"{a} and {b} differ: {result.summary}")


@click.command()
@click.argument("folder", type=PATH)
@click.option("--prompt", help="The text to continue.")
@click.option("--chat", help="What a user says, put into the tokenizer's chat template.")
@click.option("--max-new-tokens", "most", type=click.IntRange(1), default=64, show_default=True)
@opening_options
@as_json_option
def generate(folder: Path, prompt: str | None, chat: str | None, most: int, as_json: bool, **o: Any) -> None:
    """Generate text with FOLDER (a run, a checkpoint, a folded or an exported model), greedily, printed as it comes."""
    from ..proof.generate import generate as write

    text = prompt if prompt is not None else chat
    if text is None or (prompt is not None and chat is not None):
        raise UsageError("give a text: --prompt TEXT to go on with, or --chat TEXT to answer")
    with quiet():
        say = _nothing if as_json else lambda part: click.echo(part, nl=False)
        result = write(folder, text, chat is not None, most, say, **opening(o))
    if as_json:
        emit(result.to_json(), "", as_json)
        return
    click.echo()
    rate = result.to_json()["tokens_per_second"]
    speed = "" if rate is None else f", {rate:.1f} tokens/s after the first"
    click.echo(f"{len(result.tokens)} tokens, the first after {result.first:.2f} s{speed}", err=True)


def _nothing(part: str) -> None:
    """Do not print parts of a text that is printed as a whole."""


@click.command()
@click.argument("folders", nargs=-1, required=True, type=PATH)
@click.option("--shape", "shapes", multiple=True, help="batch x length, e.g. 8x64 (repeat).")
@click.option("--threads", type=int, help="Threads of each candidate.")
@click.option("--repeats", type=int, default=20, show_default=True)
@click.option(
    "--page",
    type=PATH,
    help="Draw a page into this file: times, and accuracy against speed of folders that were scored on the same rows.",
)
@overwrite_option
@opening_options
@as_json_option
def bench(folders: tuple[Path, ...], shapes: tuple[str, ...], page: Path | None, as_json: bool, **options: Any) -> None:
    """Time folders side by side: interleaved, medians and ratios, memory and size."""
    from ..proof.bench import SHAPES
    from ..proof.bench import bench as measure
    from ..proof.bench_page import bench_page

    parsed = tuple(parse_shape(text) for text in shapes) or SHAPES
    overwrite = options.pop("overwrite")
    if page is not None:
        check_new_file(page, "--page", overwrite)
    alike = len({folder.absolute().name for folder in folders}) < len(folders)
    named = [(str(folder), folder) for folder in folders] if alike else folders
    with quiet():
        result = measure(*named, shapes=parsed, **options)
    if page is not None:
        write_page(page, bench_page(result, folders))
    emit(result.to_json(), result.text(), as_json)


@click.command()
@click.argument("folder", type=PATH)
@task_options
@opening_options
@click.option("--axes", is_flag=True, help="List which channels of which tensors can be removed together, and why not.")
@details_option
@as_json_option
def inspect(folder: Path, axes: bool, details: bool, as_json: bool, **o: Any) -> None:
    """Show what a folder holds: its results, tensors by role and history; with --details, its sites."""
    from ..files.folder import find_manifest
    from ..models.hub import local_folder

    with quiet():
        manifest = find_manifest(local_folder(folder))
        if manifest is not None and manifest.kind not in ("run", "hf"):
            emit(manifest.to_json(), _of_files(manifest, details), as_json)
            return
        program = open_program(folder, **o)
    if axes:
        from ..channels.groups import axis_groups, group_rows

        groups = axis_groups(program)
        emit({"axes": group_rows(groups)}, "\n".join(map(str, groups)), as_json)
        return
    sites = program.sites()
    rows = [{"site": site.module, "kind": site.kind, "role": site.role, "block": site.block} for site in sites]
    shown = program.report
    following = "--details for every site and miss; --axes for what can be removed"
    text = shown.text(details=details, next_step=following, overview=True, folder=folder)
    emit({**shown.to_json(), "weight_uses": rows}, "\n".join([text, "", *map(str, sites if details else ())]), as_json)


def _of_files(manifest: Manifest, details: bool) -> str:
    """A folder that can no longer be opened as a program, in words: its report, and its files."""
    from ..reporting.contents import Contents, megabytes
    from ..reporting.report import REPORT, read_report

    lines = [f"{manifest.path}: {manifest.kind}, written by lorafx {manifest.version}"]
    if manifest.kind != "edit" and REPORT in manifest.files:
        lines.append(read_report(manifest.path).text(details=details, overview=True))
    files = Contents.of(manifest.path).files
    return "\n".join([*lines, "", *(f"{megabytes(size):>12}  {name}" for name, size in files)])


@click.command()
@click.argument("folder", type=PATH)
@click.option("--out", "-o", type=PATH, help="Draw the page again, into this file.")
@click.option("--open", "opens", is_flag=True, help="Open the page in a browser.")
@overwrite_option
@details_option
@as_json_option
def report(folder: Path, out: Path | None, opens: bool, overwrite: bool, **o: Any) -> None:
    """Print the report of FOLDER (a run, what was folded or exported, or all that `lorafx run` made), and say where its
    page is: report.html, a file that needs no others."""
    from ..files.folder import MANIFEST
    from ..reporting.report import PAGE, read_report

    found, page = read_report(folder), out or folder / PAGE
    whole = folder / "onnx" if (folder / "onnx" / MANIFEST).is_file() else folder
    if out is not None:
        check_new_file(out, "-o", overwrite)
        write_page(out, found.html())
    elif not page.is_file():
        raise ArtifactError(f"{folder}: no {PAGE}, an earlier lorafx wrote it; give -o FILE to draw one")
    tell(found, o, f"open {page}" if not opens else f"{page} is open", whole)
    if opens:
        import webbrowser

        if not webbrowser.open(page.resolve().as_uri()):
            raise UsageError(f"no browser was found; open {page} yourself")


@click.command()
@click.argument("folder", type=PATH)
@click.option("--shape", default="8x64", show_default=True, help="batch x length of the texts.")
@click.option("--threads", type=int, help="CPU threads.")
@opening_options
@as_json_option
def latency(folder: Path, shape: str, threads: int | None, as_json: bool, **o: Any) -> None:
    """Time the model on this machine by how wide it is: the table that a budget of latency reads, for a recipe."""
    from ..backends.latency import latency_table

    batch, length = parse_shape(shape)
    with quiet():
        table = latency_table(open_program(folder, **o), batch=batch, length=length, threads=threads)
    lines = [f'"{name}" = {seconds:.4e}' for name, seconds in table.items()]
    emit(table, "\n".join(["[pass.latency]", *lines]), as_json)


@click.command()
@click.argument("name", required=False, shell_complete=complete_passes)
@as_json_option
def passes(name: str | None, as_json: bool) -> None:
    """List the passes, or show one with its options."""
    from ..recipes.registry import known, summary

    if name is None:
        rows = {name: summary(name) for name in known()}
        width = max(map(len, rows))
        emit(rows, "\n".join(f"{name:<{width}}  {line}" for name, line in rows.items()), as_json)
        return
    import inspect as python_inspect
    import typing

    from ..ranges import range_of
    from ..recipes.recipe import default_text, type_name
    from ..recipes.registry import options, pass_class

    cls = pass_class(name)
    hints = typing.get_type_hints(cls)
    rows = {
        key: {
            "type": type_name(hints[key]),
            "range": str(range_of(field) or "") or None,
            "default": getattr(cls(), key),
            "help": field.metadata["help"],
        }
        for key, field in options(cls).items()
    }
    lines = [python_inspect.getdoc(cls) or "", "", f"Promise: {cls.promise.value}", "", "Options:"]
    for key, field in options(cls).items():
        held = " ".join(filter(None, (rows[key]["type"], rows[key]["range"])))
        lines.append(f"  {key} ({held}; default {default_text(field, rows[key]['default'])}): {rows[key]['help']}")
    emit({"name": name, "promise": cls.promise.value, "options": rows}, "\n".join(lines), as_json)
