"""The five methods beside PEFT's LoRA on real sentences: accuracy, what each gives, step time and memory.

    python -m benchmarks.methods

MiniLM, every row trained the same way: AdamW at 1e-3 (RoseLoRA 2e-3, Tied-LoRA 3e-3) with linear decay, batch 32, at
most 64 tokens, batches of like lengths, 3 epochs; on 5,000 of the movie sentences with three seeds (1,500 held out), on
1,500 articles of Reuters R8 with one. Every run is a process of its own; finished runs are kept in ``--out`` and not
run again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import random
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.jobs import Job, run_missing
from examples import assets

EPOCHS, BATCH, LENGTH, RATE = 3.0, 32, 64, 1e-3
#: Rows of the training table that are used, so that the whole table is made in about 90 minutes on two cores.
TRAIN_ROWS = {"movies": 5000, "r8": 1500}
#: The linear layers of the encoder's blocks, the same words for all.
TARGETS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
SEEDS = {"movies": (0, 1, 2), "r8": (0,)}
LABELS = {"movies": 2, "r8": 8}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        passes: the recipe's passes, as in TOML; None for PEFT
        gives: what of the result to print in the column "achieved", from the report
        rate: learning rate
    """

    passes: tuple[dict[str, Any], ...] | None
    gives: Callable[[dict[str, Any]], str] = lambda report: ""
    rate: float = RATE


def _mean_density(title: str, *columns: str) -> Callable[[dict[str, Any]], str]:
    def gives(sections: dict[str, Any]) -> str:
        rows = sections[title]
        return ", ".join(f"{c} {max(row[c] for row in rows):.3f}" for c in columns)

    return gives


def _first(title: str, column: str, words: str) -> Callable[[dict[str, Any]], str]:
    return lambda sections: f"{sections[title][0][column]:.3f} {words}"


_LORA = {"name": "lora", "rank": 8, "alpha": 16.0, "targets": TARGETS}
_GATES = {"name": "finegates", "couple": False, "targets": TARGETS}
#: SaLoRA's multiplier as its sources have it, without what this library changed.
_BY_EXPECTATION = {"steer": "expected", "multiplier_rate": 0.05, "ramp": 0.0, "restart": False}
ROWS: dict[str, Row] = {
    "PEFT LoRA r 8": Row(None),
    "LoRA r 8": Row((_LORA,)),
    # Six blocks that share leave a sixth of LoRA at equal rank, and the scalings: half the rank makes it 14 %.
    "Tied-LoRA r 4": Row(
        ({"name": "tied-lora", "rank": 4, "init": "kaiming", "scale": 4.0, "scaling_rate": 1e-2, "targets": TARGETS},),
        rate=3e-3,
    ),
    "PRILoRA 4 to 12": Row(
        ({"name": "prilora", "alpha": 16.0, "targets": TARGETS},),
        _mean_density("prilora: Density of A", "density"),
    ),
    "SaLoRA r 16, density 0.5": Row(
        ({"name": "salora", "alpha": 32.0, "targets": TARGETS},),
        _first("salora: Open ranks", "open", "of the ranks open"),
    ),
    "SaLoRA r 16, density 0.5, steered by E0": Row(
        ({"name": "salora", "alpha": 32.0, "targets": TARGETS, **_BY_EXPECTATION},),
        _first("salora: Open ranks", "open", "of the ranks open"),
    ),
    "RoseLoRA r 8": Row(
        ({"name": "rose-lora", "density": 0.079, "targets": TARGETS},),
        _mean_density("rose-lora: Sparse factors", "weights changed"),
        rate=2e-3,
    ),
    "FineGates, keep 80 %": Row(
        (_LORA, {**_GATES, "budget": 0.8}), _first("finegates: Gates", "weights kept", "of the weights kept")
    ),
    "FineGates, keep 60 %": Row(
        (_LORA, {**_GATES, "budget": 0.6}), _first("finegates: Gates", "weights kept", "of the weights kept")
    ),
}


@dataclasses.dataclass(frozen=True)
class Trained:
    """What one training gave: a function from a batch of inputs to logits, and what is to be reported."""

    logits: Callable[[dict[str, Any]], Any]
    facts: dict[str, Any]


def arguments(folder: str, seed: int, rate: float = RATE) -> dict[str, Any]:
    """The training options all rows share but for the rate, by transformers' names."""
    return {
        "output_dir": folder,
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": rate,
        "seed": seed,
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def peft_run(task: str, rows: list[dict[str, Any]], collate: Any, seed: int) -> Trained:
    """PEFT's LoRA under transformers' Trainer."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

    model = AutoModelForSequenceClassification.from_pretrained(assets.minilm(), num_labels=LABELS[task])
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=TARGETS)
    model = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        facts = fit(Trainer, model, TrainingArguments(**arguments(folder, seed)), rows, collate)
    adapter = sum(value.numel() for name, value in model.named_parameters() if "lora_" in name)
    merged = model.merge_and_unload().eval()
    return Trained(lambda batch: merged(**batch).logits, {**facts, "adapter": adapter})


def lorafx_run(row: Row, task: str, rows: list[dict[str, Any]], collate: Any, seed: int) -> Trained:
    """A recipe under lorafx's Trainer, folded."""
    from transformers import TrainingArguments

    import lorafx
    from lorafx.proof.open import open_runner
    from lorafx.training.trainer import Trainer

    program = lorafx.capture(assets.minilm(), task="text-classification", num_labels=LABELS[task])
    program = lorafx.rewrite(program, {"pass": list(row.passes or ())})
    base = {name: program.tensor(name).detach().clone() for name in program.names("base")}
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(**arguments(folder, seed, row.rate))
        facts = fit(Trainer, program.module(), options, rows, collate)
    folded = lorafx.fold(program)
    kept = {
        name: value for name, value in base.items() if folded.tensor(name).shape == value.shape and value.dim() == 2
    }
    changed = [float((folded.tensor(name) != value).float().mean()) for name, value in kept.items()]
    runner = open_runner(folded)
    adapter = sum(value.numel() for name, value in program.trainable().items() if "classifier" not in name)
    learned = {"adapter": adapter, "sections": dict(program.report.sections), "changed": max(changed, default=1.0)}
    return Trained(lambda batch: runner(batch)["logits"], {**facts, **learned})


def fit(trainer_class: Any, model: Any, arguments: Any, rows: list[dict[str, Any]], collate: Any) -> dict[str, Any]:
    """Train, and say how long a step took and how much memory the process held at most."""
    trainer = trainer_class(model, arguments, train_dataset=rows, data_collator=collate)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "step_ms": 1e3 * seconds / trainer.state.global_step, "peak_gib": peak}


def measure(name: str, task: str, seed: int) -> dict[str, Any]:
    """One run: train, and score the merged model on the held-out rows."""
    from transformers import AutoTokenizer, DataCollatorWithPadding, set_seed

    tokenizer = AutoTokenizer.from_pretrained(assets.minilm())
    collate = DataCollatorWithPadding(tokenizer)
    train, test = (encoded(path, tokenizer) for path in tables(task))
    random.Random(0).shuffle(train)
    train = train[: TRAIN_ROWS[task]]
    set_seed(seed)
    row = ROWS[name]
    trained = (
        peft_run(task, train, collate, seed) if row.passes is None else lorafx_run(row, task, train, collate, seed)
    )
    return {"accuracy": accuracy(trained.logits, test, collate), **trained.facts}


def tables(task: str) -> tuple[Path, Path]:
    """Train and test csv of a task."""
    return assets.movie_split() if task == "movies" else assets.reuters_r8()


def encoded(path: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows of a csv as token ids, labels numbered in alphabetical order."""
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    number = {label: index for index, label in enumerate(sorted({row["label"] for row in rows}))}
    return [{**tokenizer(r["text"], truncation=True, max_length=LENGTH), "labels": number[r["label"]]} for r in rows]


def accuracy(logits: Callable[[dict[str, Any]], Any], rows: list[dict[str, Any]], collate: Any) -> float:
    """The share of rows whose largest logit is the label's."""
    import torch

    ordered, right = sorted(rows, key=lambda row: len(row["input_ids"])), 0
    for start in range(0, len(ordered), 64):
        batch = dict(collate(ordered[start : start + 64]))
        labels = batch.pop("labels")
        with torch.no_grad():
            right += int((logits(batch).argmax(-1) == labels).sum())
    return right / len(rows)


# ---- all of them


def run_all(out: Path, only: list[str], tasks: list[str], at_once: int) -> None:
    """Run what is missing, ``at_once`` processes at a time, the cores shared out evenly."""
    wanted = [(name, task, seed) for task in tasks for seed in SEEDS[task] for name in only]
    every = []
    for name, task, seed in wanted:
        command = [sys.executable, "-m", "benchmarks.methods", "--out", str(out), "--one", name, task, str(seed)]
        every.append(Job(f"{name}, {task}, {seed}", command, result_file(out, name, task, seed)))
    if failed := run_missing(every, at_once):
        raise SystemExit(f"{len(failed)} runs failed; run again to repeat them")


def result_file(out: Path, name: str, task: str, seed: int) -> Path:
    """Where one run is kept."""
    return out / f"{task}-{seed}-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"


def table(out: Path) -> str:
    """The finished runs as Markdown."""
    lines = [
        "| | trained, without head | of LoRA's | movies, by seed | mean ± s.d. | R8 | achieved | step | peak GiB |"
    ]
    lines.append("|---|--:|--:|---|--:|--:|---|--:|--:|")
    found = {name: {task: _results(out, name, task) for task in SEEDS} for name in ROWS}
    reference = [run["step_ms"] for run in found["PEFT LoRA r 8"]["movies"]]
    lora = next((run["adapter"] for run in found["PEFT LoRA r 8"]["movies"]), None)
    for name, runs in found.items():
        movies, r8 = runs["movies"], runs["r8"]
        if not movies:
            continue
        scores = [run["accuracy"] for run in movies]
        share = f"{movies[0]['adapter'] / lora:.1%}" if lora else ""
        spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        achieved = [ROWS[name].gives(run["sections"]) for run in movies if "sections" in run]
        step = statistics.median(run["step_ms"] for run in movies)
        ratio = f" ({step / statistics.median(reference):.2f}x)" if reference else ""
        peak = max(run["peak_gib"] for run in movies)
        listed = ", ".join(f"{score:.4f}" for score in scores)
        other = ", ".join(f"{run['accuracy']:.4f}" for run in r8)
        lines.append(
            f"| {name} | {movies[0]['adapter']:,} | {share} | {listed} | {statistics.mean(scores):.4f}{spread} "
            f"| {other} | {'; '.join(dict.fromkeys(achieved))} | {step:.0f} ms{ratio} | {peak:.2f} |"
        )
    return "\n".join(lines)


def _results(out: Path, name: str, task: str) -> list[dict[str, Any]]:
    files = [result_file(out, name, task, seed) for seed in SEEDS[task]]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def main() -> None:
    """Run the missing rows and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/methods"), help="folder of finished runs")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), help="these rows only")
    parser.add_argument("--tasks", nargs="+", choices=list(SEEDS), default=list(SEEDS), help="these tasks only")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; times are comparable within one number")
    parser.add_argument("--one", nargs=3, metavar=("ROW", "TASK", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.one:
        name, task, seed = options.one[0], options.one[1], int(options.one[2])
        file = result_file(options.out, name, task, seed)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(measure(name, task, seed), indent=1))
        partial.replace(file)
        return
    run_all(options.out, options.only, options.tasks, options.jobs)
    print(table(options.out))


if __name__ == "__main__":
    main()
