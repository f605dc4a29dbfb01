"""Quantised bases, folded: an adapter in the numbers that their weights stand for, and what quantising again costs.

    pip install bitsandbytes torchao
    python -m benchmarks.quantized                    # SmolLM2; --small for a random Llama

Each method that is installed quantises the base on the CPU; an adapter that PEFT made is folded into it, and compared
with PEFT over the same numbers. Prints a row a method: the bytes on disk, the largest difference of the logits as a
share of the largest, and what the export says of quantising the result again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf

import lorafx
from examples.assets import smollm2
from lorafx.models.checkpoint import open_model

ADAPTER: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]

    return hf.TorchAoConfig(Int8WeightOnlyConfig())


#: By what they are called here: the package, and the config that quantises.
METHODS: dict[str, tuple[str, Callable[[], Any]]] = {
    "bitsandbytes nf4": (
        "bitsandbytes",
        lambda: hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "bitsandbytes int8": ("bitsandbytes", lambda: hf.BitsAndBytesConfig(load_in_8bit=True)),
    "torchao int8": ("torchao", _torchao),
}


def small(folder: Path) -> Path:
    """A random Llama of two layers."""
    sizes: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(folder)
    return folder


def adapter_of(base: Path, folder: Path) -> Path:
    """An adapter as PEFT starts it, with small numbers where it has zeros."""
    torch.manual_seed(1)
    model: Any = peft.get_peft_model(hf.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**ADAPTER))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.002)
    model.save_pretrained(folder)
    return folder


def row(base: Path, config: Any, adapter: Path, folder: Path) -> tuple[int, float, str]:
    """Bytes of the quantised weights, the largest difference from PEFT, and the note on quantising again."""
    made: Any = hf.AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map="cpu")
    made.save_pretrained(folder / "base")
    size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    program = lorafx.capture(folder / "base", adapter=adapter)
    result = lorafx.export(lorafx.fold(program, gather="never"), folder / "out", format="hf")
    assert result is not None
    plain: Any = open_model(folder / "base", None, {})[0]
    theirs = peft.PeftModel.from_pretrained(plain, adapter).eval()
    ours: Any = hf.AutoModelForCausalLM.from_pretrained(folder / "out").eval()
    ids = torch.arange(5, 69).reshape(2, 32)
    with torch.no_grad():
        expected, found = theirs(input_ids=ids).logits, ours(input_ids=ids).logits
    note = next(note for note in result.notes if "quantised again" in note)
    return size, float((expected - found).abs().max() / expected.abs().max()), note


def main() -> None:
    """Print a row a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a random Llama of two layers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = small(root / "base") if arguments.small else smollm2()
        adapter = adapter_of(base, root / "adapter")
        for name, (package, config) in METHODS.items():
            if find_spec(package) is None:
                print(f"| {name} | not run: {package} is not installed |")
                continue
            size, difference, note = row(base, config(), adapter, root / name.replace(" ", "-"))
            print(f"| {name} | {size / 1e6:.1f} MB | {difference:.1e} | {note} |", flush=True)


if __name__ == "__main__":
    main()
