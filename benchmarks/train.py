"""A step of LoRA by lorafx beside the same step by PEFT: wall time, processor time and peak memory.

    python -m benchmarks.train --rounds 7 --cases smollm2 bert
    python -m benchmarks.train --device cuda

LoRA of rank 16 on every linear layer, AdamW, a plain loop; SmolLM2-135M on 4 × 256 random tokens and an encoder of
BERT-base's size with random weights, each without and with activation checkpointing. Both sides are one process each,
start from the same values, and take turns step by step; the losses they see are compared. The peak is what a process
held at most while it stepped, weights included; it grows over the first steps as the allocator's heap gets holes, so
compare runs of as many rounds. Cases already in ``--out`` are not run again.

On a GPU the cases are MiniLM and SmolLM2-135M with random weights in bf16, batches of 8 and 32, and each side is there
as it is and under ``torch.compile``; a turn is as many steps as ``--steps``, and the peak is what torch allocated. What
compiles begins together, so that all do so beside each other, before the first turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.turns import Turns, questions, say

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

RANK, ALPHA, RATE = 16, 16, 1e-4
#: The cases of each device, with the rows and the tokens of a batch.
CASES = {
    "cpu": dict.fromkeys(("smollm2", "smollm2 checkpointing", "bert", "bert checkpointing"), (4, 256)),
    "cuda": {"minilm 8": (8, 128), "minilm 32": (32, 128), "smollm2 8": (8, 256), "smollm2 32": (32, 256)},
}
#: Who takes turns with whom, by device.
SIDES = {"cpu": (("lorafx", "peft"),), "cuda": (("lorafx", "peft"), ("lorafx, compiled", "peft, compiled", "peft"))}
PEER = "peft"


# ---- one side, in a process of its own


#: Configs for the cases whose weights are random: their real sizes, no download.
_MINILM: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
}
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "pad_token_id": 2,
}  # fmt: skip


def base_model(case: str, device: str) -> Any:
    """The model to train, as transformers has it."""
    import torch
    import transformers as hf

    if case.startswith("smollm2") and device == "cpu":
        from examples import assets

        return hf.AutoModelForCausalLM.from_pretrained(assets.smollm2())
    torch.manual_seed(0)
    if case.startswith("smollm2"):
        model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**SMOLLM2))
        return model.to(torch.bfloat16)
    if case.startswith("minilm"):
        model = hf.BertForSequenceClassification(hf.BertConfig(**_MINILM))
        return model.to(torch.bfloat16)
    return hf.BertForSequenceClassification(hf.BertConfig())  # of two labels


def batch_of(model: Any, case: str, rows: int, length: int) -> dict[str, Any]:
    """Random tokens, and what is to be learned from them."""
    import torch

    ids = torch.randint(5, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids if case.startswith("smollm2") else ids[:, 0] % 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def by_lorafx(model: Any, case: str) -> tuple[Any, Callable[[], None]]:
    """lorafx's LoRA, and what its loop does before the optimiser's step."""
    import lorafx
    from lorafx.passes.lora import Lora

    rewritten = lorafx.rewrite(lorafx.capture(model), [Lora(rank=RANK, alpha=ALPHA)]).module()
    return rewritten, rewritten.before_step


def by_peft(model: Any, case: str) -> tuple[Any, Callable[[], None]]:
    """PEFT's LoRA."""
    from peft import LoraConfig, TaskType, get_peft_model

    task = TaskType.CAUSAL_LM if case.startswith("smollm2") else TaskType.SEQ_CLS
    settings = LoraConfig(task_type=task, r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(model, settings), lambda: None


def fill(model: Any) -> int:
    """Give every A the values that its module's name decides, the same on both sides; how many numbers train."""
    import zlib

    import torch

    for name, value in model.named_parameters():
        if "lora_A" in name:
            module = name.partition(".lora_A")[0].removeprefix("base_model.model.")
            chance = torch.Generator().manual_seed(zlib.crc32(module.encode()))
            value.data.copy_(torch.empty(value.shape).normal_(std=0.02, generator=chance))
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


def status(field: str) -> float:
    """A line of ``/proc/self/status``, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def serve(side: str, case: str, rows: int, length: int, device: str) -> None:
    """Make the model; then for every line that comes in do as many steps as it says, and answer with what one took."""
    import gc

    import torch

    model = base_model(case, device)
    batch = {name: value.to(device) for name, value in batch_of(model, case, rows, length).items()}
    model, before = (by_lorafx if side.startswith("lorafx") else by_peft)(model, case)
    model.to(device).train()
    if "checkpointing" in case:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainable = fill(model)
    weights = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, fused=device == "cuda")
    called = torch.compile(model, dynamic=False) if "compiled" in side else model
    gc.collect()
    say({"trainable": trainable, "torch": torch.__version__})
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here

    def step() -> torch.Tensor:
        loss = called(**batch).loss
        loss.backward()
        before()
        optimizer.step()
        if side.startswith("lorafx"):
            model.after_step()
        optimizer.zero_grad()
        return loss.detach()

    for number, steps in enumerate(questions()):
        torch.manual_seed(number)  # the same dropout on both sides
        wall, used = time.perf_counter(), time.process_time()
        loss = 0.0
        for _ in range(steps):
            loss = step()
        loss = float(loss)  # on a GPU this waits for all of them
        took = {"wall": (time.perf_counter() - wall) / steps, "cpu": (time.process_time() - used) / steps}
        peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else status("VmHWM")
        say({**took, "peak": peak, "loss": loss})


# ---- all sides, in turn


@dataclasses.dataclass
class Case:
    """The processes of one case, begun together; and what they answered."""

    name: str
    children: dict[str, Turns]
    found: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def begin(cls, name: str, device: str, sides: Sequence[str]) -> Case:
        """Start the sides, and tell each to take its first step, which is not counted."""
        size = [str(number) for number in CASES[device][name]]
        command = [sys.executable, "-m", "benchmarks.train", "--device", device, "--serve"]
        children = {side: Turns(f"{name}: {side}", [*command, side, name, *size]) for side in sides}
        for child in children.values():
            child.tell(1)
        return cls(name, children)

    def ready(self) -> None:
        """Wait till every side has taken its first step."""
        for side, child in self.children.items():
            self.found[side] = {**child.answer(), "steps": [child.answer()]}

    def measure(self, rounds: int, steps: int) -> dict[str, Any]:
        """What ``rounds`` turns of ``steps`` steps took on every side, in turns of changing order."""
        order = list(self.children)
        for number in range(rounds):
            for side in order if number % 2 else reversed(order):
                self.found[side]["steps"].append(self.children[side].ask(steps))
        return self.found

    def end(self) -> None:
        """Stop every side."""
        for child in self.children.values():
            child.end()


def rows_of(case: str, found: dict[str, Any]) -> list[str]:
    """Lines of the table, one for each side but the peer: medians of both, and the medians of the turns' ratios."""
    return [_row(case, found, side) for side in found if side != PEER]


def _row(case: str, found: dict[str, Any], side: str) -> str:
    ours, theirs = (found[who]["steps"][1:] for who in (side, PEER))
    name = case if side == "lorafx" else f"{case}, {side.replace('peft', 'PEFT')}"
    cells = [name, str(found[side]["trainable"] == found[PEER]["trainable"])]
    for key in ("wall", "cpu"):
        ratio = statistics.median(a[key] / b[key] for a, b in zip(ours, theirs, strict=True))
        medians = (statistics.median(step[key] for step in steps) for steps in (ours, theirs))
        cells += [*(f"{value:.3g}" for value in medians), f"{ratio:.3f}"]
    peaks = [steps[-1]["peak"] for steps in (ours, theirs)]
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(*(found[who]["steps"] for who in (side, PEER)), strict=True))
    cells += [*(f"{peak:.2f}" for peak in peaks), f"{peaks[0] / peaks[1]:.3f}", f"{apart:.1g}"]
    return "| " + " | ".join(cells) + " |"


HEAD = """\
| | same size | wall s | PEFT | ratio | CPU s | PEFT | ratio | peak GB | PEFT | ratio | losses apart |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"""


def measure(names: Sequence[str], sides: Sequence[str], options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """What the sides of these cases took, case by case. What compiles begins at once, others in their turn."""
    together = any("compiled" in side for side in sides)
    for group in [names] if together else [[name] for name in names]:
        begun = [Case.begin(name, options.device, sides) for name in group]
        try:
            for case in begun:
                case.ready()
            for case in begun:
                yield case.name, case.measure(options.rounds, options.steps)
        finally:
            for case in begun:
                case.end()


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=list(CASES), default="cpu")
    parser.add_argument("--cases", nargs="+", help="some cases of the device; all of them, if left out")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side that count")
    parser.add_argument("--steps", type=int, default=1, help="steps a turn; on a GPU, some tens")
    parser.add_argument("--eager", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=Path("out/train.json"), help="where measured cases are kept")
    parser.add_argument("--serve", nargs=4, metavar=("SIDE", "CASE", "ROWS", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        side, case, rows, length = options.serve
        serve(side, case, int(rows), int(length), options.device)
        return
    names = options.cases or list(CASES[options.device])
    unknown = [name for name in names if name not in CASES[options.device]]
    if unknown:
        parser.error(f"no case {unknown[0]!r} for {options.device}; there are {', '.join(CASES[options.device])}")
    kept: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    print(HEAD)
    for sides in SIDES[options.device][: 1 if options.eager else None]:
        missing = [name for name in names if _key(name, sides) not in kept]
        for name in names:
            if name not in missing:
                print("\n".join(rows_of(name, kept[_key(name, sides)])), flush=True)
        # Kept as soon as they are there: what compiles takes minutes, and a lent machine may not wait for it.
        for name, found in measure(missing, sides, options) if missing else ():
            kept[_key(name, sides)] = found
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(kept, indent=1), encoding="utf-8")
            print("\n".join(rows_of(name, found)), flush=True)


def _key(name: str, sides: Sequence[str]) -> str:
    return f"{name}: {' | '.join(sides)}"


if __name__ == "__main__":
    main()
