"""Decoders that generate: milliseconds for the prompt and tokens a second after it, lorafx beside what else there is.

    python -m benchmarks.generate export              # SmolLM2-135M, merged and with 70 % of it left
    python -m benchmarks.generate time
    python -m benchmarks.generate export --device cuda --weightless && python -m benchmarks.generate time --device cuda

Every row is a process of its own; they take turns, prompt by prompt. Greedy, batches of 1 and 8, prompts of 128 random
tokens, 64 new ones; prefill is the time of the first new token, the rest gives tokens a second. PyTorch runs what
transformers' ``generate`` does; ONNX Runtime is driven by hand, the cache left where it is computed. ``--weightless``
leaves the weights of the ONNX files behind for a machine that they do not reach: times do not depend on them, and
``time`` draws new ones. ``--peers`` names a Python with onnxruntime-genai and mobius-onnx: their builders' models are
written too, and onnxruntime-genai runs what has a config for it. Any other folder of the layout may be put beside the
others.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.by_hand import NEW, Onnx, answer
from benchmarks.train import SMOLLM2
from benchmarks.turns import Turns, questions, say

PROMPT, BATCHES = 128, (1, 8)
KEEP = 0.7
#: Folders of models that `export` writes.
THEIRS, MERGED, PRUNED = "transformers-export", "lorafx-merged", "lorafx-70"
GENAI, MOBIUS = "genai-builder", "mobius-onnx"
#: Rows that need no folder, by device.
TORCH = {"cpu": ("transformers",), "cuda": ("transformers", "transformers, static cache, compiled")}
Device = Literal["cpu", "cuda"]
#: Generates for a batch: milliseconds of the prompt, tokens a second after it, and the tokens of the first text.
Generate = Callable[[np.ndarray[Any, Any]], dict[str, Any]]


# ---- what is measured


def export(out: Path, device: Device, weightless: bool, peers: str | None) -> None:
    """Write the folders of all rows; what is there already is left."""
    import torch

    import lorafx
    from examples import assets
    from lorafx.passes.magnitude import Magnitude

    dtype = torch.float16 if device == "cuda" else torch.float32
    options: dict[str, Any] = {"provider": device, "dtype": dtype, "generate": True}
    base = lorafx.capture(assets.smollm2())
    passes = {MERGED: [], PRUNED: [Magnitude(targets="all-linear", keep=KEEP)]}
    for name, steps in passes.items():
        if not (out / name).is_dir():
            folded = lorafx.fold(lorafx.rewrite(base, steps), provider=device)
            # What magnitude leaves untrained is up to 6e-5 of the scale from exact in fp32, by rounding alone: more
            # than an export may be, so it is timed only.
            lorafx.export(folded, out / name, **options, check=not steps)
    if not (out / THEIRS).is_dir():
        their_export(assets.smollm2(), out / THEIRS, device, dtype)
    if peers and not (out / GENAI).is_dir():
        given = [
            "-i",
            str(assets.smollm2()),
            "-o",
            str(out / GENAI),
            "-p",
            "fp32",
            "-e",
            device,
            "-c",
            str(out / "cache"),
        ]
        subprocess.run([peers, "-m", "onnxruntime_genai.models.builder", *given], check=True, stdout=sys.stderr)
    if peers and not (out / MOBIUS).is_dir():
        given = [str(assets.smollm2()), device, str(out / MOBIUS)]
        subprocess.run([peers, "-c", _MOBIUS, *given], check=True, stdout=sys.stderr)
    if weightless:
        for file in out.rglob("*.onnx"):
            leave_weights_behind(file)


def their_export(checkpoint: Path, folder: Path, device: Device, dtype: Any) -> None:
    """transformers' own graphs for a prompt and for one token after a past."""
    from contextlib import redirect_stdout

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    ids = torch.randint(5, 1000, (2, 16))
    with redirect_stdout(sys.stderr):
        config = OnnxConfig(dynamic=True, ort_fusions=device)
        exporter: Any = OnnxExporter()
        made = exporter.export_for_generation(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, config)
    made.save_pretrained(folder)


def leave_weights_behind(file: Path) -> None:
    """Delete an ONNX file's data; what is not a large matrix of floats moves into the file."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

    model = onnx.load(file, load_external_data=False)
    places = set()
    for tensor in filter(uses_external_data, model.graph.initializer):
        places.add(next(entry.value for entry in tensor.external_data if entry.key == "location"))
        if int(np.prod(tensor.dims)) < 2**16 or tensor.data_type not in _FLOATS:
            load_external_data_for_tensor(tensor, str(file.parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    onnx.save(model, file)
    for place in places:
        (file.parent / place).unlink()


#: ONNX's numbers of float32 and float16.
_FLOATS: dict[int, Any] = {1: np.float32, 10: np.float16}


def draw_weights(file: Path) -> None:
    """Give an ONNX file without its data random weights of a usual size."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    chance = np.random.default_rng(0)
    pool = (0.02 * chance.standard_normal(2**20)).astype(np.float32)
    for tensor in filter(uses_external_data, onnx.load(file, load_external_data=False).graph.initializer):
        info = ExternalDataInfo(tensor)
        data = file.parent / info.location
        data.touch()
        values = np.resize(pool[chance.integers(2**19) :], int(np.prod(tensor.dims))).astype(_FLOATS[tensor.data_type])
        with data.open("r+b") as written:
            written.seek(info.offset or 0)
            written.write(values.tobytes())


# ---- one row, in a process of its own


def by_transformers(device: str, compiled: bool) -> Generate:
    """transformers' ``generate`` in PyTorch: of the checkpoint, or on a GPU of random weights."""
    import torch
    import transformers as hf

    if device == "cuda":
        model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**SMOLLM2))
        model = model.to(device, torch.float16).eval()
    else:
        from examples import assets

        model = hf.AutoModelForCausalLM.from_pretrained(assets.smollm2()).eval()
    cache: dict[str, Any] = {"cache_implementation": "static"} if compiled else {}

    def run(ids: Any, new: int) -> tuple[float, Any]:
        start = time.perf_counter()
        count: dict[str, Any] = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": 2}
        said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **count, **cache)
        return time.perf_counter() - start, said[0, ids.shape[1] :].tolist()  # waits for the device

    def generate(prompt: np.ndarray[Any, Any]) -> dict[str, Any]:
        ids = torch.from_numpy(prompt).to(device)
        first, (whole, tokens) = run(ids, 1)[0], run(ids, NEW)
        return answer(first, whole - first, len(prompt), tokens)

    return generate


_MOBIUS = """
import sys, mobius
made = mobius.build(sys.argv[1], execution_provider=sys.argv[2], dtype="f32" if sys.argv[2] == "cpu" else "f16")
made.save(sys.argv[3])
"""
_GENAI = """
import json, sys, time
import numpy, onnxruntime_genai as og
model, new = og.Model(sys.argv[1]), int(sys.argv[2])
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    prompt = numpy.array(json.loads(line), dtype=numpy.int32)
    parameters, end = og.GeneratorParams(model), prompt.shape[1] + new
    parameters.set_search_options(max_length=end, min_length=end, do_sample=False, batch_size=len(prompt))
    generator = og.Generator(model, parameters)
    start = time.perf_counter()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    first = time.perf_counter() - start
    for _ in range(new - 1):
        generator.generate_next_token()
    rest = time.perf_counter() - start - first
    said = [int(token) for token in generator.get_sequence(0)][prompt.shape[1]:]
    took = {"prefill ms": 1e3 * first, "tokens/s": len(prompt) * (new - 1) / rest}
    print(json.dumps({**took, "tokens": said}), flush=True)
"""


def serve(row: str, out: Path, device: str) -> None:
    """Answer each prompt, a list of texts, with what generating for it took."""
    generate = by_transformers(device, "compiled" in row) if row in TORCH[device] else Onnx(out / row, device)
    say("ready")
    for prompt in questions():
        say(generate(np.array(prompt)))


# ---- all rows, in turns


def measure(out: Path, device: str, rounds: int, peers: str | None) -> dict[str, Any]:
    """What every row said, batch by batch, round by round; the first round is not counted."""
    if device == "cuda":
        for file in out.rglob("*.onnx"):
            draw_weights(file)
    chance = np.random.default_rng(1)
    own = [sys.executable, "-m", "benchmarks.generate", "time", "--out", str(out), "--device", device, "--serve"]
    folders = sorted(folder.name for folder in out.iterdir() if any(folder.rglob("*.onnx")))
    rows = {name: Turns(name, [*own, name]) for name in (*TORCH[device], *folders)}
    for name in folders:
        if peers and (out / name / "genai_config.json").is_file():
            rows[f"{name}, onnxruntime-genai"] = Turns(name, [peers, "-c", _GENAI, str(out / name), str(NEW)])
    found: dict[str, Any] = {name: {str(batch): [] for batch in BATCHES} for name in rows}
    try:
        for child in rows.values():
            child.answer()
        for batch in BATCHES:
            for number in range(rounds + 1):
                prompt = chance.integers(5, 49000, (batch, PROMPT)).tolist()
                order = list(rows) if number % 2 else list(rows)[::-1]
                for name in order:
                    found[name][str(batch)].append(rows[name].ask(prompt))
    finally:
        for child in rows.values():
            child.end()
    return found


def table(found: dict[str, Any]) -> str:
    """Medians of all rounds but the first, and how many of the first text's tokens are those of the first row."""
    first, lines = next(iter(found)), []
    for name, batches in found.items():
        cells = [name]
        for batch, answers in batches.items():
            for key in ("prefill ms", "tokens/s"):
                cells.append(f"{statistics.median(one[key] for one in answers[1:]):.1f}")
            pairs = [
                (own, theirs)
                for one, other in zip(answers, found[first][batch], strict=True)
                for own, theirs in zip(one["tokens"], other["tokens"], strict=True)
            ]
            cells.append(f"{sum(own == theirs for own, theirs in pairs)} of {len(pairs)}")
        lines.append("| " + " | ".join(cells) + " |")
    head = "".join(f" batch {batch}: prefill ms | tokens/s | same tokens |" for batch in BATCHES)
    return "\n".join([f"| |{head}", "|---|" + "--:|" * 3 * len(BATCHES), *lines])


def machine(device: str) -> str:
    """What the times are of."""
    import torch

    versions = [torch.cuda.get_device_name()] if device == "cuda" else [f"{torch.get_num_threads()} threads"]
    for package in ("torch", "transformers", "onnxruntime-gpu", "onnxruntime"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join([*versions, f"Python {platform.python_version()}", time.strftime("%F")])


def main() -> None:
    """Export, or time and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("export", "time"))
    parser.add_argument("--device", choices=list(TORCH), default="cpu")
    parser.add_argument("--out", type=Path, help="folders of the models; out/generate-DEVICE, if left out")
    parser.add_argument("--weightless", action="store_true", help="write ONNX files without their weights")
    parser.add_argument("--peers", help="a Python with onnxruntime-genai and mobius-onnx")
    parser.add_argument("--rounds", type=int, default=5, help="prompts that count")
    parser.add_argument("--serve", metavar="ROW", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out or Path("out") / f"generate-{options.device}"
    if options.serve:
        serve(options.serve, out, options.device)
    elif options.what == "export":
        export(out, options.device, options.weightless, options.peers)
    else:
        print(machine(options.device), flush=True)
        found = measure(out, options.device, options.rounds, options.peers)
        (out / "found.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(table(found), flush=True)


if __name__ == "__main__":
    main()
