"""The generation column of the matrix: every family that writes text, adapted and pruned, in every client.

Clients are fetched once, as weights and texts are (``examples/assets.py``); where npm or node is missing these tests
fail and say so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafx
from benchmarks.clients import CLIENTS, Question, genai
from lorafx.formats.slots import ADAPTER
from lorafx.passes.lora import Lora
from lorafx.passes.magnitude import Magnitude
from lorafx.passes.tied_lora import TiedLora
from lorafx.proof.open import open_runner
from lorafx.public import Program
from tests import zoo

#: Families that write text: learned positions, one key-value head for several, windows, experts, normed heads.
CAUSAL = ("gpt2", "llama", "qwen3", "gemma", "mistral", "mixtral")
#: What is done to each; of a pruned model other shares of each block are kept, so that no two layers are alike.
KINDS: dict[str, list[Any]] = {
    "adapted": [Lora(targets="all-linear", rank=4, alpha=8.0)],
    "pruned": [Magnitude(targets="all-linear", blocks=block, keep=keep) for block, keep in ((0, 0.5), (1, 0.75))],
}
CASES = [(name, kind) for name in CAUSAL for kind in KINDS]
#: What a client has no class for: it says so by name, which is no fault of the folder.
UNKNOWN = {"transformers.js": ("mixtral",)}
PROMPTS = [[7], [9, 11, 20, 8, 30, 64, 5]]
NEW = 24

Export = Callable[[str, str], tuple[Program, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A family's program of a kind, and the folder that it was exported to; each is exported once."""
    home = tmp_path_factory.mktemp("decoders")

    @cache
    def export(name: str, kind: str) -> tuple[Program, Path]:
        program, folder = zoo.randomised(lorafx.rewrite(zoo.captured(name), KINDS[kind])), home / f"{name}-{kind}"
        result = lorafx.export(program, folder, generate=True)
        assert result is not None
        assert result.ok
        return program, folder

    return export


def held(program: Program, said: list[list[int]], prompts: list[list[int]] = PROMPTS) -> None:
    """Every token that follows a prompt is what the program, which is not folded, says next; texts do not end."""
    for prompt, text in zip(prompts, said, strict=True):
        assert (text[: len(prompt)], len(text)) == (prompt, len(prompt) + NEW)
        ids = torch.tensor([text[:-1]])
        chosen(program, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, text[len(prompt) :])


def chosen(program: Program, inputs: dict[str, torch.Tensor], tokens: list[int]) -> None:
    """The last tokens that a program predicts of its inputs are ``tokens``."""
    with torch.no_grad():
        own = program.module().eval()(**inputs).logits[0, -len(tokens) :]
    own[:, program.config.eos_token_id] = -torch.inf
    best, said = own.max(-1).values, own.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    # The program's own choice, or one that rounding (fp32, other kernels) cannot tell from it.
    assert (best - said <= 1e-5 * best.abs().max()).all(), tokens


def test_every_family_that_writes_text_is_in_the_column() -> None:
    models: dict[str, Any] = {name: zoo.build(name) for name in zoo.ZOO}
    writing = {name: model for name, model in models.items() if getattr(model, "can_generate", bool)()}
    pairs = {name for name, model in writing.items() if model.config.is_encoder_decoder}
    assert (writing.keys() - pairs, pairs) == (set(CAUSAL), {"t5"})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.filterwarnings("default")  # the converter's own
def test_layers_are_alike_unless_they_were_pruned(name: str, kind: str, exported: Export) -> None:
    decoder = open_runner(exported(name, kind)[1]).decoder
    heads = {tuple(value.shape)[1] for value in decoder.empty(1).values()}
    assert len(heads) == (2 if kind == "pruned" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.filterwarnings("default")
def test_a_client_generates_the_tokens_of_the_programs(client: str, exported: Export) -> None:
    unknown = UNKNOWN.get(client, ())
    made = [exported(name, kind) for name, kind in CASES if name not in unknown]
    said = CLIENTS[client]([Question(str(folder), PROMPTS, NEW) for _, folder in made])
    for (program, folder), texts in zip(made, said, strict=True):
        try:
            held(program, texts)
        except AssertionError as error:
            raise AssertionError(f"{client}, {folder.name}: {error}") from None
    for name in unknown:
        with pytest.raises(RuntimeError, match=f"Unsupported model type: {name}"):
            CLIENTS[client]([Question(str(exported(name, "adapted")[1]), PROMPTS, NEW)])


@pytest.mark.slow
@pytest.mark.parametrize("client", ["onnxruntime", "transformers.js"])
@pytest.mark.filterwarnings("default")
def test_a_client_answers_with_the_tokens_of_an_encoder_decoder(client: str, exported: Export) -> None:
    made = [exported("t5", kind) for kind in KINDS]
    said = CLIENTS[client]([Question(str(folder), PROMPTS, NEW) for _, folder in made])
    for (program, _), texts in zip(made, said, strict=True):
        first = program.config.decoder_start_token_id
        for prompt, text in zip(PROMPTS, texts, strict=True):
            assert (text[0], len(text)) == (first, 1 + NEW)
            asked, answered = torch.tensor([prompt]), torch.tensor([text[:-1]])
            masks = {"attention_mask": torch.ones_like(asked), "decoder_attention_mask": torch.ones_like(answered)}
            given = {"input_ids": asked, "decoder_input_ids": answered, **masks}
            chosen(program, {name: value for name, value in given.items() if name in program.example}, text[1:])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_genai_swaps_adapters_of_other_methods_and_ranks_while_it_runs(tmp_path: Path) -> None:
    base = zoo.captured("llama")
    lorafx.export(base, tmp_path / "base", adapters="slots", generate=True, check=False)
    programs: list[Program] = [base]
    files: list[str | None] = [None]
    for step in (Lora(rank=2, alpha=3.0), TiedLora(rank=3)):
        programs.append(zoo.randomised(lorafx.rewrite(base, [step])))
        folder = tmp_path / step.pass_name()
        lorafx.export(programs[-1], folder, "onnx-adapter", slots=tmp_path / "base", check=False)
        files.append(str(folder / ADAPTER))
    order = [0, 1, 2, 1, 0, 2]
    said = genai([Question(str(tmp_path / "base"), PROMPTS, NEW, files[number]) for number in order])
    assert len({str(texts) for texts in said}) == 3
    for number, texts in zip(order, said, strict=True):
        held(programs[number], texts)
