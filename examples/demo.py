"""The whole path on real weights and real text: capture, rewrite, train, fold, export, verify, time, report.

    make demo

Fine-tunes all-MiniLM-L6-v2 on 7,030 movie sentences with LoRA, folds the adapters into the weights, deploys to ONNX,
proves that the deployed model computes the trained function, and times it beside PyTorch and Hugging Face's own export
of the same merged model. Everything is written below ``out/demo``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# What libraries say to their own developers.
warnings.filterwarnings("ignore", category=FutureWarning)

import lorafx  # noqa: E402  (after the settings above)
from examples import assets  # noqa: E402
from lorafx.passes.lora import Lora  # noqa: E402

if TYPE_CHECKING:
    from lorafx.bench import BenchResult
    from lorafx.parity import Comparison
    from lorafx.training import TrainResult


def say(text: str, started: float) -> None:
    """One progress line with the time since the start."""
    print(f"[{time.perf_counter() - started:5.0f} s] {text}", file=sys.stderr, flush=True)


def hugging_face_export(checkpoint: Path, folder: Path) -> Path:
    """The best existing path to the same ONNX model: transformers' own exporter on the merged checkpoint."""
    from contextlib import redirect_stdout

    from transformers import AutoModelForSequenceClassification
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    from lorafx.capture import dynamic_shapes, example_inputs

    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    inputs = example_inputs(model, checkpoint)
    config = OnnxConfig(dynamic=True, dynamic_shapes=dynamic_shapes(model, inputs), ort_fusions="cpu")
    with redirect_stdout(sys.stderr):
        OnnxExporter().export(model, inputs, config).save_pretrained(folder)
    return folder


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the training sentences")
    parser.add_argument("--rows", type=int, default=None, help="train on the first so many sentences only")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="where to write")
    return parser.parse_args()


def fine_tune(options: argparse.Namespace, started: float) -> tuple[lorafx.Program, TrainResult]:
    """Capture, add LoRA, train, and save the trained run."""
    checkpoint, (train_csv, test_csv) = assets.minilm(), assets.movie_split()
    say(f"weights in {checkpoint}, {train_csv.name} and {test_csv.name} beside {train_csv.parent}", started)

    program = lorafx.capture(checkpoint, task="text-classification", num_labels=2)
    program = lorafx.rewrite(program, [Lora(targets="*encoder.layer.*", rank=8, alpha=16)])
    say(f"captured {program.name}, LoRA on {len(program.history[0].taken)} linear layers", started)

    steps = max(1, int(options.rows * options.epochs / 32)) if options.rows else -1
    trained = lorafx.train(
        program, train_csv, eval_data=test_csv, epochs=options.epochs, max_steps=steps, max_length=64
    )
    say(f"held-out accuracy {trained.metrics['eval_accuracy']:.3f}", started)
    program.save(options.out / "run", overwrite=True)
    return program, trained


def deploy(program: lorafx.Program, out: Path, started: float) -> tuple[lorafx.Program, Comparison | None]:
    """Fold the adapters into the weights; write the merged checkpoint and the verified ONNX model."""
    folded = lorafx.fold(program)
    lorafx.export(folded, out / "checkpoint", format="hf", overwrite=True)
    parity = lorafx.export(folded, out / "onnx", format="onnx", provider="cpu", overwrite=True)
    say(f"folded, exported and verified: {parity}", started)
    return folded, parity


def time_side_by_side(out: Path, started: float) -> BenchResult:
    """Time what was deployed beside PyTorch and Hugging Face's own export."""
    from lorafx.bench import bench

    baseline = hugging_face_export(out / "checkpoint", out / "hugging-face-onnx")
    say("Hugging Face's own export of the merged model is beside it", started)
    return bench(
        ("PyTorch, LoRA unmerged", out / "run"),
        ("PyTorch, merged", out / "checkpoint"),
        ("Hugging Face export", baseline),
        ("lorafx", out / "onnx"),
        repeats=10,
    )


def write_report(report: lorafx.Report, out: Path) -> None:
    """The report in its three forms."""
    (out / "report.html").write_text(report.html(), encoding="utf-8")
    (out / "report.json").write_text(json.dumps(report.to_json(), indent=2), encoding="utf-8")
    (out / "report.txt").write_text(report.text(), encoding="utf-8")


def main() -> None:
    """Run the demo."""
    options = arguments()
    started = time.perf_counter()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)

    program, trained = fine_tune(options, started)
    folded, parity = deploy(program, out, started)
    timings = time_side_by_side(out, started)
    write_report(folded.report.plus(training=trained.to_json(), parity=parity, bench=timings), out)

    print(f"held-out accuracy   {trained.metrics['eval_accuracy']:.3f} on 1,500 sentences the training did not see")
    print(f"verified ONNX       {out / 'onnx'} ({parity})")
    print(timings.text())
    print(f"report              {(out / 'report.html').resolve()}")
    print(f"time                {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
