"""What ``benchmarks.gpu`` times, written without a GPU: ONNX folders, held-out rows, and the logits owed for them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import THEIRS, owed

BUDGETS = (1.0, 0.6, 0.4)
#: Tokens of a held-out sentence; those beyond are cut off, as in training.
LENGTH = 64


def export(trained: Path, out: Path, dtypes: list[str], multiples: list[int]) -> None:
    """Write each model in each dtype for the CUDA provider, the held-out rows, and the logits owed for them.

    ``multiples`` are what widths are rounded up to, a model each.
    """
    import lorafx
    from benchmarks.prune import folder_of

    programs = {f"keep {budget:.0%}": lorafx.load(folder_of(trained, budget, 0) / "run") for budget in BUDGETS}
    write(programs, held_out(), out, dtypes, multiples)


def export_frontier(wanted: list[str], trained: Path, out: Path, dtypes: list[str], multiples: list[int]) -> None:
    """The same of ``ROW:BUDGET`` as ``benchmarks.frontier`` trained them, the first fold held out; LoRA alone first."""
    from benchmarks import folds, frontier
    from benchmarks.frontier_rows import LORA, RECIPES, kept_program

    programs = {}
    for name in [f"{LORA}:1.0", *wanted]:
        row, _, budget = name.partition(":")
        folder = frontier.folder_of(trained, "movies", row, float(budget), 0)
        programs[f"{row} {float(budget):.0%}"] = kept_program(folder, RECIPES[row].passes(float(budget)))
    _, test = folds.held_out(folds.encoded("movies", trained / "rows"), 0)
    write(programs, padded(test), out, dtypes, multiples)


def write(
    programs: Mapping[str, Any], rows: dict[str, Any], out: Path, dtypes: list[str], multiples: list[int]
) -> None:
    """The ONNX folders of these programs, the first also as transformers exports it, and ``rows`` with logits owed."""
    import torch

    import lorafx
    from examples.demo import hugging_face_export
    from lorafx.passes.dead_channels import DeadChannels
    from lorafx.proof.open import open_runner

    out.mkdir(parents=True, exist_ok=True)
    for number, (title, program) in enumerate(programs.items()):
        logits = logits_of(open_runner(program), rows)
        if not number:
            checkpoint = out / "checkpoint"
            lorafx.export(lorafx.fold(program, gather="never"), checkpoint, "hf", overwrite=True)
            for dtype in dtypes:
                hugging_face_export(checkpoint, out / dtype / THEIRS, "cuda", getattr(torch, dtype))
            rows[owed(THEIRS)] = logits
        for multiple in multiples if number else [1]:
            name = title + (f", widths of {multiple}" if multiple > 1 else "")
            folded = lorafx.fold(program, removal=DeadChannels(round_to=multiple))
            for dtype in dtypes:
                print(name, dtype, file=sys.stderr)
                options: dict[str, Any] = {"provider": "cuda", "dtype": getattr(torch, dtype)}
                lorafx.export(folded, out / dtype / name, overwrite=True, **options)
            rows[owed(name)] = logits
    np.savez(out / "rows.npz", **rows)


def held_out() -> dict[str, np.ndarray[Any, Any]]:
    """The 1,500 sentences as padded tokens, with their labels."""
    from transformers import AutoTokenizer

    from benchmarks import methods
    from examples import assets

    return padded(methods.encoded(assets.movie_split()[1], AutoTokenizer.from_pretrained(assets.minilm())))


def padded(encoded: list[dict[str, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Rows of tokens as arrays of one length, with their labels."""
    from transformers import AutoTokenizer

    from examples import assets

    tokenizer = AutoTokenizer.from_pretrained(assets.minilm())
    padding: dict[str, Any] = {"padding": "max_length", "max_length": LENGTH, "return_tensors": "np"}
    rows = dict(
        tokenizer.pad([{key: row[key] for key in ("input_ids", "attention_mask")} for row in encoded], **padding)
    )
    return {**rows, "labels": np.array([row["labels"] for row in encoded])}


def logits_of(runner: Any, rows: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The trained program's logits of all rows."""
    import torch

    found = []
    for start in range(0, len(rows["labels"]), 100):
        batch = {key: torch.tensor(rows[key][start : start + 100]) for key in ("input_ids", "attention_mask")}
        found.append(runner(batch)["logits"].numpy())
    return np.concatenate(found)
