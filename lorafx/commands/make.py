"""The commands that make a folder: rewrite, train, fold, export, and run for all of them.

Imports inside the functions keep ``lorafx --help`` fast: torch and transformers load when a command needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from ..files.folder import check_writable
from .flags import GroupedCommand, read_recipe, train_flags, train_options
from .shared import (
    PATH,
    adapter_option,
    adapters_of,
    after_all,
    as_json_option,
    check_of,
    check_option,
    check_options,
    checkpoint_options,
    details_option,
    open_program,
    opened_by,
    opening,
    opening_options,
    out_option,
    overwrite_option,
    provider_option,
    quiet,
    recipe_options,
    removal_of,
    seldom_collecting,
    stream_option,
    streams,
    task_options,
    tell,
    width_options,
    widths,
)

_FORMATS = ["onnx", "hf", "layered", "pt2", "peft", "onnx-adapter"]
_TABLE = "Training table: csv, tsv, jsonl, json or parquet; or a folder with a folder of images for each class."
_HELD_OUT = "Evaluation table: scored before the first step and after every epoch."
_KEPT = ["merged", "separate", "slots"]
_FLAGS = {"ignore_unknown_options": True, "allow_extra_args": True}


@click.command(context_settings=_FLAGS)
@click.argument("checkpoint", type=PATH)
@recipe_options
@adapter_option
@click.option("--out", "-o", type=PATH, help="The run folder to make.")
@task_options
@click.option("--ignore-mismatched-sizes", is_flag=True, help="Start a head of another size at random.")
@checkpoint_options
@click.option("--dry-run", is_flag=True, help="Print every site and every miss, and change nothing.")
@check_option
@click.option("--verify-each", is_flag=True, help="Read the weights, so that what passes promise can be checked.")
@click.option("--double", is_flag=True, help="With --verify-each: check the passes in fp64 too.")
@click.option("--dump", type=PATH, help="Write the graph after every pass into this folder.")
@click.option("--seed", type=int, default=None, help="Seed of the initial adapter values.")
@overwrite_option
@details_option
@as_json_option
@click.pass_context
@seldom_collecting()
def rewrite(ctx: click.Context, checkpoint: Path, recipe: Path | None, passes: tuple[str, ...], **o: Any) -> None:
    """Insert a recipe's passes into CHECKPOINT, or a LoRA adapter of PEFT's, and write a trainable run folder."""
    from transformers import set_seed

    from ..apply import Dump, Observer
    from ..formats.run import save_run
    from ..frontend.capture import capture
    from ..parity.promises import VerifyEach
    from ..pipeline import rewrite as apply

    if o["double"] and not (o["verify_each"] and o["check"]):
        raise UsageError("--double checks passes in fp64: give --verify-each with it, and leave --no-check out")
    adapters = adapters_of(o["adapters"])
    steps = read_recipe(recipe, passes, ctx.args, adapters is not None)
    if o["out"] is None and not o["dry_run"]:
        raise UsageError("give -o FOLDER for the run, or --dry-run to look at the sites")
    if o["out"] is not None and not o["dry_run"]:
        check_writable(o["out"], o["overwrite"])
    task = o["task"] or steps.model.get("task")
    num_labels = o["num_labels"] if o["num_labels"] is not None else steps.model.get("num_labels")
    opened = {"allow_pickle": o["allow_pickle"], "trust_remote_code": o["trust_remote_code"], **steps.opening}
    opened |= {"ignore_mismatched_sizes": True} if o["ignore_mismatched_sizes"] else {}
    seed = o["seed"] if o["seed"] is not None else steps.model.get("seed", 0)
    set_seed(seed)
    observers: list[Observer] = [Dump(o["dump"])] if o["dump"] else []
    observers += [VerifyEach(double=True)] if o["double"] else []
    with quiet():
        meta = adapters is None and not o["verify_each"]
        program = capture(checkpoint, task, num_labels, meta=meta, adapter=adapters, **opened)
        program = apply(program, steps, observers, check=o["check"])
        if o["out"] is not None and not o["dry_run"]:
            save_run(program, o["out"], o["overwrite"], train=steps.train, seed=seed)
    if o["dry_run"]:
        tell(program.report, {**o, "details": True}, "give -o FOLDER instead of --dry-run to write the run")
    else:
        tell(program.report, o, f"lorafx train {o['out']} --data TABLE", o["out"])


@click.command(cls=GroupedCommand)
@click.argument("run", type=PATH)
@click.option("--data", required=True, type=PATH, help=_TABLE)
@click.option("--eval", "eval_data", type=PATH, help=_HELD_OUT)
@click.option("--out", "-o", type=PATH, help="Write the trained run here (default: into RUN).")
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint of an interrupted training.")
@click.option(
    "--teacher",
    type=PATH,
    help="A run or checkpoint that --distill and --distill-hidden learn from (default: RUN as it is).",
)
@train_flags
@opening_options
@overwrite_option
@details_option
@as_json_option
def train(run: Path, data: Path, eval_data: Path | None, out: Path | None, **o: Any) -> None:
    """Train the run folder RUN on a table, with HF Trainer. Options win over those that RUN's recipe has under [train],
    and these over the defaults below."""
    from ..formats.run import save_run
    from ..frontend.load import load, run_recipe
    from ..training.fit import train as fit
    from ..training.folder import training_folder

    options = train_options(run_recipe(run), o)
    target, overwrite = out or run, o["overwrite"] or out is None
    check_writable(target, overwrite)
    with quiet():
        program = load(run, **opening(o))
        teacher = o["teacher"] and open_program(o["teacher"], **{**opening(o), "base": None})
        with training_folder(Path(f"{target}.checkpoints"), {}) as checkpoints:
            told = {"eval_data": eval_data, "output_dir": checkpoints, "resume": o["resume"], "teacher": teacher}
            result = fit(program, data, **told, **options)
            if not result.is_main:
                return
            save_run(program, target, overwrite, train=options)
    tell(program.report, o, f"lorafx export {target} -o {target.with_name('onnx')}", target)


@click.command()
@click.argument("run", type=PATH)
@out_option
@adapter_option
@check_options
@click.option("--verify-each", is_flag=True, hidden=True, help="Always on unless --no-check.")
@click.option("--double", is_flag=True, help="Check the passes in fp64.")
@width_options
@stream_option
@task_options
@opening_options
@overwrite_option
@details_option
@as_json_option
@seldom_collecting()
def fold(run: Path, out: Path, double: bool, overwrite: bool, **o: Any) -> None:
    """Fold everything RUN learned into its base and write an ordinary checkpoint: where its layers have other widths
    each and transformers does not read them yet, one that lorafx opens; where no config can say them, a .pt2.

    RUN is a run folder, or a checkpoint with --adapter.
    """
    from ..backends.export import export as write
    from ..formats.hf import folded_format
    from ..parity.promises import VerifyEach
    from ..pipeline import fold as merge
    from ..proof.exports import parity_record, unproven

    if o["stream"] and double:
        raise UsageError("--double runs every pass in fp64, in memory; leave it or --stream out")
    check, checked = check_of(o), bool(check_of(o))
    if double and not checked:
        raise UsageError("--double checks the passes, which --no-check turns off; leave one of them out")
    check_writable(out, overwrite)
    stream = not double and streams(run, o["base"], o["stream"])
    with quiet():
        program = open_program(run, check=checked and not stream, **_asked(o))
        observers = [VerifyEach(double=True)] if double else []
        removal = removal_of("cpu", **widths(o))
        folded = merge(program, observers, removal=removal, gather="never", check=checked, stream=stream)
        kind = folded_format(folded)
        result = write(folded, out, kind, check=check, overwrite=overwrite)
    report = folded.report.plus(parity=parity_record(result, unproven(checked)), output=str(out))
    tell(report, o, opened_by(out, kind), out)


@click.command()
@click.argument("run", type=PATH)
@out_option
@click.option(
    "--format",
    "kind",
    type=click.Choice(_FORMATS),
    default="onnx",
    show_default=True,
    help="onnx: for ONNX Runtime; hf: an ordinary transformers checkpoint; layered: one whose layers have other widths "
    "each, for lorafx; pt2: torch.export's; peft: a LoRA adapter for PEFT; onnx-adapter: a file that a base with slots "
    "takes at run time (--slots).",
)
@provider_option
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Convert to this dtype.")
@click.option(
    "--adapters",
    "kept",
    type=click.Choice(_KEPT),
    default="merged",
    show_default=True,
    help="merged: into the base's weights; separate: operators of their own, as they were trained; slots: the base "
    "with inputs that take any adapter at run time.",
)
@click.option(
    "--targets",
    multiple=True,
    default=("all-linear",),
    show_default=True,
    help="With --adapters slots: which weights get one (repeat, or separate by commas).",
)
@click.option("--slots", type=PATH, help="With --format onnx-adapter: the base that has the slots.")
@adapter_option
@click.option("--generate", is_flag=True, help="Export with a cache, for onnxruntime-genai and transformers.js.")
@click.option("--quantize", type=click.Choice(["int8", "int4"]), help="Quantise by ONNX Runtime; scored, not proven.")
@click.option("--data", type=PATH, help="A table to score a quantised graph on, before and after.")
@check_options
@width_options
@stream_option
@task_options
@opening_options
@overwrite_option
@details_option
@as_json_option
def export(run: Path, out: Path, kind: Any, provider: Any, dtype: str | None, kept: Any, **o: Any) -> None:
    """Export a run, a folded folder or a checkpoint: ONNX by default, verified before the folder gets its name."""
    import torch

    from ..backends.export import export as write
    from ..backends.export import writes_tiles
    from ..backends.quantized import check_quantized
    from ..pipeline import fold as merge
    from ..proof.checkpoint import refuse_check
    from ..reporting.report import read_report

    check, checked, generate = check_of(o), bool(check_of(o)), o["generate"]
    to = getattr(torch, dtype) if dtype else None
    checkpoint = kind in ("hf", "layered")
    refuse_check(check, "hf" if checkpoint else kind, to)  # before the weights are read
    check_quantized(o["quantize"], o["data"], kind, provider, to, kept, generate=generate)
    removal = removal_of(provider, **widths(o))
    if removal is not None and (kind in ("peft", "onnx-adapter") or kept != "merged"):
        raise UsageError("widths are those left by folding, and nothing is folded here; leave the width options out")
    late = writes_tiles(kind, kept, o["quantize"], generate=generate)
    if o["stream"] and not late:
        what = "a checkpoint and a graph that generates (merged, not quantised) are written a tile at a time"
        raise UsageError(f"only {what}: give --format hf or --generate, or no --stream")
    check_writable(out, o["overwrite"])
    stream = late and streams(run, o["base"], o["stream"])
    with quiet():
        program = open_program(run, check=checked and not stream, **_asked(o))
        if removal is not None or stream:
            gather = "never" if checkpoint else "auto"
            program = merge(program, provider=provider, removal=removal, gather=gather, check=checked, stream=stream)
        how: dict[str, Any] = {"provider": provider, "adapters": kept, "dtype": to, "check": check}
        how |= {name: o[name] for name in ("generate", "slots", "quantize", "data", "overwrite")}
        how["targets"] = [part.strip() for given in o["targets"] for part in given.split(",")]
        how["data_options"] = None if o["data"] is None else _trained_on(run)
        write(program, out, kind, **how)
    # As it was written: of what was folded on the way.
    report = read_report(out).plus(output=str(out))
    asked = "sound" if "input_features" in program.example else "generate"
    named = asked if generate else "slots" if kept == "slots" else kind
    tell(report, o, opened_by(out, named, run), out)


def _trained_on(run: Path) -> dict[str, Any]:
    """How a run's tables were read; nothing of a checkpoint."""
    from ..files.folder import find_manifest
    from ..frontend.load import run_recipe
    from ..models.hub import local_folder

    manifest = find_manifest(local_folder(run))
    return dict(run_recipe(run).train) if manifest is not None and manifest.kind == "run" else {}


def _asked(given: dict[str, Any]) -> dict[str, Any]:
    """How a command that writes a model opens the one it is made of."""
    asked = {"task": given["task"], "num_labels": given["num_labels"], "adapter": adapters_of(given["adapters"])}
    return {**asked, **opening(given)}


@click.command(cls=GroupedCommand)
@click.argument("recipe", type=PATH)
@click.option("--checkpoint", type=PATH, help="The base: a folder, or org/name (default: the recipe's).")
@click.option("--data", required=True, type=PATH, help=_TABLE)
@click.option("--eval", "eval_data", type=PATH, help=_HELD_OUT)
@out_option
@provider_option
@train_flags
@checkpoint_options
@details_option
@as_json_option
def run(recipe: Path, checkpoint: Path | None, data: Path, eval_data: Path | None, out: Path, **o: Any) -> None:
    """Do all of RECIPE: rewrite, train, fold, export. Run again after an interruption, it goes on where it was.
    Options win over those that RECIPE has under [train], and these over the defaults below."""
    from ..recipes.recipe import Recipe
    from .job import Job, checkpoint_of, run_job

    steps = Recipe.read(recipe)
    base, options = checkpoint_of(steps, checkpoint), train_options(steps, o)
    opened = (o["allow_pickle"], o["trust_remote_code"])
    job = Job(steps, base, data, eval_data, out, options, o["provider"], *opened)
    with quiet():
        report = run_job(job, lambda line: click.echo(line, err=True))
    tell(report, o, after_all(out, str(report.model["class"])), out / "onnx")
