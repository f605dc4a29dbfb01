"""SmolLM2-135M from real text to other people's runtimes: LoRA alone, and LoRA with FineGates.

    python -m benchmarks.smollm2

Passages of the Brown corpus are learned and others held out, a tenth of the corpus in blocks from everywhere in it.
Both models are trained alike, exported with their cache, and asked to go on with the beginnings of twenty held-out
passages. What the clients say is held to the folded program in PyTorch, which is not asked to generate: a text is what
it would generate if each token is its first choice after those before. Stages whose result lies in ``--out`` are not
run again; each is a process of its own, whose peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from benchmarks.clients import CLIENTS, Question
from examples import assets

RANK, BUDGET = 16, 0.7
RECIPES = ("lora", "lora-finegates")
#: Lines of Brown that stay together, and which of ten such blocks is held out.
BLOCK, HELD_OUT = 100, 7
PROMPTS, BEGINNING, NEW = 20, 16, 64


# ---- the text


def passages(held_out: bool, length: int, tokenizer: Any) -> Iterator[str]:
    """Texts of ``length`` tokens, each within one block of lines."""
    lines = assets.brown().read_text(encoding="utf-8").splitlines()
    for number, start in enumerate(range(0, len(lines), BLOCK)):
        if (number % 10 == HELD_OUT) == held_out:
            ids = tokenizer(" ".join(lines[start : start + BLOCK]))["input_ids"]
            for first in range(0, len(ids) - length + 1, length):
                yield tokenizer.decode(ids[first : first + length])


def write_text(out: Path, options: argparse.Namespace) -> None:
    """``train.jsonl``, as many passages as are learned, and ``held-out.jsonl``; each drawn from all there are."""
    import random

    from transformers import AutoTokenizer

    tokenizer, chance = AutoTokenizer.from_pretrained(assets.smollm2()), random.Random(0)
    for name, held_out, count in (("train", False, options.steps * options.batch), ("held-out", True, options.rows)):
        texts = list(passages(held_out, options.length, tokenizer))
        rows = [json.dumps({"text": text}) for text in chance.sample(texts, count)]
        (out / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


# ---- stages


def recipe(name: str, steps: int) -> list[dict[str, Any]]:
    """The passes of a row. What drives gates has to do in few steps what the default rates do in five hundred."""
    rates = {"gate_rate": 2e-2 * 500 / steps, "multiplier_rate": 500.0 / steps}
    lora = {"name": "lora", "rank": RANK, "alpha": 2.0 * RANK, "targets": "all-linear"}
    gates = {"name": "finegates", "budget": BUDGET, "targets": "all-linear", **rates}
    return [lora, gates] if name == "lora-finegates" else [lora]


def reading(options: argparse.Namespace) -> dict[str, Any]:
    """How both tables are read: passages as they are, which end nowhere."""
    return {"max_length": options.length, "end_of_text": False}


def perplexity(out: Path, program: Any, runner: Any, options: argparse.Namespace) -> float:
    """Of the held-out passages."""
    from lorafx.proof.scores import scores_of

    return scores_of(program, runner, out / "held-out.jsonl", {**reading(options), "eval_batch_size": 8}).before


def train(out: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train a recipe and fold it; the perplexity of the base and of the folded model, and what is left."""
    import lorafx
    from lorafx.proof.open import open_runner
    from lorafx.reporting.sizes import weights_by_block

    base = lorafx.capture(assets.smollm2())
    program, kept = lorafx.rewrite(base, {"pass": recipe(name, options.steps)}), out / name / "trainer"
    values: dict[str, Any] = {"batch_size": options.batch, "max_steps": options.steps, "learning_rate": options.rate}
    values |= {"save_steps": 20, "output_dir": kept, "resume": any(kept.glob("checkpoint-*")), **reading(options)}
    result = lorafx.train(program, out / "train.jsonl", **values, log_steps=10)
    program.save(out / name / "run", overwrite=True)
    folded = lorafx.fold(program)
    sizes = [sum(size for block, size in weights_by_block(one).items() if block) for one in (base, folded)]
    scores = {key: perplexity(out, one, open_runner(one), options) for key, one in (("base", base), ("folded", folded))}
    return {"training s": result.seconds, "loss": result.metrics["train_loss"], "kept": sizes[1] / sizes[0], **scores}


def export(out: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Export a run as a decoder, held to its program; the size of its files."""
    import lorafx

    folder = out / name / "onnx"
    result = lorafx.export(lorafx.load(out / name / "run"), folder, generate=True, overwrite=True)
    assert result is not None
    sizes = {file.name: file.stat().st_size for file in (folder / "onnx").iterdir()}
    return {"MB": sum(sizes.values()) / 1e6, "parity": result.summary, "notes": list(result.notes)}


def ask(out: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every client's texts, each token held to the folded program; the perplexity of what was exported."""
    import lorafx
    from lorafx.models.tokenizers import find_tokenizer
    from lorafx.proof.open import open_runner

    folder = out / name / "onnx"
    tokenizer: Any = find_tokenizer(folder)
    lines = (out / "held-out.jsonl").read_text(encoding="utf-8").splitlines()[:PROMPTS]
    prompts = [tokenizer(json.loads(line)["text"])["input_ids"][:BEGINNING] for line in lines]
    said = {client: ask_it([Question(str(folder.absolute()), prompts, NEW)])[0] for client, ask_it in CLIENTS.items()}
    folded = lorafx.fold(lorafx.load(out / name / "run"))
    found = {client: first_choices(folded, prompts, texts) for client, texts in said.items()}
    written = [tokenizer.decode(text) for text in said["onnxruntime"][:3]]
    scored = perplexity(out, folded, open_runner(folder), options)
    return {"tokens": found, "onnx perplexity": scored, "texts": written}


def first_choices(program: Any, prompts: list[list[int]], texts: list[list[int]]) -> str:
    """How many tokens after the prompts are the program's first choice, of those that do not end a text."""
    import torch

    module, end = program.module().eval(), program.config.eos_token_id
    equal, total = 0, 0
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([text])
        with torch.no_grad():
            logits = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
        logits[:, end] = -torch.inf
        equal += int((logits.argmax(-1) == ids[0, len(prompt) :]).sum())
        total += len(text) - len(prompt)
    return f"{equal} of {total}"


STAGES: dict[str, Callable[[Path, str, argparse.Namespace], dict[str, Any]]] = {
    "train": train,
    "export": export,
    "ask": ask,
}


def run_one(out: Path, name: str, stage: str, options: argparse.Namespace) -> None:
    """Run a stage in this process and write down what it found, and what it took."""
    from lorafx.proof.memory import peak_memory

    started = time.perf_counter()
    found = STAGES[stage](out, name, options)
    took = {
        "s": time.perf_counter() - started,
        "processor s": time.process_time(),
        "peak GB": (peak_memory() or 0) / 1e9,
    }
    (out / name / f"{stage}.json").write_text(json.dumps({**found, **took}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run what has not been run, and print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/smollm2"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="passages a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a passage")
    parser.add_argument("--rows", type=int, default=64, help="passages that are held out and scored")
    parser.add_argument("--rate", type=float, default=5e-4, help="peak learning rate of the adapters")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "STAGE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    out: Path = options.out
    if options.one:
        name, stage = options.one
        run_one(out, name, stage, options)
        return
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "held-out.jsonl").is_file():
        write_text(out, options)
    for stage in STAGES:
        for name in RECIPES:
            file = out / name / f"{stage}.json"
            if not file.is_file():
                file.parent.mkdir(exist_ok=True)
                command = [sys.executable, "-m", "benchmarks.smollm2", *sys.argv[1:], "--one", name, stage]
                subprocess.run(command, check=True)
            print(f"{name}, {stage}: {file.read_text(encoding='utf-8')}", flush=True)


if __name__ == "__main__":
    main()
