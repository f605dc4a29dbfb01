"""MiniLM made smaller by coupled gates, beside LoRA merged and exported by transformers: accuracy, size, speed.

    python -m benchmarks.prune

LoRA of rank 8 and FineGates, trained together on the movie sentences (3 epochs, batch 32, at most 64 tokens, AdamW at
1e-3), keeping 80, 60 and 40 % of the encoder's linear parameters, three seeds; LoRA alone beside them. Finished runs
are kept in ``--out``. The models of the first seed are then exported and timed in one interleaved run.

    python -m benchmarks.prune --folds

Cross-validates instead: every sentence is held out once, in one of five folds, each with a seed of its own. 1,500
sentences tell accuracies apart by about a point (a model right where the other is wrong on a tenth of them, and the
other way round, has a standard error of 0.8); 8,530 by 0.35.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import jobs, methods
from benchmarks.folds import FOLDS, held_out
from benchmarks.jobs import Job
from examples import assets
from lorafx.proof.bench import SHAPES

SEEDS = (0, 1, 2)
#: Shares of the encoder's linear parameters to keep; 1.0 is LoRA alone.
BUDGETS = (1.0, 0.8, 0.6, 0.4)


def recipe(budget: float) -> list[dict[str, Any]]:
    """The passes of one row."""
    lora = {"name": "lora", "rank": 8, "alpha": 16.0, "targets": methods.TARGETS}
    gates = {"name": "finegates", "budget": budget, "targets": methods.TARGETS}
    return [lora] if budget == 1.0 else [lora, gates]


def folder_of(out: Path, budget: float, seed: int, folds: bool = False) -> Path:
    """Where one run is kept."""
    return out / f"keep-{round(100 * budget)}-{'fold' if folds else 'seed'}-{seed}"


def sentences(tokenizer: Any, fold: int | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows to train on, and those held out: of the split, or a fold of all (shuffled) rows."""
    train, test = (methods.encoded(path, tokenizer) for path in assets.movie_split())
    return (train, test) if fold is None else held_out([*train, *test], fold)


def train_one(folder: Path, passes: list[dict[str, Any]], seed: int, fold: int | None = None) -> None:
    """Train one model, score it folded, save the run in ``folder``; ``score.json`` is written last."""
    from transformers import AutoTokenizer, DataCollatorWithPadding, TrainingArguments, set_seed

    import lorafx
    from lorafx.proof.open import open_runner
    from lorafx.reporting.sizes import flops_by_block, weights_by_block
    from lorafx.training.trainer import Trainer

    tokenizer = AutoTokenizer.from_pretrained(assets.minilm())
    collate = DataCollatorWithPadding(tokenizer)
    train, test = sentences(tokenizer, fold)
    set_seed(seed)
    program = lorafx.capture(assets.minilm(), task="text-classification", num_labels=2)
    program = lorafx.rewrite(program, {"pass": passes})
    arguments = TrainingArguments(**methods.arguments(str(folder / "trainer"), seed))
    facts = methods.fit(Trainer, program.module(), arguments, train, collate)
    folded = lorafx.fold(program)
    runner = open_runner(folded)
    score = methods.accuracy(lambda batch: runner(batch)["logits"], test, collate)
    program.save(folder / "run", overwrite=True)
    assert program.captured is not None
    sizes = {
        "weights": (_blocks(weights_by_block(program.captured)), _blocks(weights_by_block(folded))),
        "flops": (_blocks(flops_by_block(program.captured)), _blocks(flops_by_block(folded))),
    }
    sections = {title: rows for title, rows in program.report.sections.items() if title.startswith("finegates")}
    values = {"accuracy": score, **facts, **sizes, "sections": sections}
    (folder / "score.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def _blocks(sizes: dict[str, int]) -> int:
    """What lies in blocks."""
    return sum(size for block, size in sizes.items() if block)


def run_missing(out: Path, budgets: Sequence[float], at_once: int, folds: bool) -> None:
    """Train what is missing, each run in a process of its own, the cores shared out evenly."""
    every = []
    for seed in range(FOLDS) if folds else SEEDS:
        for budget in budgets:
            command = [sys.executable, "-m", "benchmarks.prune", "--out", str(out), "--one", str(budget), str(seed)]
            done = folder_of(out, budget, seed, folds) / "score.json"
            every.append(Job(f"{budget:.0%}, {seed}", [*command, *["--folds"] * folds], done))
    if jobs.run_missing(every, at_once):
        raise SystemExit("a run failed; run again to go on")


def scores(out: Path, budget: float) -> list[dict[str, Any]]:
    """The finished runs of one row."""
    files = [folder_of(out, budget, seed) / "score.json" for seed in SEEDS]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]


def deployed(out: Path, budgets: Sequence[float]) -> dict[str, Path]:
    """ONNX folders of the first seed's models; LoRA merged by transformers' exporter is the first."""
    import lorafx
    from examples.demo import hugging_face_export

    found = {}
    for budget in budgets:
        folder = folder_of(out, budget, SEEDS[0])
        if not (folder / "onnx" / "lorafx.json").is_file():
            lorafx.export(lorafx.load(folder / "run"), folder / "onnx", overwrite=True)
        if budget == 1.0:
            if not (folder / "theirs" / "model.onnx").is_file():
                merged = lorafx.fold(lorafx.load(folder / "run"))
                lorafx.export(merged, folder / "checkpoint", "hf", overwrite=True)
                hugging_face_export(folder / "checkpoint", folder / "theirs")
            found["transformers' export"] = folder / "theirs"
        found[f"keep {budget:.0%}"] = folder / "onnx"
    return found


def table(out: Path, budgets: Sequence[float], repeats: int) -> str:
    """The rows as Markdown: accuracy over seeds, what is left, and times of the first seed's models."""
    from lorafx.proof.bench import bench

    folders = deployed(out, budgets)
    result = bench(*folders.items(), shapes=SHAPES, repeats=repeats)
    timed = {(timing.candidate, (timing.batch, timing.length)): timing for timing in result.timings}
    lines = [
        "| | accuracy, by seed | mean | linear parameters left | FLOPs left | ONNX MB | "
        + " | ".join(f"{batch}x{length} ms" for batch, length in SHAPES)
        + " |"
    ]
    lines.append("|---|---|--:|--:|--:|--:|" + "--:|" * len(SHAPES))
    for name, folder in folders.items():
        budget = 1.0 if name.startswith("transformers") else int(name.split()[1].rstrip("%")) / 100
        found = scores(out, budget)
        listed = ", ".join(f"{run['accuracy']:.4f}" for run in found)
        left = [statistics.mean(run[key][1] / run[key][0] for run in found) for key in ("weights", "flops")]
        size = sum(file.stat().st_size for file in folder.glob("model.onnx*")) / 1e6
        times = [f"{1e3 * timed[name, shape].median:.1f} ({timed[name, shape].ratio:.2f}x)" for shape in SHAPES]
        mean = statistics.mean(run["accuracy"] for run in found)
        lines.append(
            f"| {name} | {listed} | {mean:.4f} | {left[0]:.1%} | {left[1]:.1%} | {size:.1f} | {' | '.join(times)} |"
        )
    return "\n".join(lines)


def cross_validated(out: Path, budgets: Sequence[float]) -> str:
    """The accuracy of each fold, and what is lost against the first row: the mean and its standard error over folds."""
    rows = {}
    for budget in budgets:
        files = [folder_of(out, budget, fold, folds=True) / "score.json" for fold in range(FOLDS)]
        rows[budget] = [json.loads(file.read_text(encoding="utf-8"))["accuracy"] for file in files]
    lines = ["| | accuracy, by fold | mean | lost against the first row, points |", "|---|---|--:|--:|"]
    for budget, found in rows.items():
        lost = [100 * (whole - part) for whole, part in zip(rows[budgets[0]], found, strict=True)]
        error = statistics.stdev(lost) / len(lost) ** 0.5
        listed = ", ".join(f"{accuracy:.4f}" for accuracy in found)
        against = "" if budget == budgets[0] else f"{statistics.mean(lost):.2f} ± {error:.2f}"
        lines.append(f"| keep {budget:.0%} | {listed} | {statistics.mean(found):.4f} | {against} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, export, time and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/prune"), help="folder of finished runs")
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS, help="these rows only")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each model and shape")
    parser.add_argument("--folds", action="store_true", help="cross-validate, and time nothing")
    parser.add_argument("--one", nargs=2, type=float, metavar=("BUDGET", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.one:
        budget, seed = options.one[0], int(options.one[1])
        folder = folder_of(options.out, budget, seed, options.folds)
        train_one(folder, recipe(budget), seed, seed if options.folds else None)
        return
    run_missing(options.out, options.budgets, options.jobs, options.folds)
    if options.folds:
        print(cross_validated(options.out, options.budgets))
    else:
        print(table(options.out, options.budgets, options.repeats))


if __name__ == "__main__":
    main()
