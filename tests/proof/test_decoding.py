"""The judge of decoders with a cache, on ones made up to be right, wrong, or nearly right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from lorafx.errors import UsageError
from lorafx.parity.inputs import InputSpec
from lorafx.parity.runner import Runner
from lorafx.proof.decoder import CachedDecoder
from lorafx.proof.decoding import hold_generation
from lorafx.proof.encoder_decoder import TEXT, CachedEncoderDecoder

VOCABULARY = 11


def logits(ids: Tensor) -> Tensor:
    """Logits that depend on every token before and on where it stands; between 1 and 2 for the best."""
    places = torch.arange(1, ids.shape[1] + 1)
    sums = (ids * places).cumsum(1)
    return torch.nn.functional.one_hot(sums % VOCABULARY, VOCABULARY) + (sums % 7)[..., None] / 7


class Stub:
    """A decoder whose cache is the text so far, with what ``fault`` makes of its logits."""

    side, slow = CachedDecoder.side, CachedDecoder.slow
    asked = staticmethod(CachedDecoder.asked)

    def __init__(self, fault: Callable[[Tensor, int], Tensor]):
        self.fault = fault

    def begin(self, ids: Tensor, mask: Tensor) -> tuple[Stub, Tensor, Tensor]:
        return self, ids, mask

    def empty(self, batch: int) -> list[Tensor]:
        return [torch.zeros(0, dtype=torch.long) for _ in range(batch)]

    def step(self, ids: Tensor, mask: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        new = ids.shape[1]
        texts = [torch.cat((old, row[kept.bool()])) for old, row, kept in zip(past, ids, mask[:, -new:], strict=True)]
        found = torch.zeros(len(ids), new, VOCABULARY)
        for row, text in enumerate(texts):
            given = logits(text[None])[0][-new:]
            found[row, new - len(given) :] = given
        return self.fault(found, mask.shape[1]), texts


def judged(
    fault: Callable[[Tensor, int], Tensor] = lambda found, length: found,
    whole: Callable[[Tensor], Tensor] = logits,
    config: Any = None,
    **options: Any,
) -> Any:
    """The comparison of ``whole``, of a model with ``config``, with a decoder that computes :func:`logits` but for
    ``fault``."""
    specs = (InputSpec("input_ids", torch.int64, (None, None), 0, VOCABULARY),)
    masked = (*specs, InputSpec("attention_mask", torch.int64, (None, None)))

    def call(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": whole(values["input_ids"])}

    reference = Runner("whole", "program", "torch cpu", 1, torch.float32, specs, call, config)
    cached = Runner("cached", "decoder", "CPUExecutionProvider", 1, torch.float32, masked, call, decoder=Stub(fault))
    return hold_generation(reference, cached, **options)


@pytest.mark.parametrize(("end", "holds"), [(2, False), (5, True), ([2, 5], True)])
def test_padding_is_in_no_text_unless_it_ends_texts(end: Any, holds: bool) -> None:
    """The whole texts are asked with it: where any holds it, the reference says something else."""

    def whole(ids: Tensor) -> Tensor:
        return logits(ids) + 3.0 * (ids == 5).any()

    config = hf.LlamaConfig(vocab_size=VOCABULARY, pad_token_id=5, bos_token_id=1, eos_token_id=end)
    assert judged(whole=whole, config=config).ok is not holds


def test_a_decoder_that_is_right_is_told_how_it_was_held() -> None:
    result = judged()
    assert result.ok
    assert result.max_abs == 0.0
    assert {case.inputs for case in result.cases} >= {"8 tokens one by one", "1 tokens and 64 generated"}
    assert sum("padded left" in case.inputs for case in result.cases) == 4
    assert any("after a past of" in case.inputs for case in result.cases)
    assert result.notes[-1].startswith("256 greedy tokens after 4 prompts, 0 of them")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda found, length: found + 0.01 * (length == 40),
        lambda found, length: found + 0.01 * (found.shape[0] > 1),
        lambda found, length: found + 0.01 * (1 < found.shape[1] < length),
        lambda found, length: torch.full_like(found, torch.nan) if length == 5 else found,
    ],
    ids=["late", "in a batch", "after a past", "not a number"],
)
def test_whatever_way_it_is_wrong_is_found(wrong: Callable[[Tensor, int], Tensor]) -> None:
    assert not judged(wrong).ok


def test_a_tie_within_the_tolerance_is_counted_and_accepted() -> None:
    def nudged(found: Tensor, length: int) -> Tensor:
        best = found.max(-1, keepdim=True).values
        # The second choice is as good as the first, and is taken.
        return torch.where(torch.arange(VOCABULARY) == 0, best + 1e-6, found)

    def tied(ids: Tensor) -> Tensor:
        found = logits(ids)
        best = found.max(-1, keepdim=True).values
        return torch.where(torch.arange(VOCABULARY) == 0, best - 1e-6, found)

    result = judged(nudged, tied)
    assert result.ok
    said = result.notes[-1]
    assert said.startswith("256 greedy tokens")
    assert "0 of them" not in said


def test_a_refusal_is_a_difference_that_says_what_was_refused() -> None:
    def refuse(found: Tensor, length: int) -> Tensor:
        if length > 30:
            raise RuntimeError("no more room")
        return found

    result = judged(refuse)
    assert not result.ok
    assert "refused after 30 tokens: no more room" in result.summary


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(UsageError, match="no tokenizer in cached"):
        judged(texts=["a text"])


# ---- answers


class Answers:
    """An encoder-decoder: what it says depends on what is said so far and on the sum of the text that it answers."""

    side, slow = CachedEncoderDecoder.side, CachedEncoderDecoder.slow
    reads = TEXT
    asked = CachedEncoderDecoder.asked

    def __init__(self, reads_padding: bool = False, forgets: bool = False):
        self.reads_padding, self.forgets = reads_padding, forgets
        self.read = torch.zeros(1, 1)

    def begin(self, ids: Tensor, mask: Tensor) -> tuple[Answers, Tensor, Tensor]:
        start, speaker = torch.full((len(ids), 1), 4), Answers(self.reads_padding, self.forgets)
        speaker.read = (ids if self.reads_padding else ids * mask).sum(1, keepdim=True)
        return speaker, start, torch.ones_like(start)

    def empty(self, batch: int) -> Tensor:
        return torch.zeros(batch, 0, dtype=torch.long)

    def step(self, ids: Tensor, mask: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        said = torch.cat((past, ids), 1)
        read = self.read * 0 if self.forgets and past.shape[1] > 5 else self.read
        return logits(said + read)[:, -ids.shape[1] :], said


def answered(written: Answers) -> Any:
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    specs = tuple(InputSpec(name, torch.int64, (None, None), 0, VOCABULARY) for name in names)

    def call(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": logits(values["decoder_input_ids"] + values["input_ids"].sum())}

    reference = Runner("whole", "program", "torch cpu", 1, torch.float32, specs, call)
    kind = "encoder-decoder"
    return hold_generation(
        reference, Runner("cached", kind, "CPUExecutionProvider", 1, torch.float32, specs, call, decoder=written)
    )


def test_answers_that_are_right_are_told_how_they_were_held() -> None:
    result = answered(Answers())
    assert result.ok
    labels = [case.inputs for case in result.cases]
    assert "21 tokens and 64 generated" in labels
    assert "8 tokens one by one" in labels
    assert "32 tokens after a past of 32" in labels
    assert "a batch of 4, padded right: 3 tokens and 8" in labels
    assert "256 greedy tokens after 4 prompts, 0 of them not the first choice of the program" in result.notes


@pytest.mark.parametrize("fault", ["reads_padding", "forgets"])
def test_answers_that_are_wrong_are_found(fault: str) -> None:
    result = answered(Answers(**{fault: True}))
    assert not result.ok
    where = [case.inputs for case in result.cases if result.relative(case) > result.tolerance]
    assert all(label.startswith("a batch") for label in where) == (fault == "reads_padding")
