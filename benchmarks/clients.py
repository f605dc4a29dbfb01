"""Whether other people's runtimes generate the program's tokens from the folder of a model.

    python -m venv clients && clients/bin/pip install onnxruntime-genai
    npm install --prefix clients @huggingface/transformers
    python -m benchmarks.clients --genai clients/bin/python --node clients

Tiny random decoders of three families and encoder-decoders of two, as they are and with the smallest heads and neurons
gone (other widths in each layer), exported with ``generate=True``; each client goes on with the same prompts greedily,
or answers them, and has to give the tokens of transformers' own ``generate`` on the eager model with the same weights
closed. onnxruntime-genai runs no encoder-decoder of text but Marian's of its own kind, so it is not asked about these.
A folder of one's own is tried with ``--folder``, on the texts that exports are compared on and against ONNX Runtime
alone. onnxruntime-genai brings an ONNX Runtime of its own, which lies in the place of the one that lorafx depends on:
it wants an environment of its own, and so this is no test. Exits with 1 when tokens differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import lorafx
from lorafx.models.tokenizers import find_tokenizer
from lorafx.passes.magnitude import Magnitude
from lorafx.proof import decoding
from lorafx.proof.encoder_decoder import is_encoder_decoder
from lorafx.proof.open import open_runner

#: Half of the first layer's heads and neurons go, and a fourth of the second's.
PRUNED = (Magnitude(targets="all-linear", blocks=0, keep=0.5), Magnitude(targets="all-linear", blocks=1, keep=0.75))
PROMPTS = [[5], [7, 9, 11], [8, 2, 30, 12, 4, 17, 33]]

_GENAI = """
import json, sys
import numpy, onnxruntime_genai as og
folder, new, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
model, said = og.Model(folder), []
for prompt in prompts:
    parameters, end = og.GeneratorParams(model), len(prompt) + new
    parameters.set_search_options(max_length=end, min_length=end, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(numpy.array([prompt], dtype=numpy.int32))
    for _ in range(new):
        generator.generate_next_token()
    said.append([int(token) for token in generator.get_sequence(0)])
print(json.dumps(said))
"""

_NODE = """
import { existsSync } from "node:fs";
import { AutoModelForCausalLM, AutoModelForSeq2SeqLM, Tensor, env } from "@huggingface/transformers";
env.allowRemoteModels = false;
env.localModelPath = "/";
const [folder, count, prompts] = [process.argv[2], Number(process.argv[3]), JSON.parse(process.argv[4])];
const kind = existsSync(`${folder}/onnx/encoder_model.onnx`) ? AutoModelForSeq2SeqLM : AutoModelForCausalLM;
const model = await kind.from_pretrained(folder, { dtype: "fp32", device: "cpu" });
const said = [];
for (const prompt of prompts) {
  const size = [1, prompt.length];
  const input_ids = new Tensor("int64", BigInt64Array.from(prompt.map(BigInt)), size);
  const attention_mask = new Tensor("int64", new BigInt64Array(prompt.length).fill(1n), size);
  const options = { max_new_tokens: count, min_new_tokens: count, do_sample: false };
  const found = await model.generate({ input_ids, attention_mask, ...options });
  said.push(found.tolist()[0].map(Number));
}
console.log(JSON.stringify(said));
"""

_SIZES: dict[str, Any] = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 80}
_SIZES |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
_PAIR: dict[str, Any] = {"vocab_size": 120, "d_model": 32, "pad_token_id": 1, "eos_token_id": 3}
_T5: dict[str, Any] = {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1}
_BART: dict[str, Any] = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "bos_token_id": 2}
_BART |= {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "decoder_start_token_id": 2}
_BART |= {"max_position_embeddings": 80, "forced_eos_token_id": None}


def models() -> Iterator[tuple[str, Any]]:
    """Tiny random models that generate, by name; every parameter is moved off its initial value."""
    gpt2: dict[str, Any] = {"vocab_size": 120, "n_positions": 80, "n_embd": 32, "n_layer": 2, "n_head": 4}
    builders = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_SIZES)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2, bos_token_id=2, eos_token_id=3, pad_token_id=1)),
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_PAIR, **_T5)),
        "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_PAIR, **_BART)),
    }
    for name, build in builders.items():
        torch.manual_seed(0)
        model = build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        yield name, model


def by_transformers(program: Any, new: int) -> list[list[int]]:
    """What the eager model generates with the program's weights, those of closed units zero."""
    model = program.source.model
    values = {name: value for name, value in program.root.named_parameters() if name in dict(model.named_parameters())}
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    try:
        model.load_state_dict(values, strict=False)
        return [model.generate(torch.tensor([prompt]), **options)[0].tolist() for prompt in PROMPTS]
    finally:
        model.load_state_dict(before, strict=False)


def by_onnxruntime(folder: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    """What ONNX Runtime gives by hand; the token that ends a text is never chosen, as with the other clients."""
    decoder, end, said = open_runner(folder).decoder, _end(folder), []
    for prompt in prompts:
        asked = torch.tensor([prompt])
        speaker, ids, _ = decoder.begin(asked, torch.ones_like(asked))
        past, given = speaker.empty(1), ids
        for _ in range(new):
            logits, past = speaker.step(given, torch.ones_like(ids), past)
            logits[..., end] = -torch.inf
            given = logits[:, -1:].argmax(-1)
            ids = torch.cat((ids, given), 1)
        said.append(ids[0].tolist())
    return said


def _end(folder: Path) -> list[int]:
    ends = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    return ends if isinstance(ends, list) else [ends]


def by(command: list[str], folder: Path, where: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    """What a client in a process of its own gives."""
    asked = [*command, str(folder), str(new), json.dumps(prompts)]
    done = subprocess.run(asked, cwd=where, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed on {folder}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def answers(folder: Path, prompts: list[list[int]], options: argparse.Namespace) -> dict[str, list[list[int]]]:
    """The tokens of every client that there is."""
    said = {"onnxruntime": by_onnxruntime(folder, prompts, options.new)}
    if options.genai is not None and not is_encoder_decoder(folder):
        said["onnxruntime-genai"] = by(
            [str(options.genai.absolute()), "-c", _GENAI], folder, folder, prompts, options.new
        )
    if options.node is not None:
        script = options.node.absolute() / "lorafx_client.mjs"
        script.write_text(_NODE, encoding="utf-8")
        said["transformers.js"] = by(["node", str(script)], folder, script.parent, prompts, options.new)
    return said


def main() -> int:
    """Try every client on every folder; 1 when any tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genai", type=Path, help="a Python that imports onnxruntime_genai")
    parser.add_argument("--node", type=Path, help="a folder whose node_modules has @huggingface/transformers")
    parser.add_argument("--folder", type=Path, help="the folder of a model to try, instead of tiny models")
    parser.add_argument("--new", type=int, default=24, help="tokens after each prompt")
    options = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder, prompts, expected in _cases(options, Path(scratch)):
            for client, said in answers(folder, prompts, options).items():
                equal = sum(a == b for a, b in zip(said, expected, strict=True))
                wrong += equal < len(expected)
                print(
                    f"{name:16} {client:18} {equal} of {len(expected)} texts equal, {options.new} tokens each",
                    flush=True,
                )
    return int(wrong > 0)


def _cases(options: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, Path, list[list[int]], list[list[int]]]]:
    """Folders by name, with the prompts and what is to come out."""
    if options.folder is not None:
        folder, tokenizer = options.folder.absolute(), find_tokenizer(options.folder)
        prompts = PROMPTS if tokenizer is None else [tokenizer(text)["input_ids"] for text in decoding.PROMPTS]
        yield folder.name, folder, prompts, by_onnxruntime(folder, prompts, options.new)
        return
    for name, model in models():
        program = lorafx.capture(model)
        for kind, made in (("", program), (" pruned", lorafx.rewrite(program, PRUNED))):
            folder = scratch / f"{name}{kind.replace(' ', '-')}"
            lorafx.export(made, folder, generate=True)
            yield f"{name}{kind}", folder, PROMPTS, by_transformers(made, options.new)


if __name__ == "__main__":
    sys.exit(main())
