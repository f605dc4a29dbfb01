"""Whether other people's runtimes generate the same tokens from the folder of a model that writes text.

    python -m benchmarks.clients FOLDER [FOLDER ...]

ONNX Runtime by hand, onnxruntime-genai, and transformers.js under node go on greedily with the texts that exports are
compared on, or answer them; what ends a text is chosen by none of them. genai runs no encoder-decoder of text but
Marian's of its own kind, so it is not asked about these. What reads sound is asked in tests alone. Both others are
fetched once (``examples/assets.py``); genai runs on this environment's ONNX Runtime, transformers.js brings its own.
Exits with 1 when tokens differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples import assets
from lorafx.models.tokenizers import find_tokenizer
from lorafx.proof.decoding import PROMPTS
from lorafx.proof.exported import session_options

Tokens = list[list[int]]


@dataclass(frozen=True)
class Question:
    """What a client is asked.

    Attributes:
        folder: of the model; questions in a row about one folder are put to one model
        prompts: the tokens of each text
        new: how many tokens are to follow
        adapter: a file to put into the decoder's slots, for onnxruntime-genai
    """

    folder: str
    prompts: Tokens
    new: int
    adapter: str | None = None


#: Prompts and what follows, for each question.
Client = Callable[[Sequence[Question]], list[Tokens]]

_GENAI = """
import json, sys
import numpy, onnxruntime_genai as og
said, folder = [], None
for question in json.load(sys.stdin):
    if question["folder"] != folder:
        folder, loaded = question["folder"], {}
        model = og.Model(folder)
        adapters = og.Adapters(model)
    file, texts = question["adapter"], []
    if file is not None and file not in loaded:
        loaded[file] = str(len(loaded))
        adapters.load(file, loaded[file])
    for prompt in question["prompts"]:
        parameters, end = og.GeneratorParams(model), len(prompt) + question["new"]
        parameters.set_search_options(max_length=end, min_length=end, do_sample=False)
        generator = og.Generator(model, parameters)
        if file is not None:
            generator.set_active_adapter(adapters, loaded[file])
        generator.append_tokens(numpy.array([prompt], dtype=numpy.int32))
        for _ in range(question["new"]):
            generator.generate_next_token()
        texts.append([int(token) for token in generator.get_sequence(0)])
    said.append(texts)
print(json.dumps(said))
"""

_NODE = """
import { existsSync, readFileSync } from "node:fs";
import { AutoModelForCausalLM, AutoModelForSeq2SeqLM, Tensor, env } from "@huggingface/transformers";
env.allowRemoteModels = false;
env.localModelPath = "/";
const said = [];
for (const { folder, prompts, new: count } of JSON.parse(readFileSync(0, "utf8"))) {
  const kind = existsSync(`${folder}/onnx/encoder_model.onnx`) ? AutoModelForSeq2SeqLM : AutoModelForCausalLM;
  const model = await kind.from_pretrained(folder, { dtype: "fp32", device: "cpu" });
  const texts = [];
  for (const prompt of prompts) {
    const size = [1, prompt.length];
    const input_ids = new Tensor("int64", BigInt64Array.from(prompt.map(BigInt)), size);
    const attention_mask = new Tensor("int64", new BigInt64Array(prompt.length).fill(1n), size);
    const options = { max_new_tokens: count, min_new_tokens: count, do_sample: false };
    const found = await model.generate({ input_ids, attention_mask, ...options });
    texts.push(found.tolist()[0].map(Number));
  }
  await model.dispose();
  said.push(texts);
}
console.log(JSON.stringify(said));
"""


_NODE_OF_SOUND = """
import { readFileSync } from "node:fs";
import { AutoModelForSpeechSeq2Seq, Tensor, env } from "@huggingface/transformers";
env.allowRemoteModels = false;
env.localModelPath = "/";
const { folder, values, size, new: count } = JSON.parse(readFileSync(0, "utf8"));
const model = await AutoModelForSpeechSeq2Seq.from_pretrained(folder, { dtype: "fp32", device: "cpu" });
const inputs = new Tensor("float32", Float32Array.from(values), size);
const found = await model.generate({ inputs, max_new_tokens: count, min_new_tokens: count, do_sample: false });
console.log(JSON.stringify(found.tolist()[0].map(Number)));
"""


def transcribed(folder: str, features: torch.Tensor, new: int) -> list[int]:
    """What transformers.js says of a sound, ``[1, bins, frames]``: tokens, of which all texts have the first."""
    given = {"folder": folder, "values": features.flatten().tolist(), "size": list(features.shape), "new": new}
    return _run(["node", "--input-type=module", "-e", _NODE_OF_SOUND], given, where=assets.transformers_js())


def onnxruntime(questions: Sequence[Question]) -> list[Tokens]:
    """Plain ONNX Runtime: by the graphs' inputs and the configs alone, without lorafx's reader."""
    said = []
    for question in questions:
        if question.adapter is not None:
            raise ValueError("by hand, slots are filled in lorafx.proof.slots")
        ends = _ends(question.folder)
        if is_pair(question.folder):
            encoder, decoder = (_session(question, name) for name in ("encoder_model", "decoder_model_merged"))
            first = _config(question.folder, "config.json")["decoder_start_token_id"]
            asked = (_read(encoder, prompt) for prompt in question.prompts)
            said.append([_greedy(decoder, [first], question.new, ends, given) for given in asked])
        else:
            session = _session(question, "model")
            said.append([_greedy(session, prompt, question.new, ends) for prompt in question.prompts])
    return said


def genai(questions: Sequence[Question]) -> list[Tokens]:
    """onnxruntime-genai, in a process of its own."""
    return _asked([sys.executable, "-c", _GENAI], questions, PYTHONPATH=str(assets.genai()))


def transformers_js(questions: Sequence[Question]) -> list[Tokens]:
    """transformers.js under node."""
    return _asked(["node", "--input-type=module", "-e", _NODE], questions, where=assets.transformers_js())


CLIENTS: dict[str, Client] = {
    "onnxruntime": onnxruntime,
    "onnxruntime-genai": genai,
    "transformers.js": transformers_js,
}


def _asked(command: list[str], questions: Sequence[Question], where: Path | None = None, **variables: str) -> Any:
    return _run(command, [asdict(question) for question in questions], where, **variables)


def _run(command: list[str], asked: Any, where: Path | None = None, **variables: str) -> Any:
    given, environment = json.dumps(asked), {**os.environ, **variables}
    done = subprocess.run(command, input=given, env=environment, cwd=where, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def is_pair(folder: str) -> bool:
    """Whether a folder holds an encoder and a decoder."""
    return Path(folder, "onnx", "encoder_model.onnx").is_file()


def _session(question: Question, name: str) -> Any:
    import onnxruntime as runtime

    file, options = Path(question.folder, "onnx", f"{name}.onnx"), session_options(torch.get_num_threads())
    return runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _config(folder: str, name: str) -> Any:
    return json.loads(Path(folder, name).read_text(encoding="utf-8"))


def _ends(folder: str) -> list[int]:
    ends = _config(folder, "generation_config.json")["eos_token_id"]
    return ends if isinstance(ends, list) else [ends]


def _read(encoder: Any, prompt: list[int]) -> dict[str, Any]:
    """What a decoder is given of a text."""
    mask = np.ones((1, len(prompt)), dtype=np.int64)
    (states,) = encoder.run(None, {"input_ids": np.array([prompt]), "attention_mask": mask})
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def _greedy(
    session: Any, prompt: list[int], new: int, ends: list[int], fixed: dict[str, Any] | None = None
) -> list[int]:
    inputs = {entry.name: entry for entry in session.get_inputs()}
    outputs = [entry.name for entry in session.get_outputs()]
    cache = {
        name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), dtype=np.float32)
        for name, entry in inputs.items()
        if name.startswith("past_key_values.")
    }
    ids, given = list(prompt), list(prompt)
    for _ in range(new):
        start = len(ids) - len(given)
        tokens = {
            "input_ids": np.array([given]),
            "attention_mask": np.ones((1, len(ids)), dtype=np.int64),
            "position_ids": np.arange(start, len(ids))[None],
            **(fixed or {}),
        }
        feed = {name: value for name, value in tokens.items() if name in inputs}
        results = dict(zip(outputs, session.run(None, {**feed, **cache}), strict=True))
        cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
        logits = results["logits"][0, -1]
        logits[ends] = -np.inf
        given = [int(logits.argmax())]
        ids += given
    return ids


def main() -> int:
    """Try every client on every folder; 1 when any tokens differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="that lorafx export --generate wrote")
    parser.add_argument("--new", type=int, default=64, help="tokens after each prompt")
    options = parser.parse_args()
    wrong = 0
    for folder in options.folders:
        tokenizer = find_tokenizer(folder)
        if tokenizer is None:
            raise SystemExit(f"{folder}: no tokenizer, so there are no prompts")
        question = Question(str(folder.absolute()), [tokenizer(text)["input_ids"] for text in PROMPTS], options.new)
        expected = None
        clients = {name: own for name, own in CLIENTS.items() if own is not genai or not is_pair(question.folder)}
        for name, client in clients.items():
            (said,) = client([question])
            expected = expected or said
            equal = sum(own == other for own, other in zip(said, expected, strict=True))
            wrong += equal < len(expected)
            print(f"{folder.name:16} {name:18} {equal} of {len(expected)} texts equal, {options.new} tokens each")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
