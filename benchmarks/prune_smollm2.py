"""SmolLM2-135M without 30 % of its FFN neurons: masked and sliced compute the same, and transformers opens the result.

    python -m benchmarks.prune_smollm2

Neurons are closed by activation importance on 64 sentences of the Brown corpus, without training, so the perplexity
gets worse; what is shown is that the smaller model is exactly the masked one.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from examples import assets


def perplexity(run: Any, tokenizer: Any, texts: list[str], tokens: int) -> float:
    """Perplexity of the first ``tokens`` tokens of texts, in windows of 256."""
    import torch

    ids = tokenizer("\n".join(texts), return_tensors="pt").input_ids[0, :tokens]
    loss, count = 0.0, 0
    for window in ids.split(256):
        inputs = {"input_ids": window[None], "attention_mask": torch.ones_like(window)[None]}
        logits = run(inputs)["logits"][0, :-1]
        loss += float(torch.nn.functional.cross_entropy(logits.double(), window[1:], reduction="sum"))
        count += len(window) - 1
    return float(torch.tensor(loss / count).exp())


def pruned(checkpoint: Path, brown: Path) -> tuple[dict[str, Any], float]:
    """The base, with neurons closed, and without them, by name; and the seconds that removing them took."""
    import lorafx
    from lorafx.passes.activation import Activation
    from lorafx.passes.dead_channels import DeadChannels
    from lorafx.passes.tidy import Tidy
    from lorafx.pipeline import run, to_eval

    base = to_eval(lorafx.capture(checkpoint))
    masked = run(base, [Activation(targets="down_proj", keep=0.7, data=str(brown), samples=64)])
    started = time.perf_counter()
    sliced = run(masked, [DeadChannels(uniform=True), Tidy()])
    return {"base": base, "masked": masked, "sliced": sliced}, time.perf_counter() - started


def main() -> None:
    """Close, fold, compare, write, open again; print what was seen."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lorafx
    from lorafx.graph.program import parameter_count
    from lorafx.proof.open import open_runner

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/smollm2-pruned"), help="the checkpoint to write")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of Brown to measure perplexity on")
    options = parser.parse_args()
    checkpoint, brown = assets.smollm2(), assets.brown()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    held_out = brown.read_text(encoding="utf-8").splitlines()[1000:1200]
    programs, seconds = pruned(checkpoint, brown)
    base, masked, sliced = programs.values()
    rows = {
        name: perplexity(open_runner(program), tokenizer, held_out, options.tokens)
        for name, program in programs.items()
    }
    exact = lorafx.verify(masked, sliced, dtype=torch.float64)
    lorafx.export(sliced, options.out, "hf", overwrite=True)
    opened: Any = AutoModelForCausalLM.from_pretrained(options.out).eval()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(opened.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    print("| | parameters | perplexity on Brown |\n|---|--:|--:|")
    for name, program in programs.items():
        print(f"| {name} | {parameter_count(program.root.parameters()):,} | {rows[name]:.4f} |")
    print(f"\nsliced against masked in fp64: {exact.max_rel:.1e} of the scale; removal took {seconds:.1f} s")
    print(
        f"intermediate_size {base.config.intermediate_size} -> {opened.config.intermediate_size}; "
        f"reopened by transformers: {lorafx.verify(sliced, opened).summary}; it says: {said!r}"
    )


if __name__ == "__main__":
    main()
