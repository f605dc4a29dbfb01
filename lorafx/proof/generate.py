"""Text from any model that generates: a checkpoint, a run, a folded folder, or an exported one with its cache."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArtifactError, UsageError
from ..formats.companions import GENERATION
from ..models.hub import local_folder
from ..models.tokenizers import find_tokenizer, length_limit
from ..parity.runner import Runner
from .encoder_decoder import TEXT, starts, whole
from .open import open_runner


@dataclass(frozen=True)
class Generated:
    """What a model generated.

    Attributes:
        text: without special tokens
        prompt: how many tokens it was given
        tokens: what it added
        first: seconds until the first of them
        seconds: in all
    """

    text: str
    prompt: int
    tokens: tuple[int, ...]
    first: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The answer and its speed as JSON values; the rate is that of the tokens after the first."""
        rest = self.seconds - self.first
        rate = (len(self.tokens) - 1) / rest if len(self.tokens) > 1 and rest > 0 else None
        return {
            "text": self.text,
            "tokens": list(self.tokens),
            "prompt_tokens": self.prompt,
            "new_tokens": len(self.tokens),
            "first_token_seconds": self.first,
            "seconds": self.seconds,
            "tokens_per_second": rate,
        }


def generate(
    folder: Path,
    prompt: str,
    chat: bool = False,
    most: int = 64,
    say: Callable[[str], None] = lambda text: None,
    **opening: Any,
) -> Generated:
    """The most likely next tokens, one after the other, until the model ends its text.

    A decoder with its cache is given one token at a time; any other model computes the whole text again for each.

    Args:
        folder: what :func:`lorafx.proof.open.open_runner` opens
        prompt: the text to continue
        chat: ``prompt`` is what a user says, put into the tokenizer's chat template
        most: the most new tokens; texts also end where the model's positions do
        say: called with the text as it grows, in whole characters
        opening: options of :func:`lorafx.proof.open.open_runner`

    Raises:
        UsageError: no tokenizer, no chat template, a prompt without tokens or too long, or a model that does not
            generate text
    """
    folder = local_folder(folder)
    runner = open_runner(folder, **opening)
    taken = [spec.name for spec in runner.inputs]
    if taken and TEXT not in taken:
        raise UsageError(f"{folder}: it is asked with {taken[0]}, not with a text; run it in a client of its own")
    trusted = bool(opening.get("trust_remote_code"))
    tokenizer = find_tokenizer(folder, runner.folder, trust_remote_code=trusted)
    if tokenizer is None:
        raise UsageError(f"{folder}: no tokenizer, so there is no text to give it; put its files into the folder")
    ids, limit = _prompt(tokenizer, prompt, chat, folder), length_limit(runner.config)
    start = _start(runner, folder)
    room = most if limit is None else min(most, limit - (len(start) or ids.shape[1]))
    if room < 1 or (limit is not None and ids.shape[1] > limit):
        raise UsageError(f"{folder}: takes {limit} tokens, and the prompt has {ids.shape[1]}; give a shorter one")
    ends, added, times, said = _ends(runner, folder), [], [time.perf_counter()], ""
    steps = _by_steps(runner, ids, folder) if runner.decoder else _at_once(runner, ids, start, folder)
    for token in steps:
        times.append(time.perf_counter())
        if token in ends:
            break
        added.append(token)
        said = _say(tokenizer.decode(added, skip_special_tokens=True), said, say, last=len(added) == room)
        if len(added) == room:
            break
    text = tokenizer.decode(added, skip_special_tokens=True)
    say(text[len(said) :])
    return Generated(text, ids.shape[1], tuple(added), times[1] - times[0], times[-1] - times[0])


def _say(text: str, said: str, say: Callable[[str], None], last: bool) -> str:
    """Pass on the new text; returns all that was passed on. The end may be part of a character, which the next token
    completes."""
    if last or text.endswith("\N{REPLACEMENT CHARACTER}") or not text.startswith(said):
        return said
    say(text[len(said) :])
    return text


def _prompt(tokenizer: Any, prompt: str, chat: bool, folder: Path) -> Tensor:
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(f"{folder}: its tokenizer has no chat template; give a prompt instead")
        said = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        ids = tokenizer(prompt, return_tensors="pt")
    if not ids["input_ids"].numel():
        raise UsageError("the prompt has no tokens; give one with a word")
    return ids["input_ids"].long()


def _ends(runner: Runner, folder: Path) -> set[int]:
    """The tokens that end a text, by the generation settings or else by the config."""
    for place in (folder, runner.folder):
        file = None if place is None else place / GENERATION
        if file is not None and file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
                raise ArtifactError(f"{file}: not valid JSON ({error}); fetch it again") from None
            if found is not None:
                return set(found) if isinstance(found, list) else {found}
    found = getattr(runner.config.get_text_config(), "eos_token_id", None) if runner.config is not None else None
    return set(found) if isinstance(found, list) else set() if found is None else {found}


def _start(runner: Runner, folder: Path) -> tuple[int, ...]:
    """The tokens that an encoder-decoder's output begins with; empty for a model that continues a text."""
    pair = getattr(runner.config, "is_encoder_decoder", False)
    return starts(runner.config, folder, runner.folder) if pair else ()


def _by_steps(runner: Runner, prompt: Tensor, folder: Path) -> Iterator[int]:
    speaker, ids, _ = runner.decoder.begin(prompt, torch.ones_like(prompt))
    past, given = speaker.empty(1), ids
    while True:
        logits, past = speaker.step(given, torch.ones_like(ids), past)
        given = _likeliest(logits, folder)
        ids = torch.cat((ids, given), 1)
        yield int(given)


def _at_once(runner: Runner, prompt: Tensor, start: tuple[int, ...], folder: Path) -> Iterator[int]:
    ids = torch.tensor([start]) if start else prompt
    while True:
        outputs = runner(whole(prompt, ids) if start else {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        logits = outputs.get("logits")
        if logits is None or logits.shape[:2] != ids.shape:
            raise UsageError(f"{folder}: it gives no logits for each token, so it generates no text")
        token = _likeliest(logits, folder)
        ids = torch.cat((ids, token), 1)
        yield int(token)


def _likeliest(logits: Tensor, folder: Path) -> Tensor:
    """The next token [1, 1]. ArtifactError where no token is likelier than another: any choice would look like an
    answer."""
    last = logits[:, -1:].cpu()
    if last.isnan().any():
        raise ArtifactError(f"{folder}: its logits are NaN: a weight is, or a number outgrew its dtype; write it again")
    return last.argmax(-1)
