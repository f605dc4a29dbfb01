"""Chats and packed rows: what is learned of them, token by token, and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from lorafx.cli import main
from lorafx.errors import ArtifactError, LorafxError, UsageError
from lorafx.passes.lora import Lora
from lorafx.pipeline import rewrite
from lorafx.recipes.options import TrainOptions
from lorafx.training.data import prepare
from lorafx.training.fit import train
from tests.small import WORDS, bert, captured, gpt2, words

#: A user speaks after [CLS], an assistant after [MASK], and both end with [SEP] and a new line.
TEMPLATE = (
    "{% for said in messages %}{{ '[MASK]' if said['role'] == 'assistant' else '[CLS]' }} {{ said['content'] }} [SEP]\n"
    "{% endfor %}{% if add_generation_prompt %}[MASK]{% endif %}"
)
CLS, MASK, SEP = 2, 4, 3
NOT = -100


def word(number: int) -> int:
    """The id of ``w<number>``."""
    return 5 + number


def chatting(template: str | None = TEMPLATE) -> Any:
    tokenizer = words()
    tokenizer.chat_template = template
    return tokenizer


def chat(*said: Any) -> list[dict[str, Any]]:
    """A user and an assistant in turn."""
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(said)]


def rows(columns: Any, tokenizer: Any = None, **options: Any) -> list[dict[str, Any]]:
    found = prepare(columns, captured(gpt2), tokenizer or chatting(), TrainOptions(**options)).rows
    return [found[row] for row in range(len(found))]


def test_what_the_assistant_says_is_learned_and_the_end_of_it() -> None:
    (row,) = rows({"messages": [chat("w1 w2", "w3", "w4", "w5 w6")]}, chat=True)
    one = [CLS, word(1), word(2), SEP, MASK, word(3), SEP]
    assert row["input_ids"] == [*one, CLS, word(4), SEP, MASK, word(5), word(6), SEP]
    assert row["labels"] == [*[NOT] * 5, word(3), SEP, *[NOT] * 4, word(5), word(6), SEP]
    assert row["attention_mask"] == [1] * 14


def test_a_prompt_and_a_response_are_a_chat_of_two() -> None:
    columns = {"prompt": ["w1 w2"], "response": ["w3"]}
    (row,) = rows(columns, chat=True, text="prompt", label="response")
    assert row == rows({"messages": [chat("w1 w2", "w3")]}, chat=True)[0]
    assert rows({"text": ["w1"], "label": ["w2"]}, chat=True)[0]["labels"] == [NOT, NOT, NOT, NOT, word(2), SEP]


def test_a_system_prompt_is_told() -> None:
    said = [{"role": "system", "content": "w9"}, *chat("w1", "w2")]
    (row,) = rows({"messages": [said]}, chat=True)
    assert row["labels"] == [*[NOT] * 7, word(2), SEP]


def test_a_long_chat_is_cut_and_what_is_left_is_learned() -> None:
    (row,) = rows({"messages": [chat("w1", "w2 w3 w4", "w5", "w6")]}, chat=True, max_length=6)
    assert row["labels"] == [NOT, NOT, NOT, NOT, word(2), word(3)]


def refused(error: type[LorafxError], said: str, columns: Any, tokenizer: Any = None, **options: Any) -> None:
    with pytest.raises(error, match=said) as raised:
        rows(columns, tokenizer, **{"chat": True, **options})
    assert "\n" not in str(raised.value)


def test_what_is_no_chat_is_refused_with_its_row() -> None:
    good = chat("w1", "w2")
    refused(ArtifactError, "row 2: 'messages' is 'w1', not a list of objects with role", {"messages": [good, "w1"]})
    refused(ArtifactError, "row 1: 'messages' is .*, not a list", {"messages": [[{"content": "w1"}]]})
    refused(ArtifactError, "row 2: 'messages' holds nothing that an assistant says", {"messages": [good, chat("w1")]})
    refused(ArtifactError, "row 1: nothing that the assistant says is within 4 tok", {"messages": [good]}, max_length=4)
    parts = chat([{"type": "text", "text": "w1"}], "w2")
    refused(ArtifactError, "row 1: its chat template takes the content of message 1 for text", {"messages": [parts]})
    refused(ArtifactError, "no column 'label'", {"text": ["w1"]})
    refused(UsageError, "no chat template", {"messages": [good]}, chatting(None))
    raising = "{{ raise_exception('roles must alternate') }}"
    refused(
        ArtifactError, "row 1: its chat template refuses the chat: roles must", {"messages": [good]}, chatting(raising)
    )


def test_a_template_that_rewrites_what_was_said_is_refused() -> None:
    """Some leave out what an assistant thought once a user has answered."""
    last = "{% if not loop.last %}[CLS]{% else %}" + "{{ said['content'] }} [SEP]\n{% endif %}"
    forgetful = "{% for said in messages %}" + last + "{% endfor %}"
    refused(
        ArtifactError,
        "row 1: its chat template writes message 2 otherwise",
        {"messages": [chat("w1", "w2", "w3", "w4")]},
        chatting(forgetful),
    )


def test_other_models_learn_no_chats() -> None:
    for name in ("chat", "packing"):
        options: dict[str, Any] = {name: True}
        with pytest.raises(UsageError, match=f"learns no next tokens: leave {name} out"):
            prepare({"text": ["w1"], "label": [0]}, captured(bert), chatting(), TrainOptions(**options))


# ---- several texts in a row


def test_texts_are_packed_in_order_and_none_is_cut() -> None:
    texts = {"text": ["w1 w2", "w3", "w4 w5 w6", "w7 w8"]}  # [CLS] and [SEP] around each
    found = rows(texts, words(), packing=True, max_length=8)
    first = [CLS, word(1), word(2), SEP]
    assert [row["input_ids"] for row in found] == [
        [*first, CLS, word(3), SEP],
        [CLS, word(4), word(5), word(6), SEP],
        [CLS, word(7), word(8), SEP],
    ]
    # How a text begins is not to be learned from another one.
    assert found[0]["labels"] == [*first, NOT, word(3), SEP]
    assert found[1]["labels"] == found[1]["input_ids"]
    assert [row["attention_mask"] for row in found] == [[1] * len(row["input_ids"]) for row in found]


def test_chats_are_packed_with_what_they_do_not_learn() -> None:
    (row,) = rows({"messages": [chat("w1", "w2"), chat("w3", "w4")]}, chat=True, packing=True, max_length=32)
    own = [NOT, NOT, NOT, NOT, word(2), SEP, NOT, NOT, NOT, NOT, word(4), SEP]
    assert row["labels"] == own


def test_packed_chats_are_trained_on() -> None:
    program = rewrite(captured(gpt2), [Lora(rank=2, targets="c_attn")])
    columns = {"messages": [chat(f"w{n}", f"w{n + 1}") for n in range(8)]}
    result = train(
        program, columns, eval_data=columns, tokenizer=chatting(), chat=True, packing=True,
        max_length=24, max_steps=2, batch_size=1, samples=2, progress=False,
    )  # fmt: skip
    assert result.metrics["steps"] == 2
    assert 1 < result.metrics["eval_perplexity"] < 2 * len(WORDS)
    first, second = result.samples
    assert (first["prompt"], first["wanted"], second["prompt"]) == ("w0", "w1", "w4")  # three chats are in a row
    ids = torch.tensor([[CLS, word(0), SEP, MASK]])
    for _ in range(32 - 4):  # GPT-2 has 32 positions here, and the tokenizer no end-of-text token
        with torch.no_grad():
            logits = program.module().eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    assert first["written"] == chatting().decode(ids[0, 4:], skip_special_tokens=True)


def test_samples_need_evaluation_data_and_a_model_that_writes() -> None:
    for model, data in ((captured(gpt2), None), (captured(bert), {"text": ["w1"], "label": [0]})):
        program = rewrite(model, [Lora(rank=2, targets="all-linear")])
        with pytest.raises(UsageError, match="samples need a causal model and evaluation data"):
            train(program, {"text": ["w1"], "label": [0]}, eval_data=data, tokenizer=words(), samples=1)


def test_flags_say_so(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["train", "--help"])
    assert "--chat" in result.output
    assert "--packing" in result.output
