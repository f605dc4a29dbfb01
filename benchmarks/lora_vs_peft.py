"""LoRA by lorafx and by Hugging Face PEFT, trained the same way on the same sentences: held-out accuracy of both.

    python -m benchmarks.lora_vs_peft

MiniLM on the 8,530 movie sentences (shuffled with seed 0, the first 7,030 train), LoRA of rank 8 on every linear layer
of the encoder, 3 epochs, batch 32, at most 64 tokens, AdamW at 1e-3 with linear decay, HF Trainer. One row a run; rows
already measured are kept in ``--out`` and not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from examples import assets

RANK, ALPHA, EPOCHS, BATCH, LENGTH, RATE = 8, 16, 3.0, 32, 64, 1e-3
#: The linear layers of the encoder's blocks, the same words for both.
TARGETS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"


def lorafx_row(seed: int) -> dict[str, Any]:
    """Held-out accuracy, seconds and trainable parameters of lorafx's LoRA."""
    from transformers import set_seed

    import lorafx
    from lorafx.passes.lora import Lora

    set_seed(seed)
    train_csv, test_csv = assets.movie_split()
    program = lorafx.capture(assets.minilm(), task="text-classification", num_labels=2)
    program = lorafx.rewrite(program, [Lora(targets=TARGETS, rank=RANK, alpha=ALPHA)])
    result = lorafx.train(
        program,
        train_csv,
        eval_data=test_csv,
        epochs=EPOCHS,
        batch_size=BATCH,
        learning_rate=RATE,
        max_length=LENGTH,
        seed=seed,
    )
    trainable = sum(value.numel() for value in program.trainable().values())
    return {"accuracy": result.metrics["eval_accuracy"], "seconds": result.seconds, "trainable": trainable}


def peft_row(seed: int) -> dict[str, Any]:
    """Held-out accuracy, seconds and trainable parameters of PEFT's LoRA."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(assets.minilm())
    model = AutoModelForSequenceClassification.from_pretrained(assets.minilm(), num_labels=2)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    model = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(model, tokenizer, folder, seed)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        metrics = trainer.evaluate()
    trainable = sum(value.numel() for value in model.parameters() if value.requires_grad)
    return {"accuracy": metrics["eval_accuracy"], "seconds": seconds, "trainable": trainable}


def _trainer(model: Any, tokenizer: Any, folder: str, seed: int) -> Any:
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    # A list of rows is a dataset, whatever the stub says.
    train_rows, test_rows = (cast(Any, _encoded(path, tokenizer)) for path in assets.movie_split())
    arguments = TrainingArguments(
        folder,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=RATE,
        seed=seed,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=train_rows,
        eval_dataset=test_rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=_accuracy,
    )


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _encoded(path: Path, tokenizer: Any) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [{**tokenizer(r["text"], truncation=True, max_length=LENGTH), "labels": int(r["label"])} for r in rows]


def main() -> None:
    """Run the missing rows and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["lorafx", "peft"], help="run the rows of one side only")
    parser.add_argument("--out", type=Path, default=Path("out/lora_vs_peft.json"), help="where rows are kept")
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    sides: dict[str, Callable[[int], dict[str, Any]]] = {"peft": peft_row, "lorafx": lorafx_row}
    for side in [options.only] if options.only else sides:
        for seed in options.seeds:
            if f"{side} {seed}" not in rows:
                rows[f"{side} {seed}"] = sides[side](seed)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(rows, indent=2))
    print("| | trainable | accuracy, by seed | mean | seconds |\n|---|---|---|---|---|")
    for side in sides:
        found = [rows[f"{side} {seed}"] for seed in options.seeds if f"{side} {seed}" in rows]
        if found:
            accuracies = [row["accuracy"] for row in found]
            listed = ", ".join(f"{accuracy:.4f}" for accuracy in accuracies)
            seconds = statistics.median(row["seconds"] for row in found)
            mean = statistics.mean(accuracies)
            print(f"| {side} | {found[0]['trainable']:,} | {listed} | {mean:.4f} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
