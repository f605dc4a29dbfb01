"""The rows of ``benchmarks.frontier`` that lorafx trains: what a run is given, what it gives, and the recipes."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import folds, methods
from examples import assets

#: The share of the steps that come before anything is removed, where a row trains in two parts.
BEFORE = 0.4
#: Held-out rows that score a run of fewer steps than the data set's epochs take.
FEW = 64


@dataclass(frozen=True)
class Run:
    """What one run is given.

    Attributes:
        data: name of the data set
        row: name of the row
        budget: share of the encoder's linear parameters to keep
        fold: which rows are held out; the seed too
        folder: where it writes what it trained
        beside: the folder of runs of the fold that others begin with, by row
        rows: where token ids are kept
        device: ``cpu`` or ``cuda``
        steps: of training, if not as many as the data set's epochs take
        keep: whether what it trained is wanted later
    """

    data: str
    row: str
    budget: float
    fold: int
    folder: Path
    beside: Mapping[str, Path]
    rows: Path
    device: str
    steps: int | None = None
    keep: bool = True

    def texts(self) -> tuple[list[folds.Row], list[folds.Row]]:
        """The rows to train on, and those held out; few of these in a run that is shortened."""
        train, test = folds.held_out(folds.encoded(self.data, self.rows), self.fold)
        return train, test if self.steps is None else test[:FEW]

    def steps_of(self, rows: int) -> int:
        """The optimiser steps of the run, of all its parts together."""
        return self.steps or int(folds.DATA[self.data].epochs * -(-rows // methods.BATCH))


@dataclass
class Trained:
    """What one run gives.

    Attributes:
        logits: of a batch of inputs, on the CPU
        seconds: what training took
        steps: how many optimiser steps
        weights: numbers in the encoder's layers, before and after
        flops: of the encoder's layers for one token, before and after
        left: the sizes (out, in) of the linear layers of the encoder that are left, by module
        facts: what else is to be told
    """

    logits: Any
    seconds: float
    steps: int
    weights: tuple[int, int]
    flops: tuple[int, int]
    left: dict[str, tuple[int, int]]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A row that lorafx trains: LoRA and FineGates together.

    Attributes:
        gates: options of ``finegates`` but for the budget
        lora: options of ``lora``
        training: options of training
        before: share of the steps that train LoRA alone, before there are gates
        own_teacher: whether it learns from what it was after them, not from LoRA alone trained to the end
        as_authors: FineGates as its authors have it: rows and columns, and nothing is removed
    """

    gates: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    before: float = 0.0
    own_teacher: bool = False
    as_authors: bool = False

    @property
    def distils(self) -> bool:
        """Whether it learns from a teacher."""
        return bool(self.training.get("distill") or self.training.get("distill_hidden"))

    def passes(self, budget: float) -> list[dict[str, Any]]:
        """The passes for one budget; at 1.0 LoRA alone."""
        lora = {"name": "lora", "rank": 8, "alpha": 16.0, "targets": methods.TARGETS, **self.lora}
        if budget == 1.0:
            return [lora]
        # Closing this share of rows and of columns leaves the budget of the weights.
        kept = {"target": 1 - budget**0.5} if self.as_authors else {"budget": budget}
        return [lora, {"name": "finegates", "targets": methods.TARGETS, **kept, **self.gates}]

    def varied(self, options: Mapping[str, Any]) -> Recipe:
        """Another recipe: options of training, of this class, of LoRA (``lora.rank``), the others of ``finegates``."""
        from lorafx.recipes.options import TrainOptions

        of_training = {entry.name for entry in dataclasses.fields(TrainOptions)}
        own = {name: value for name, value in options.items() if name in ("before", "own_teacher")}
        lora = {name.removeprefix("lora."): value for name, value in options.items() if name.startswith("lora.")}
        training = {name: value for name, value in options.items() if name in of_training}
        gates = {name: value for name, value in options.items() if not {name} & {*own, *training} and "." not in name}
        odd = [name for name in options if "." in name and not name.startswith("lora.")]
        if odd:
            raise SystemExit(f"{odd[0]}: options with a dot are LoRA's (lora.rank)")
        return dataclasses.replace(
            self,
            gates={**self.gates, **gates},
            lora={**self.lora, **lora},
            training={**self.training, **training},
            **own,
        )


_DISTILLED = {"distill": 0.9, "distill_hidden": 1.0}
LORA = "lora"
RECIPES: dict[str, Recipe] = {
    LORA: Recipe(),
    "authors-finegates": Recipe(gates={"couple": False, "mode": "target"}, as_authors=True),
    "fine": Recipe(),
    "fine-distilled": Recipe(training=_DISTILLED),
    "fine-coarse": Recipe(gates={"sublayers": True}),
    "fine-coarse-distilled": Recipe(gates={"sublayers": True}, training=_DISTILLED),
}


def recorded(folder: Path) -> dict[str, Recipe]:
    """The recipes that the finished runs of a data set were trained with, by row."""
    told = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/*/score.json"))]
    return {run["row"]: Recipe(**run["recipe"]) for run in told if "recipe" in run}


def variant(text: str, known: Mapping[str, Recipe]) -> tuple[str, Recipe]:
    """A row given on the command line, ``NAME=ROW:option=value,option=value``. SystemExit when it is none."""
    name, _, rest = text.partition("=")
    base, _, options = rest.partition(":")
    if not name or base not in known:
        raise SystemExit(f"{text!r}: a variant is NAME=ROW:option=value,…, ROW one of {', '.join(known)}")
    if name in known:
        raise SystemExit(f"{text!r}: there is a row of that name; give the variant another")
    pairs = [option.partition("=") for option in options.split(",") if option]
    return name, known[base].varied({key: _value(value) for key, _, value in pairs})


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# ---- one run


def arguments(run: Run, steps: int, seed: int) -> dict[str, Any]:
    """transformers' training options of a run of ``steps``, with nothing that waits for the device at each."""
    shared = methods.arguments(str(run.folder / "trainer"), seed)
    return {**shared, "max_steps": steps, "logging_nan_inf_filter": False, "use_cpu": run.device == "cpu"}


def captured() -> Any:
    """MiniLM with a head of two classes, as drawn now."""
    import lorafx

    return lorafx.capture(assets.minilm(), task="text-classification", num_labels=2)


def kept_program(folder: Path, passes: list[dict[str, Any]]) -> Any:
    """The program whose training is kept in ``folder``."""
    import lorafx
    from lorafx.training.trainer import load_state

    program = lorafx.rewrite(captured(), {"pass": passes}, check=False)
    load_state(program.module(), folder)
    return program


def _fit(run: Run, program: Any, texts: list[folds.Row], part: Mapping[str, Any], teacher: Any = None) -> float:
    """Train in place; the seconds it took."""
    import lorafx

    theirs = {"train_sampling_strategy": "group_by_length", "use_cpu": run.device == "cpu"}
    options = {"learning_rate": methods.RATE, "batch_size": methods.BATCH, "log_steps": 500, **part}
    return lorafx.train(program, texts, teacher=teacher, progress=False, trainer=theirs, **options).seconds


def train(run: Run, recipe: Recipe) -> Trained:
    """Train one of the rows above, fold it, and say what is left."""
    from transformers import set_seed

    import lorafx
    from lorafx.pipeline import merge
    from lorafx.proof.open import open_runner

    texts, _ = run.texts()
    steps = run.steps_of(len(texts))
    first = round(steps * recipe.before) if run.budget < 1.0 else 0
    passes = recipe.passes(run.budget)
    set_seed(run.fold)
    program = lorafx.rewrite(captured(), {"pass": passes[: 1 if first else None]}, check=False)
    seconds, teacher = 0.0, None
    if first:
        seconds += _fit(run, program, texts, {"max_steps": first, "seed": run.fold})
        teacher = program.copy() if recipe.own_teacher else None
        program = lorafx.rewrite(program, {"pass": passes[1:]}, check=False)
    if recipe.distils and teacher is None:
        teacher = kept_program(run.beside[LORA], RECIPES[LORA].passes(1.0))
    # Another order of the texts in the second part than in the first.
    part = {"max_steps": steps - first, "seed": run.fold + (folds.FOLDS if first else 0), **recipe.training}
    seconds += _fit(run, program, texts, part, teacher)
    folded = merge(program) if recipe.as_authors else lorafx.fold(program)
    runner = open_runner(folded, run.device)
    given = _trained(program, folded, recipe.as_authors)
    given["facts"]["recipe"] = dataclasses.asdict(recipe)
    if run.keep:
        keep(program, run.folder)
    return Trained(lambda batch: runner(batch)["logits"].cpu(), seconds, steps, **given)


def keep(program: Any, folder: Path) -> None:
    """Write what was learned, and nothing else."""
    from safetensors.torch import save_file

    from lorafx.training.trainer import STATE, state_of

    folder.mkdir(parents=True, exist_ok=True)
    save_file(state_of(program.module()), folder / STATE)


def _trained(program: Any, folded: Any, zeros: bool) -> dict[str, Any]:
    """What is left of a program; with ``zeros``, numbers that are not zero count as what is left of the weights."""
    from lorafx.reporting.sizes import flops_by_block, weights_by_block

    sizes = [(weights_by_block(one), flops_by_block(one)) for one in (program.captured, folded)]
    weights = [sum(size for block, size in found.items() if block) for found, _ in sizes]
    flops = [sum(size for block, size in found.items() if block) for _, found in sizes]
    sites = [site for site in folded.sites() if site.block is not None and site.kind in ("linear", "addmm")]
    if zeros:  # merged, the program still holds what was merged
        weights[1] = weights[0] - sum(int((folded.tensor(site.parameter) == 0).sum()) for site in sites)
    sections = {title: rows for title, rows in program.report.sections.items() if title.startswith("finegates")}
    return {
        "weights": (weights[0], weights[1]),
        "flops": (flops[0], flops[1]),
        "left": {site.module: (site.out_features, site.in_features) for site in sites},
        "facts": {"sections": sections},
    }


def scored(run: Run, trained: Trained, started: float) -> dict[str, Any]:
    """The accuracy on the held-out rows, and what is to be kept of a run."""
    import torch
    from transformers import AutoTokenizer, DataCollatorWithPadding

    collate = DataCollatorWithPadding(AutoTokenizer.from_pretrained(assets.minilm()))
    _, test = run.texts()
    accuracy = methods.accuracy(trained.logits, test, collate)
    kept = sum(file.stat().st_size for file in run.folder.rglob("*") if file.is_file())
    own = {"row": run.row, "data": run.data, "budget": run.budget, "fold": run.fold, "accuracy": accuracy}
    told = {name: value for name, value in vars(trained).items() if name not in ("logits", "facts")}
    where = torch.cuda.get_device_name() if run.device == "cuda" else "cpu"
    made = {"whole_seconds": time.perf_counter() - started, "bytes": kept, "device": where, "torch": torch.__version__}
    return {**own, **told, **made, **trained.facts}
