"""Accuracy against measured seconds: lorafx's gates beside what else makes a fine-tuned MiniLM smaller.

    pip install -e ".[demo,bench]"                    # PEFT, Torch-Pruning, matplotlib
    python -m benchmarks.frontier train --jobs 2      # what is missing; resumable run by run
    python -m benchmarks.frontier time                # exports the models of the first fold, times all in one run
    python -m benchmarks.frontier table               # Markdown
    python -m benchmarks.frontier figure              # SVG

Every row has the same model, texts, folds and number of training steps; batch 32, AdamW at 1e-3 with linear decay.
Movie sentences: 3 epochs, at most 64 tokens; IMDB (``--data imdb``): 24,904 reviews, 1 epoch, their first 128 tokens.
Each text is held out once, in one of five folds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks import folds, frontier_exports, frontier_rows, frontier_show, jobs, mask_search, prune, rivals
from benchmarks.frontier_rows import LORA, RECIPES, Recipe, Run, Trained

BUDGETS = (0.8, 0.6, 0.4, 0.2)
SCORE = "score.json"
#: Rows that lorafx does not train.
RIVALS: dict[str, Callable[[Run], Trained]] = {
    "first-layers": rivals.first_layers,
    "tp-magnitude": rivals.torch_pruning("magnitude"),
    "tp-taylor": rivals.torch_pruning("taylor"),
    "tp-activation": rivals.torch_pruning("activation"),
    "mask-search": mask_search.mask_search,
}
ROWS = (*RECIPES, *RIVALS)
#: What others begin with, and no row of the table.
STARTS: dict[str, Callable[[Run], Trained]] = {rivals.START: rivals.start}


def needs(row: str, recipes: Mapping[str, Recipe]) -> tuple[str, ...]:
    """The rows whose run of the same fold a run of ``row`` begins with."""
    recipe = recipes.get(row)
    if recipe is None:
        return (rivals.START,) if row.startswith("tp-") else (LORA,) if row == "mask-search" else ()
    return (LORA,) if recipe.distils and not recipe.own_teacher else ()


def folder_of(out: Path, data: str, row: str, budget: float, fold: int) -> Path:
    """Where one run is kept."""
    return prune.folder_of(out / data / row, budget, fold, folds=True)


def alone(row: str) -> bool:
    """Whether a row has one budget: all that there is."""
    return row == LORA or row in STARTS


def wanted(rows: Sequence[str], budgets: Sequence[float], recipes: Mapping[str, Recipe]) -> list[tuple[str, float]]:
    """The rows and budgets to train, those that others need first."""
    needed = [row for name in rows for row in needs(name, recipes)]
    order = dict.fromkeys([*needed, *(row for row in rows if alone(row)), *rows])
    return [(row, budget) for row in order for budget in ([1.0] if alone(row) else budgets)]


# ---- one run, in a process of its own


def one(options: argparse.Namespace, recipes: Mapping[str, Recipe]) -> None:
    """Train and score one run; ``score.json`` is written last."""
    started = time.perf_counter()
    row, budget, fold = options.one[0], float(options.one[1]), int(options.one[2])
    folder = folder_of(options.out, options.data, row, budget, fold)
    beside = {name: folder_of(options.out, options.data, name, 1.0, fold) for name in needs(row, recipes)}
    keep = fold == 0 or alone(row)
    run = Run(options.data, row, budget, fold, folder, beside, options.tokens, options.device, options.steps, keep)
    folder.mkdir(parents=True, exist_ok=True)
    other = {**RIVALS, **STARTS}.get(row)
    trained = frontier_rows.train(run, recipes[row]) if other is None else other(run)
    values = frontier_rows.scored(run, trained, started)
    partial = folder / f"{SCORE}.partial"
    partial.write_text(json.dumps(values, indent=1), encoding="utf-8")
    partial.replace(folder / SCORE)
    share = trained.weights[1] / trained.weights[0]
    print(
        f"{options.data} {row} {budget:.0%} fold {fold}: {values['accuracy']:.4f}, {share:.1%} kept, "
        f"{trained.seconds:.0f} s of {values['whole_seconds']:.0f}",
        flush=True,
    )


def train(options: argparse.Namespace, recipes: Mapping[str, Recipe]) -> None:
    """Train what is missing. A run that fails is reported, and the others go on."""
    for row, recipe in frontier_rows.recorded(options.out / options.data).items():
        if recipes.get(row, recipe) != recipe:
            raise SystemExit(f"{row} was trained with other options in {options.out}; give the variant another name")
    folds.encoded(options.data, options.tokens)
    own = ["--out", str(options.out), "--tokens", str(options.tokens), "--data", options.data]
    own += ["--device", options.device]
    own += ["--steps", str(options.steps)] if options.steps else []
    own += [part for text in options.variant for part in ("--variant", text)]
    every = []
    for row, budget in wanted(options.rows, options.budgets, recipes):
        for fold in options.folds:
            folder = folder_of(options.out, options.data, row, budget, fold)
            command = [sys.executable, "-m", "benchmarks.frontier", "train", *own]
            asked = ["--one", row, str(budget), str(fold)]
            begin = [folder_of(options.out, options.data, name, 1.0, fold) / SCORE for name in needs(row, recipes)]
            every.append(
                jobs.Job(folder.relative_to(options.out).as_posix(), [*command, *asked], folder / SCORE, tuple(begin))
            )
    until = time.monotonic() + options.stop_after if options.stop_after else None
    hidden = {} if options.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    failed = jobs.run_missing(every, options.jobs, hidden, until)
    missing = [job.name for job in every if not job.done.is_file()]
    size = sum(frontier_show.read(job.done).get("bytes", 0) for job in every)
    print(f"{len(every) - len(missing)} of {len(every)} runs are finished; what they trained takes {size / 1e6:.1f} MB")
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {', '.join(failed)}; run again to repeat them")


# ---- what the runs gave


def finished(options: argparse.Namespace, recipes: Mapping[str, Recipe]) -> list[frontier_show.Point]:
    """The rows at their budgets, as far as they are trained; and timed, where they are."""
    runs = []
    for row, budget in wanted(options.rows, options.budgets, recipes):
        files = [folder_of(options.out, options.data, row, budget, fold) / SCORE for fold in options.folds]
        if row not in STARTS:
            runs += [frontier_show.read(file) for file in files if file.is_file()]
    if not runs:
        raise SystemExit(
            f"no run of {options.data} in {options.out} is finished; run: python -m benchmarks.frontier train"
        )
    return frontier_show.points(runs, frontier_show.read(times_file(options)).get("times", {}))


def times_file(options: argparse.Namespace) -> Path:
    """Where the times of a data set's models are kept."""
    return options.out / options.data / "times.json"


def time_models(options: argparse.Namespace, recipes: Mapping[str, Recipe]) -> None:
    """Export the finished models of the first fold and time all of them beside each other."""
    folders: dict[str, Path] = {}
    for point in finished(options, recipes):
        if 0 not in point.runs:
            continue
        folder = folder_of(options.out, options.data, point.row, point.budget, 0)
        if not (folder / "onnx" / "lorafx.json").is_file():
            print(f"exporting {frontier_show.label(point.row, point.budget)}", file=sys.stderr, flush=True)
            beside = {name: folder_of(options.out, options.data, name, 1.0, 0) for name in needs(point.row, recipes)}
            frontier_exports.export(folder, beside, point.row, point.budget, recipes.get(point.row))
        if point.row == LORA:
            folders[frontier_show.THEIRS] = frontier_exports.theirs(folder)
        folders[frontier_show.label(point.row, point.budget)] = folder / "onnx"
    if frontier_show.THEIRS not in folders:
        raise SystemExit("times are compared with LoRA alone, whose first fold is not trained; train it")
    first = {frontier_show.THEIRS: folders[frontier_show.THEIRS]}
    times = frontier_show.timed({**first, **folders}, options.repeats)
    told = {"machine": f"{os.cpu_count()} cores", "repeats": options.repeats, "times": times}
    times_file(options).write_text(json.dumps(told, indent=1), encoding="utf-8")


# ---- the command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    stages = made.add_subparsers(dest="stage", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=Path, default=Path("out/frontier"), help="folder of finished runs")
    shared.add_argument("--data", choices=list(folds.DATA), default="movies", help="the data set")
    shared.add_argument("--tokens", type=Path, help="folder of the tokenised texts (default: rows in --out)")
    shared.add_argument("--rows", nargs="+", metavar="ROW", help=f"these rows only, of {', '.join(ROWS)}, and variants")
    shared.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS), help="shares to keep")
    shared.add_argument("--folds", nargs="+", type=int, choices=range(folds.FOLDS), default=list(range(folds.FOLDS)))
    shared.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME=ROW:OPTION=VALUE,…",
        help="one more row: another with other options of finegates, training, lora.rank …, before, own_teacher",
    )
    stage = stages.add_parser("train", parents=[shared], help="train what is missing")
    stage.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    stage.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    stage.add_argument("--stop-after", type=float, metavar="SECONDS", help="begin no run after this time")
    stage.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    stage.add_argument("--one", nargs=3, metavar=("ROW", "BUDGET", "FOLD"), help=argparse.SUPPRESS)
    timing = stages.add_parser("time", parents=[shared], help="export the models of the first fold and time them")
    timing.add_argument("--repeats", type=int, default=20, help="timed calls of each model and shape")
    stages.add_parser("table", parents=[shared], help="print the table")
    drawing = stages.add_parser("figure", parents=[shared], help="draw the figure")
    drawing.add_argument("--svg", type=Path, default=Path("docs/frontier.svg"), help="where it is written")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    options = parser().parse_args(arguments)
    options.tokens = options.tokens or options.out / "rows"
    recipes: dict[str, Recipe] = dict(RECIPES)
    for text in options.variant:
        name, recipe = frontier_rows.variant(text, recipes)
        recipes[name] = recipe
    if options.stage != "train":
        recipes.update(frontier_rows.recorded(options.out / options.data))
    known = list(dict.fromkeys((*ROWS, *recipes)))
    options.rows = options.rows or known
    odd = [row for row in options.rows if row not in known]
    if odd:
        raise SystemExit(f"no row is called {odd[0]!r}; known: {', '.join(known)}")
    if options.stage == "train":
        (one if options.one else train)(options, recipes)
    elif options.stage == "time":
        time_models(options, recipes)
    elif options.stage == "table":
        print(frontier_show.table(finished(options, recipes)))
    else:
        frontier_show.figure(finished(options, recipes), options.svg)


if __name__ == "__main__":
    main()
