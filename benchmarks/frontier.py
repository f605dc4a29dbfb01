"""Accuracy against measured seconds: lorafx's gates beside what else makes a fine-tuned MiniLM smaller.

    python -m benchmarks.frontier train --jobs 2      # what is missing; resumable run by run
    python -m benchmarks.frontier time                # exports the models of the first fold, times all of them
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

from benchmarks import folds, frontier_rows, jobs, prune, rivals
from benchmarks.frontier_rows import LORA, RECIPES, Recipe, Run, Trained

BUDGETS = (0.8, 0.6, 0.4, 0.2)
SCORE = "score.json"
#: Rows that lorafx does not train.
RIVALS: dict[str, Callable[[Run], Trained]] = {
    "first-layers": rivals.first_layers,
    "tp-magnitude": rivals.torch_pruning("magnitude"),
    "tp-taylor": rivals.torch_pruning("taylor"),
    "tp-activation": rivals.torch_pruning("activation"),
    "mask-search": rivals.mask_search,
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
    run = Run(
        options.data, row, budget, fold, folder, beside, options.out / "rows", options.device, options.steps, keep
    )
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
    folds.encoded(options.data, options.out / "rows")
    own = ["--out", str(options.out), "--data", options.data, "--device", options.device]
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
    size = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    print(f"{len(every) - len(missing)} of {len(every)} runs are finished; {options.out} has {size / 1e6:.1f} MB")
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {', '.join(failed)}; run again to repeat them")


# ---- the command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    stages = made.add_subparsers(dest="stage", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=Path, default=Path("out/frontier"), help="folder of finished runs")
    shared.add_argument("--data", choices=list(folds.DATA), default="movies", help="the data set")
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
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    options = parser().parse_args(arguments)
    recipes: dict[str, Recipe] = dict(RECIPES)
    for text in options.variant:
        name, recipe = frontier_rows.variant(text, recipes)
        recipes[name] = recipe
    known = list(dict.fromkeys((*ROWS, *recipes)))
    options.rows = options.rows or known
    odd = [row for row in options.rows if row not in known]
    if odd:
        raise SystemExit(f"no row is called {odd[0]!r}; known: {', '.join(known)}")
    if options.stage == "train":
        (one if options.one else train)(options, recipes)


if __name__ == "__main__":
    main()
