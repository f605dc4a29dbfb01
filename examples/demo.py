"""The whole path on real weights and real text: capture, rewrite, train, fold, export, verify, time, report.

    make demo

Fine-tunes all-MiniLM-L6-v2 on 7,030 movie sentences with LoRA; then adds FineGates, which learn to close 40 % of the
encoder's weights while LoRA trains on; folds both into a smaller graph, deploys it to ONNX, proves that the deployed
model computes the trained function, and times it beside PyTorch and the best existing path: LoRA merged and exported by
transformers. Everything is written below ``out/demo``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# What libraries say to their own developers.
warnings.filterwarnings("ignore", category=FutureWarning)

import lorafx  # noqa: E402  (after the settings above)
from examples import assets  # noqa: E402
from lorafx.passes.finegates import FineGates  # noqa: E402
from lorafx.passes.lora import Lora  # noqa: E402
from lorafx.reporting.report import read_report  # noqa: E402
from lorafx.reporting.scored import SCORED, Form, is_as_large, proof_of, scored  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorafx.parity.answers import Comparison
    from lorafx.proof.bench import BenchResult
    from lorafx.training.fit import TrainResult


#: The weights that are adapted and gated.
ENCODER = "*encoder.layer.*"
#: What is timed.
THEIRS, MERGED, OURS = "transformers' export, LoRA merged", "PyTorch, LoRA merged", "lorafx, LoRA and FineGates"


def say(text: str, started: float) -> None:
    """One progress line with the time since the start."""
    print(f"[{time.perf_counter() - started:5.0f} s] {text}", file=sys.stderr, flush=True)


def hugging_face_export(
    checkpoint: Path, folder: Path, provider: Literal["cpu", "cuda"] = "cpu", dtype: Any = "auto"
) -> Path:
    """The best existing path to the same ONNX model: transformers' own exporter on the merged checkpoint."""
    from contextlib import redirect_stdout

    from transformers import AutoModelForSequenceClassification
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    from lorafx.frontend.notices import without_notices
    from lorafx.models.examples import dynamic_shapes, example_inputs

    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=dtype).eval()
    inputs = example_inputs(model, checkpoint)
    config = OnnxConfig(dynamic=True, dynamic_shapes=dynamic_shapes(model, inputs), ort_fusions=provider)
    with redirect_stdout(sys.stderr), without_notices():
        OnnxExporter().export(model, inputs, config).save_pretrained(folder)
    return folder


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the training sentences with LoRA")
    parser.add_argument("--gated-epochs", type=float, default=3.0, help="passes with LoRA and gates after that")
    parser.add_argument("--budget", type=float, default=0.6, help="share of the encoder's weights to keep")
    parser.add_argument("--rows", type=int, default=None, help="train on the first N sentences only")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="where to write")
    return parser.parse_args()


def fit(program: lorafx.Program, epochs: float, rows: int | None) -> TrainResult:
    """Train on the movie sentences, scored on the 1,500 held out."""
    train_csv, test_csv = assets.movie_split()
    steps = max(1, int(rows * epochs / 32)) if rows else -1
    return lorafx.train(
        program,
        train_csv,
        eval_data=test_csv,
        epochs=epochs,
        max_steps=steps,
        max_length=64,
        trainer={"train_sampling_strategy": "group_by_length"},  # short sentences with short ones: less padding
    )


def fine_tune(options: argparse.Namespace, started: float) -> tuple[lorafx.Program, TrainResult]:
    """Capture, add LoRA, train; write the run, and the merged model as transformers exports it."""
    checkpoint = assets.minilm()
    say(f"weights in {checkpoint}", started)
    program = lorafx.capture(checkpoint, task="text-classification", num_labels=2)
    program = lorafx.rewrite(program, [Lora(targets=ENCODER, rank=8, alpha=16)])
    say(f"captured {program.name}, LoRA on {len(program.history[0].taken)} linear layers", started)
    trained = fit(program, options.epochs, options.rows)
    say(f"LoRA: held-out accuracy {accuracy(trained):.3f}", started)
    program.save(options.out / "lora", overwrite=True)
    lorafx.export(lorafx.fold(program), options.out / "lora-merged", format="hf", overwrite=True)
    hugging_face_export(options.out / "lora-merged", options.out / "hugging-face-onnx")
    say("merged, and exported by transformers", started)
    return program, trained


def shrink(
    program: lorafx.Program, options: argparse.Namespace, started: float
) -> tuple[lorafx.Program, TrainResult, Comparison | None]:
    """Add gates, train on, fold; write the run and the verified ONNX model."""
    program = lorafx.rewrite(program, [FineGates(targets=ENCODER, budget=options.budget)])
    say(f"FineGates on {len(program.history[-1].taken)} of them: a gate a head and a neuron", started)
    trained = fit(program, options.gated_epochs, options.rows)
    say(f"LoRA and FineGates: held-out accuracy {accuracy(trained):.3f}", started)
    program.save(options.out / "run", overwrite=True)
    folded = lorafx.fold(program)
    parity = lorafx.export(folded, options.out / "onnx", format="onnx", provider="cpu", overwrite=True)
    say(f"folded, exported and verified: {parity}", started)
    return folded, trained, parity


def accuracy(trained: TrainResult) -> float:
    """On the held-out sentences."""
    return float(trained.metrics["eval_accuracy"])


def time_side_by_side(out: Path) -> BenchResult:
    """Time what was deployed beside PyTorch and transformers' own export of the merged LoRA model."""
    from lorafx.proof.bench import bench

    return bench(
        (THEIRS, out / "hugging-face-onnx"),
        (MERGED, out / "lora-merged"),
        (OURS, out / "onnx"),
        repeats=20,
    )


def scored_forms(report: lorafx.Report, out: Path) -> Iterator[Form]:
    """What was timed, by how much training it has behind it; each form that was held against the model that trained."""
    merged = read_report(out / "lora-merged")
    exported = lorafx.verify(out / "lora-merged", out / "hugging-face-onnx")
    if exported.ok and is_as_large(merged):
        why = "with LoRA merged the model has the base's shapes, and so its speed"
        yield Form(THEIRS, "transformers' export before training", 0, why)
    if exported.ok:
        why = f"equal to {exported.max_rel:.1e} of the scale of the merged model's outputs"
        yield Form(THEIRS, "transformers' export, LoRA alone", 1, why)
    for told, timed, model, trainings in (
        (merged, MERGED, "PyTorch, LoRA alone", 1),
        (report, OURS, "lorafx, LoRA and FineGates", 2),
    ):
        proof = proof_of(told)
        if proof is not None:
            yield Form(timed, model, trainings, proof)


def write_report(report: lorafx.Report, out: Path) -> None:
    """The report in its three forms."""
    from lorafx.reporting.report import write_report as write

    write(report, out, "onnx/")
    (out / "report.txt").write_text(report.text(), encoding="utf-8")


def main() -> None:
    """Run the demo."""
    options = arguments()
    started = time.perf_counter()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)

    program, tuned = fine_tune(options, started)
    folded, trained, parity = shrink(program, options, started)
    timings = time_side_by_side(out)
    report = folded.report.plus(parity=parity, benchmark=timings)
    write_report(report.plus(**{SCORED: scored(report, scored_forms(report, out))}), out)

    print(timings.text())
    print("held-out accuracy, on 1,500 sentences that no training saw")
    print(f"  LoRA              {accuracy(tuned):.3f}, after {options.epochs:g} epochs")
    print(
        f"  LoRA + FineGates  {accuracy(trained):.3f}, after {options.gated_epochs:g} more; "
        f"{left(folded):.1%} of the encoder's parameters left"
    )
    print(f"verified ONNX       {out / 'onnx'} ({parity})")
    print(f"report              {(out / 'report.html').resolve()}")
    print(f"time                {time.perf_counter() - started:.0f} s")


def left(folded: lorafx.Program) -> float:
    """The share of the blocks' parameters that folding left."""
    from lorafx.reporting.sizes import weights_by_block

    assert folded.origin is not None, "a folded program knows what it was folded from"
    assert folded.origin.captured is not None, "and that what it was captured as"
    after, before = (weights_by_block(program) for program in (folded, folded.origin.captured))
    return sum(n for block, n in after.items() if block) / sum(n for block, n in before.items() if block)


if __name__ == "__main__":
    main()
