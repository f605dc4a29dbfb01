"""Whether a decoder with its cache computes what its program does, whichever way the tokens are put to it.

The program has no cache: it is asked once about each whole text that the decoder generated, alone and without padding,
and its logits stand beside those that the decoder gave step by step. Where all of them agree within the tolerance, the
greedy tokens are the program's: a token that is not its first choice is as good as that within twice the tolerance,
which is a tie, and the texts after it are compared with it in place.

A decoder goes on with a prompt; an encoder-decoder answers it, and the same is asked of its answers.

No text holds the padding token, except where it is padded: models look for it (T5Gemma hides it from what follows), and
a decoder that is given a token at a time cannot. It is neither made up nor chosen, unless it ends texts as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, first_line
from ..graph.precision import coarsest, tolerance
from ..models.tokenizers import length_limit, pad_token
from ..parity.comparison import Case, Comparison, difference
from ..parity.inputs import InputSpec
from ..parity.runner import Runner
from .encoder_decoder import SOUND

#: How many tokens are generated for each prompt.
NEW = 64
#: The same where every step reads many gigabytes of weights from their file.
SLOW = 4
#: So many tokens after a batch of prompts, and put one by one to an empty cache.
_FEW = 8
#: Lengths of made-up prompts: the shortest, and odd ones.
_LENGTHS = (1, 3, 8, 21)
#: Prompts where there is a tokenizer: of several lengths, and of what decoders are asked.
PROMPTS = (
    "The",
    "The capital of France is",
    "Once upon a time there was a small village by the sea, and in it",
    "Question: a train leaves at 9:40 and arrives at 12:05. How long is the journey?\nAnswer:",
    "def mean(values):\n    ",
)
_LOGITS = "logits"


@dataclass(frozen=True)
class _Text:
    """A prompt and what the decoder said.

    Attributes:
        name: of the prompt, as people read it
        asked: ids of the prompt, ``[tokens]``; of sound, ``[bins, frames]``
        speaker: what went on with it, or answers it
        ids: of what was said, ``[tokens]``, and what it began with: the prompt itself, or what every answer begins with
        begun: how many tokens it began with
        logits: the program's, one row a token but the last
    """

    name: str
    asked: Tensor
    speaker: Any
    ids: Tensor
    begun: int
    logits: Tensor


def hold_generation(
    reference: Runner, written: Runner, texts: Iterable[str] | None = None, tokenizer: Any = None, seed: int = 0
) -> Comparison:
    """Compare what ``written``, which has a cache, computes step by step with what ``reference`` does for whole texts.

    Prompts go in at once, and then token by token what was chosen last; tokens one by one from the first on; several
    tokens after a past; and prompts of other lengths in one batch, padded on the left, then a token each.

    Args:
        reference: anything that gives logits for whole texts
        written: a runner with a ``decoder``
        texts: prompts, instead of ``PROMPTS`` (or made-up tokens where there is no tokenizer)
        tokenizer: makes tokens of them
        seed: of made-up tokens

    Raises:
        UsageError: the prompts leave no room for a token, or there is no tokenizer for ``texts``
    """
    lowest = coarsest((reference.dtype, written.dtype))
    limit, pad = length_limit(reference.config, written.config), _padding(reference.config, written.config)
    prompts = _prompts(written, tokenizer, texts, limit, seed, pad)
    cases: list[Case] = []
    notes = [f"{runner.label}: {runner.note}" for runner in (reference, written) if runner.note]
    try:
        named = [f"{len(p)} tokens" if p.dim() == 1 else f"sound {n}" for n, p in enumerate(prompts, 1)]
        found = [
            _greedy(reference, written.decoder, prompt, (limit, pad), cases, name)
            for prompt, name in zip(prompts, named, strict=True)
        ]
        few = min(_FEW, SLOW) if written.decoder.slow else _FEW
        _one_by_one(max(found, key=lambda text: len(text.asked)), few, cases)
        _after_a_past(max(found, key=lambda text: len(text.ids)), cases)
        _batch(written.decoder, found, few, cases)
        notes.append(_said(found, pad))
    except _RefusedError as error:
        cases.append(Case(str(error.args[0]), _LOGITS, problem=str(error.args[1]), shapes_differ=True))
    return Comparison(reference.label, written.label, lowest, tolerance(lowest), tuple(cases), (), tuple(notes))


class _RefusedError(Exception):
    """One side does not take an input that it has to: which input, and what it said."""


def _padding(*configs: Any) -> int | None:
    """The padding token, where it does nothing but pad; None where it ends texts too, or there is none."""
    texts = [config.get_text_config() for config in configs if config is not None]
    ends = [getattr(text, "eos_token_id", None) for text in texts]
    pad = pad_token(*configs)
    return None if any(pad in end if isinstance(end, list) else pad == end for end in ends) else pad


def _choice(logits: Tensor, pad: int | None) -> Tensor:
    """The tokens that are likeliest, ``[...]``, padding left out; of logits ``[..., vocabulary]``."""
    if pad is None:
        return logits.argmax(-1)
    return logits.index_fill(-1, torch.tensor(pad, device=logits.device), -torch.inf).argmax(-1)


def _prompts(
    written: Runner, tokenizer: Any, texts: Iterable[str] | None, limit: int | None, seed: int, pad: int | None
) -> list[Tensor]:
    sound = next((spec for spec in written.inputs if spec.name == SOUND), None)
    if sound is not None and texts is not None:
        raise UsageError(f"{written.label} answers to sound, not to texts; leave texts out")
    if sound is not None:
        return _sounds(sound, seed)
    if texts is not None and tokenizer is None:
        raise UsageError(f"no tokenizer in {written.label}; pass one, or leave texts out")
    if tokenizer is not None:
        given = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in (PROMPTS if texts is None else texts)]
    else:
        ids = next(spec for spec in written.inputs if spec.name == "input_ids")
        chance = torch.Generator().manual_seed(seed)
        given = [torch.randint(ids.low, ids.high, (length,), generator=chance) for length in _LENGTHS]
        other = ids.low + (pad == ids.low)
        given = given if pad is None else [tokens.where(tokens != pad, other) for tokens in given]
    # Room for new tokens: at least half of what the model takes.
    most = None if limit is None else max(limit // 2, 1)
    kept = [ids[:most] for ids in given if len(ids)]
    if not kept or (limit is not None and limit < 2):
        raise UsageError(f"{written.label}: no prompt with a token and room for another; give other texts")
    return kept


def _sounds(spec: InputSpec, seed: int) -> list[Tensor]:
    """Made-up sound: noise, as many pieces as there are prompts elsewhere, ``[bins, frames]`` each."""
    chance = torch.Generator().manual_seed(seed)
    sizes = [size for size in spec.sizes[1:] if size is not None]
    return [torch.randn(sizes, generator=chance).to(spec.dtype) for _ in _LENGTHS]


def _whole(reference: Runner, inputs: dict[str, Tensor], count: int, label: str) -> Tensor:
    """The reference's logits for one text of this many tokens, ``[tokens, vocabulary]``."""
    try:
        outputs = reference(inputs)
    except Exception as error:  # each runtime raises classes of its own
        raise _RefusedError(label, f"refused by {reference.label}: {first_line(error)}") from error
    if _LOGITS not in outputs or outputs[_LOGITS].shape[:2] != (1, count):
        raise _RefusedError(label, f"{reference.label} gives no logits for every token")
    return outputs[_LOGITS][0]


def _step(decoder: Any, ids: Tensor, mask: Tensor, past: Any, label: str) -> tuple[Tensor, Any]:
    try:
        return decoder.step(ids, mask, past)
    except Exception as error:  # ONNX Runtime raises classes of its own
        done = mask.shape[1] - ids.shape[1]
        raise _RefusedError(label, f"refused after {done} tokens: {first_line(error)}") from error


def _steps(decoder: Any, ids: Tensor, mask: Tensor, parts: Sequence[int], label: str) -> Tensor:
    """The decoder's logits for texts that it is given in parts of this many tokens, ``[batch, tokens, vocabulary]``."""
    past, start, found = decoder.empty(len(ids)), 0, []
    for part in parts:
        logits, past = _step(decoder, ids[:, start : start + part], mask[:, : start + part], past, label)
        found.append(logits)
        start += part
    return torch.cat(found, 1)


def spoken(written: Runner, tokenizer: Any = None, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """The prompts of a comparison, each with what a decoder says: ids, ``[tokens]``, the prompt's among them where it
    goes on with it."""
    limit, pad = length_limit(written.config), _padding(written.config)
    prompts = _prompts(written, tokenizer, None, limit, seed, pad)
    found = []
    for prompt in prompts:
        speaker, start = _begun(written.decoder, prompt[None], torch.ones_like(prompt[None]), "a prompt")[:2]
        new = _room(written.decoder, start.shape[1], limit)
        found.append((prompt, _generated(speaker, start[0], new, pad, "a prompt")[0][0]))
    return found


def _room(decoder: Any, begun: int, limit: int | None) -> int:
    """How many tokens there are to be after so many."""
    most = SLOW if decoder.slow else NEW
    return most if limit is None else min(most, limit - begun)


def _generated(decoder: Any, prompt: Tensor, new: int, pad: int | None, label: str) -> tuple[Tensor, Tensor]:
    """The prompt at once, then the tokens that the decoder chooses, one by one: ids, and logits of all but the last."""
    ids, past, found, given = prompt[None], decoder.empty(1), [], prompt[None]
    for _ in range(new):
        logits, past = _step(decoder, given, torch.ones_like(ids), past, label)
        found.append(logits)
        given = _choice(logits[:, -1:], pad)
        ids = torch.cat((ids, given), 1)
    return ids, torch.cat(found, 1)


def _greedy(
    reference: Runner,
    decoder: Any,
    prompt: Tensor,
    bounds: tuple[int | None, int | None],
    cases: list[Case],
    name: str,
) -> _Text:
    """What the decoder generates after a prompt, and the reference's logits for all of it.

    ``bounds`` are the longest text, and the token that is never chosen.
    """
    limit, pad = bounds
    speaker, start = _begun(decoder, prompt[None], torch.ones_like(prompt[None]), name)[:2]
    new = _room(decoder, start.shape[1], limit)
    label = f"{name} and {new} generated"
    ids, found = _generated(speaker, start[0], new, pad, label)
    said = ids[0, :-1]
    expected = _whole(reference, decoder.asked(prompt, said), len(said), label)
    cases.append(difference(label, _LOGITS, expected[None], found))
    return _Text(name, prompt, speaker, ids[0], start.shape[1], expected)


def _begun(decoder: Any, ids: Tensor, mask: Tensor, label: str) -> tuple[Any, Tensor, Tensor]:
    try:
        return decoder.begin(ids, mask)
    except Exception as error:  # ONNX Runtime raises classes of its own
        raise _RefusedError(label, f"refused: {first_line(error)}") from error


def _one_by_one(text: _Text, few: int, cases: list[Case]) -> None:
    count = min(few, len(text.logits))
    label = f"{count} tokens one by one"
    ids = text.ids[None, :count]
    found = _steps(text.speaker, ids, torch.ones_like(ids), [1] * count, label)
    cases.append(difference(label, _LOGITS, text.logits[None, :count], found))


def _after_a_past(text: _Text, cases: list[Case]) -> None:
    count = len(text.logits)
    half = count // 2
    if half:
        label = f"{count - half} tokens after a past of {half}"
        ids = text.ids[None, :count]
        found = _steps(text.speaker, ids, torch.ones_like(ids), [half, count - half], label)
        cases.append(difference(label, _LOGITS, text.logits[None], found))


def _batch(decoder: Any, texts: Sequence[_Text], few: int, cases: list[Case]) -> None:
    """Prompts in one batch, padded, and a few tokens of each text; every one is compared by itself."""
    few = min(few, *(len(text.logits) - text.begun for text in texts))
    longest = max(len(text.asked) for text in texts)
    rows, masks = [], []
    for text in texts:
        # Any token will do as padding: the mask hides it.
        padding = text.asked[:1].expand(longest - len(text.asked), *text.asked.shape[1:])
        parts = [(text.asked, torch.ones_like(text.asked)), (padding, torch.zeros_like(padding))]
        parts = parts[::-1] if decoder.side == "left" else parts
        row, mask = (torch.cat(both) for both in zip(*parts, strict=True))
        rows.append(row)
        masks.append(mask)
    label = f"a batch of {len(texts)}"
    if any(len(text.asked) < longest for text in texts):
        label += f", padded {decoder.side}"
    speaker, start, mask = _begun(decoder, torch.stack(rows), torch.stack(masks), label)
    added = torch.stack([text.ids[text.begun : text.begun + few] for text in texts])
    ids, mask = torch.cat((start, added), 1), torch.cat((mask, torch.ones_like(added)), 1)
    found = _steps(speaker, ids, mask, [start.shape[1], *[1] * few], label)
    for text, logits in zip(texts, found, strict=True):
        count = text.begun + few
        one = f"{label}: {text.name} and {few}"
        cases.append(difference(one, _LOGITS, text.logits[None, :count], logits[None, -count:]))


def _said(texts: Sequence[_Text], pad: int | None) -> str:
    """How many tokens were generated, and how many of them are not the first choice of the reference."""
    total = sum(len(text.ids) - text.begun for text in texts)
    other = sum(int((_choice(text.logits[text.begun - 1 :], pad) != text.ids[text.begun :]).sum()) for text in texts)
    return f"{total} greedy tokens after {len(texts)} prompts, {other} of them not the first choice of the program"
