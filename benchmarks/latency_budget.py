"""FineGates with a budget of latency: what the measured table predicts, beside the time of the exported model.

    python -m benchmarks.latency_budget [--batch 1 --length 64]
    python -m benchmarks.latency_budget --trained out/frontier/movies/fine-distilled/keep-40-fold-0 …

Times MiniLM at 8x64, or another shape, by how wide it is (`lorafx latency`), trains LoRA and FineGates for a budget in
seconds as ``benchmarks.prune`` trains them, exports, and times the result beside LoRA alone, which that benchmark has
trained. With ``--trained`` nothing is trained: the table prices the gates of models that ``benchmarks.frontier`` has
trained for other measures and exported.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import prune
from examples import assets

#: Texts and tokens of each, unless told otherwise. Prediction and measurement are to be compared on an idle machine.
SHAPE = (8, 64)


def _named(shape: tuple[int, int]) -> str:
    """What is added to the names of files about a shape."""
    return "" if shape == SHAPE else f"-{shape[0]}x{shape[1]}"


def table(out: Path, shape: tuple[int, int]) -> dict[str, float]:
    """The table of latencies, measured once."""
    import lorafx
    from lorafx.backends.latency import latency_table

    file = out / f"latency{_named(shape)}.json"
    if not file.is_file():
        program = lorafx.capture(assets.minilm(), task="text-classification", num_labels=2)
        measured = latency_table(program, batch=shape[0], length=shape[1])
        file.write_text(json.dumps(measured, indent=1), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def passes(budget: float, latency: dict[str, float], length: int) -> list[dict[str, Any]]:
    """The recipe."""
    lora, gates = prune.recipe(budget)
    return [lora, {**gates, "measure": "latency", "length": length, "latency": latency}]


def kept(folder: Path, latency: dict[str, float], length: int) -> float:
    """The share of the seconds that the gates of a run of ``benchmarks.frontier`` keep, by the table."""
    from safetensors.torch import load_file

    import lorafx
    from benchmarks.frontier_rows import RECIPES, Recipe, captured
    from lorafx.graph.state import method_state
    from lorafx.methods.gates import kept_share
    from lorafx.training.trainer import STATE

    run = json.loads((folder / "score.json").read_text(encoding="utf-8"))
    recipe = Recipe(**run["recipe"]) if "recipe" in run else RECIPES[run["row"]]
    lora, gates = recipe.passes(run["budget"])
    # The budget steers training alone; of few texts a table may say that less cannot be reached than it asked for.
    passes = [lora, {**gates, "budget": 1.0, "measure": "latency", "length": length, "latency": latency}]
    program = lorafx.rewrite(captured(), {"pass": passes}, check=False)
    # The gates alone: what each of them costs was kept with them, in the measure that they were trained for.
    learned = load_file(folder / STATE)
    with torch.no_grad():
        for name in program.names("gate"):
            program.tensor(name).copy_(learned[name])
    return float(kept_share(method_state(program.history[-1], program.tensor)))


def trained(folders: list[Path], latency: dict[str, float], shape: tuple[int, int], repeats: int) -> None:
    """Print what the table predicts of models that are trained, beside what is measured."""
    from lorafx.proof.bench import bench

    whole = folders[0].parent.parent / "lora" / "keep-100-fold-0" / "onnx"
    models = [("whole", whole), *((str(folder), folder / "onnx") for folder in folders)]
    first, *others = bench(*models, shapes=(shape,), repeats=repeats, memory=False).timings
    print(f"LoRA alone: {1e3 * first.median:.2f} ms\n| run | predicted, ms | measured, ms | off |\n|---|--:|--:|--:|")
    for folder, timing in zip(folders, others, strict=True):
        predicted = kept(folder, latency, shape[1]) * first.median
        off = predicted / timing.median - 1
        name = f"{folder.parent.name}, {folder.name}"
        print(f"| {name} | {1e3 * predicted:.2f} | {1e3 * timing.median:.2f} | {off:+.1%} |", flush=True)


def main() -> None:
    """Measure, train what is missing, export, time and print the table."""
    import lorafx
    from lorafx.proof.bench import bench

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/prune"), help="folder of finished runs")
    parser.add_argument("--budget", type=float, default=0.6, help="share of the seconds to keep")
    parser.add_argument("--batch", type=int, default=SHAPE[0], help="texts at once")
    parser.add_argument("--length", type=int, default=SHAPE[1], help="tokens of a text")
    parser.add_argument("--repeats", type=int, default=40, help="timed calls of each model")
    parser.add_argument("--trained", type=Path, nargs="+", help="time these runs of benchmarks.frontier instead")
    parser.add_argument("--train-only", action="store_true", help="time nothing but the table of latencies")
    options = parser.parse_args()
    shape = options.batch, options.length
    latency = table(options.out, shape)
    if options.trained:
        trained(options.trained, latency, shape, options.repeats)
        return
    folder = options.out / f"latency-{round(100 * options.budget)}{_named(shape)}-seed-0"
    if not (folder / "score.json").is_file():
        prune.train_one(folder, passes(options.budget, latency, options.length), 0)
    if options.train_only:
        return
    lorafx.export(lorafx.load(folder / "run"), folder / "onnx", overwrite=True)
    whole = prune.deployed(options.out, [1.0])["keep 100%"]
    result = bench(("whole", whole), ("gated", folder / "onnx"), shapes=(shape,), repeats=options.repeats)
    before, after = (1e3 * timing.median for timing in result.timings)
    score = json.loads((folder / "score.json").read_text(encoding="utf-8"))
    share = score["sections"]["finegates: Gates"][0]["weights kept"]
    linear, flops = (score[key][1] / score[key][0] for key in ("weights", "flops"))
    print(
        "| budget | seconds kept, by the table | accuracy | linear parameters left | FLOPs left | LoRA alone, ms "
        "| predicted, ms | measured, ms |\n|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    print(
        f"| {options.budget:.0%} | {share:.1%} | {score['accuracy']:.4f} | {linear:.1%} | {flops:.1%} | {before:.1f} "
        f"| {share * before:.1f} | {after:.1f} |"
    )


if __name__ == "__main__":
    main()
