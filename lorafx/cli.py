"""The command line. Results go to stdout, progress and logs to stderr; errors are one line and a stable exit code.

Nothing heavy is imported until a command needs it, so that ``lorafx --help`` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from . import __version__
from .errors import LorafxError, UsageError
from .flags import parse_shape, read_recipe, train_flags, train_options

if TYPE_CHECKING:
    from .program import Program

_FLAGS = {"ignore_unknown_options": True, "allow_extra_args": True}


class _Group(click.Group):
    """Prints lorafx's errors as one line and turns them into exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        debug = ctx.params.get("debug", False)
        try:
            return super().invoke(ctx)
        except (LorafxError, click.ClickException, click.Abort, click.exceptions.Exit) as error:
            if debug or not isinstance(error, LorafxError):
                raise
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except Exception as error:
            if debug:
                raise
            first = (str(error).strip().splitlines() or [""])[0]
            _fail(f"internal error: {type(error).__name__}: {first} (run again with --debug for the traceback)", 1)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"lorafx: error: {' '.join(message.split())}", err=True)
    sys.exit(code)


@click.group(cls=_Group)
@click.version_option(__version__, prog_name="lorafx")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.option("--verbose", "-v", is_flag=True, help="Show the libraries' own logs.")
def main(debug: bool, verbose: bool) -> None:
    """A compiler for fine-tuned models: rewrite, train, fold, export, and prove each step.

    Exit codes: 0 ok, 1 internal, 2 usage, 3 capture unsupported, 4 parity failed, 5 unusable file.
    """
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TORCH_LOGS", "-export")


# ---- shared pieces


def _shared(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        for decorate in reversed(options):
            function = decorate(function)
        return function

    return add


_as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_out = click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="The folder to make.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
_task = _shared(
    click.option("--task", help="Open the checkpoint for a task, e.g. text-classification."),
    click.option("--num-labels", type=int, help="Size of the classification head."),
)
_checkpoint_options = _shared(
    click.option("--allow-pickle", is_flag=True, help="Load .bin weights (weights only)."),
    click.option("--trust-remote-code", is_flag=True, help="Run model code from the checkpoint folder."),
)
_recipe = _shared(
    click.option("--recipe", type=click.Path(path_type=Path), help="A TOML recipe."),
    click.option("--pass", "passes", multiple=True, help="Append a pass; its options are --NAME.OPTION VALUE."),
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries from writing progress to stdout and warnings about their own internals to stderr."""
    import warnings

    with warnings.catch_warnings():
        if os.environ.get("TRANSFORMERS_VERBOSITY") == "error":
            warnings.simplefilter("ignore")
        yield


def _emit(value: Any, text: str, as_json: bool) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False) if as_json else text)


def open_program(path: Path, **options: Any) -> Program:
    """The program in a folder: one lorafx wrote, or a checkpoint to capture."""
    from .store import load

    return load(path, **{key: value for key, value in options.items() if value not in (None, False)})


# ---- commands


@main.command(context_settings=_FLAGS)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@_recipe
@click.option("--out", "-o", type=click.Path(path_type=Path), help="The run folder to make.")
@_task
@_checkpoint_options
@click.option("--dry-run", is_flag=True, help="Print every site and every miss, and change nothing.")
@click.option("--verify-each", is_flag=True, help="Hold every pass to its numeric promise (reads the weights).")
@click.option("--double", is_flag=True, help="Verify in fp64.")
@click.option("--dump", type=click.Path(path_type=Path), help="Write the graph after every pass into this folder.")
@click.option("--seed", type=int, default=None, help="Seed of the initial adapter values.")
@_overwrite
@_as_json
@click.pass_context
def rewrite(ctx: click.Context, checkpoint: Path, recipe: Path | None, passes: tuple[str, ...], **o: Any) -> None:
    """Insert a recipe's passes into CHECKPOINT and write a trainable run folder."""
    from .capture import capture
    from .observe import Dump, Observer, VerifyEach
    from .pipeline import rewrite as apply
    from .store import save_run

    steps = read_recipe(recipe, passes, ctx.args)
    if o["out"] is None and not o["dry_run"]:
        raise UsageError("give -o FOLDER for the run, or --dry-run to look at the sites")
    task = o["task"] or steps.model.get("task")
    num_labels = o["num_labels"] or steps.model.get("num_labels")
    dtype = {"dtype": steps.model["dtype"]} if "dtype" in steps.model else {}
    opened = {"allow_pickle": o["allow_pickle"], "trust_remote_code": o["trust_remote_code"], **dtype}
    seed = o["seed"] if o["seed"] is not None else steps.model.get("seed", 0)
    _seed(seed)
    observers: list[Observer] = [Dump(o["dump"])] if o["dump"] else []
    observers += [VerifyEach(double=o["double"])] if o["verify_each"] else []
    with _quiet():
        program = capture(checkpoint, task, num_labels, meta=not o["verify_each"], **opened)
        program = apply(program, steps, observers)
        if o["out"] is not None and not o["dry_run"]:
            save_run(program, o["out"], o["overwrite"], train=steps.train, seed=seed)
    report = program.report
    _emit(report.to_json(), report.text(), o["as_json"])


def _seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Training table: csv, jsonl or parquet.")
@click.option("--eval", "eval_data", type=click.Path(path_type=Path), help="Evaluation table.")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Write the trained run here (default: into RUN).")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of an interrupted training.")
@train_flags
@_overwrite
@_as_json
def train(run: Path, data: Path, eval_data: Path | None, out: Path | None, resume: bool, **o: Any) -> None:
    """Train the run folder RUN on a table, with HF Trainer."""
    import shutil

    from .folder import check_free
    from .store import load, run_recipe, save_run
    from .training import train as fit

    options = train_options(run_recipe(run), o)
    target, overwrite = out or run, o["overwrite"] or out is None
    check_free(target, overwrite)  # before hours of training, not after
    checkpoints = Path(f"{target}.checkpoints")
    with _quiet():
        program = load(run)
        result = fit(program, data, eval_data=eval_data, output_dir=checkpoints, resume=resume, **options)
        if not result.is_main:
            return
        report = program.report.plus(training=result.to_json())
        save_run(program, target, overwrite, train=options, report=report)
    shutil.rmtree(checkpoints, ignore_errors=True)
    _emit(report.to_json(), report.text(), o["as_json"])


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@_out
@click.option("--verify-each", is_flag=True, help="Hold every fold pass to its numeric promise.")
@click.option("--double", is_flag=True, help="Verify in fp64.")
@_overwrite
@_as_json
def fold(run: Path, out: Path, verify_each: bool, double: bool, overwrite: bool, as_json: bool) -> None:
    """Fold everything RUN learned into its base and write an ordinary checkpoint (or a .pt2 where none can hold it)."""
    from .export import export as write
    from .export import fits_checkpoint
    from .observe import VerifyEach
    from .pipeline import fold as merge

    with _quiet():
        program = open_program(run)
        folded = merge(program, [VerifyEach(double=double)] if verify_each else [])
        kind = "hf" if fits_checkpoint(folded) else "pt2"
        result = write(folded, out, kind, overwrite=overwrite)
    report = folded.report.plus(parity=result.to_json() if result else None, output=str(out))
    _emit(report.to_json(), report.text(), as_json)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@_out
@click.option("--format", "kind", type=click.Choice(["onnx", "hf", "pt2"]), default="onnx", show_default=True)
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Convert to this dtype.")
@click.option("--adapters", type=click.Choice(["merged", "separate"]), default="merged", show_default=True)
@click.option("--generate", is_flag=True, help="Prefill and decode graphs with a cache (causal language models).")
@_task
@_overwrite
@_as_json
def export(run: Path, out: Path, kind: Any, provider: Any, dtype: str | None, adapters: Any, **o: Any) -> None:
    """Export a run, a folded folder or a checkpoint: ONNX by default, verified before the folder gets its name."""
    import torch

    from .export import export as write

    with _quiet():
        program = open_program(run, task=o["task"], num_labels=o["num_labels"])
        result = write(
            program,
            out,
            kind,
            provider=provider,
            adapters=adapters,
            dtype=getattr(torch, dtype) if dtype else None,
            generate=o["generate"],
            overwrite=o["overwrite"],
        )
    report = program.report.plus(parity=result.to_json() if result else None, output=str(out))
    _emit(report.to_json(), report.text(), o["as_json"])


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="The base folder (default: the recipe's).")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Training table: csv, jsonl or parquet.")
@click.option("--eval", "eval_data", type=click.Path(path_type=Path), help="Evaluation table.")
@_out
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@train_flags
@_as_json
def run(recipe: Path, checkpoint: Path | None, data: Path, eval_data: Path | None, out: Path, **o: Any) -> None:
    """Do all of RECIPE: rewrite, train, fold, export. Run again after an interruption, it goes on where it was."""
    from .recipe import Recipe
    from .workflow import Job, checkpoint_of, run_job

    steps = Recipe.read(recipe)
    job = Job(steps, checkpoint_of(steps, checkpoint), data, eval_data, out, train_options(steps, o), o["provider"])
    with _quiet():
        report = run_job(job, lambda line: click.echo(line, err=True))
    _emit(report.to_json(), report.text(), o["as_json"])


@main.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--texts", type=click.Path(path_type=Path), help="Compare on the lines of this file, not random tokens.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random inputs.")
@_as_json
def verify(a: Path, b: Path, texts: Path | None, seed: int, as_json: bool) -> None:
    """Compare what two folders compute, on the same inputs at several shapes; exit 4 when they differ."""
    from .errors import ParityError
    from .parity import verify as compare

    lines = texts.read_text(encoding="utf-8").splitlines() if texts else None
    with _quiet():
        result = compare(a, b, texts=lines, seed=seed)
    _emit(result.to_json(), result.text(), as_json)
    if not result.ok:
        raise ParityError(f"{a} and {b} differ: {result.summary}")


@main.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--shape", "shapes", multiple=True, help="batch x length, e.g. 8x64 (repeat).")
@click.option("--threads", type=int, help="Threads of each candidate.")
@click.option("--repeats", type=int, default=20, show_default=True)
@_as_json
def bench(folders: tuple[Path, ...], shapes: tuple[str, ...], threads: int | None, repeats: int, as_json: bool) -> None:
    """Time folders side by side: interleaved, medians and ratios, memory and size."""
    from .bench import bench as measure

    parsed = tuple(parse_shape(text) for text in shapes) or ((1, 64), (8, 64), (32, 128))
    with _quiet():
        result = measure(*folders, shapes=parsed, threads=threads, repeats=repeats)
    _emit(result.to_json(), result.text(), as_json)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@_task
@_checkpoint_options
@_as_json
def inspect(folder: Path, as_json: bool, **o: Any) -> None:
    """Show what a folder holds: its sites, tensors by role and history."""
    from .store import find_manifest

    with _quiet():
        manifest = find_manifest(folder)
        if manifest is not None and manifest.kind in ("onnx", "pt2"):
            _emit(manifest.to_json(), json.dumps(manifest.to_json(), indent=2), as_json)
            return
        program = open_program(folder, **o)
    sites = program.sites()
    rows = [{"site": site.module, "kind": site.kind, "role": site.role, "block": site.block} for site in sites]
    report = program.report
    text = "\n".join([report.text(), "", *map(str, sites)])
    _emit({**report.to_json(), "weight_uses": rows}, text, as_json)


@main.command()
@click.argument("name", required=False)
@_as_json
def passes(name: str | None, as_json: bool) -> None:
    """List the passes, or show one with its options."""
    from .registry import known, summary

    if name is None:
        rows = {name: summary(name) for name in known()}
        width = max(map(len, rows))
        _emit(rows, "\n".join(f"{name:<{width}}  {line}" for name, line in rows.items()), as_json)
        return
    import inspect as python_inspect
    import typing

    from .recipe import type_name
    from .registry import options, pass_class

    cls = pass_class(name)
    hints = typing.get_type_hints(cls)
    rows = {
        key: {"type": type_name(hints[key]), "default": getattr(cls(), key), "help": field.metadata["help"]}
        for key, field in options(cls).items()
    }
    lines = [python_inspect.getdoc(cls) or "", "", f"Promise: {cls.promise.value}", "", "Options:"]
    lines += [f"  {key} ({row['type']}; default {row['default']!r}): {row['help']}" for key, row in rows.items()]
    _emit({"name": name, "promise": cls.promise.value, "options": rows}, "\n".join(lines), as_json)


if __name__ == "__main__":
    main()
