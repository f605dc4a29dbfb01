"""Chats through the tokenizer's template: what the assistant says is learned, and nothing of what is said to it.

At inference a model gets the template's text up to the assistant's turn. So what is learned begins where that text
ends, and ends where the template's text with the turn included ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UsageError, first_line
from ..files.table import Table, short
from ..models.tasks import IGNORED
from .tokens import Cuts, Ids

#: The column of chats, where a table has one.
MESSAGES = "messages"
_SPEAKER = "assistant"


def chats_of(table: Table, text: str, label: str) -> list[list[dict[str, Any]]]:
    """The chats of a table: its column ``messages``, or a user's ``text`` and an assistant's ``label`` in each row.

    ArtifactError names the row that holds no chat with something to learn.
    """
    if MESSAGES not in table.columns:
        asked, answered = table.texts(text), table.texts(label)
        return [
            [{"role": "user", "content": prompt}, {"role": _SPEAKER, "content": answer}]
            for prompt, answer in zip(asked, answered, strict=True)
        ]
    chats = table.column(MESSAGES)
    for row, chat in enumerate(chats):
        if not isinstance(chat, list) or not all(isinstance(said, Mapping) and "role" in said for said in chat):
            raise table.error(row, f"{MESSAGES!r} is {short(chat)}, not a list of objects with role and content")
        if all(said["role"] != _SPEAKER for said in chat):
            raise table.error(
                row, f"{MESSAGES!r} holds nothing that an {_SPEAKER} says: nothing to learn; remove the row"
            )
    return [[dict(said) for said in chat] for chat in chats]


def encode_chats(
    table: Table, chats: list[list[dict[str, Any]]], tokenizer: Any, cuts: Cuts
) -> tuple[dict[str, Ids], Ids]:
    """The inputs and labels of chats, cut to the limit: the loss is of what the assistant says, its last word included.

    Raises:
        ArtifactError: a row that the template refuses or rewrites, or that leaves no answer to learn
        UsageError: the tokenizer has no chat template, or does not say which text its tokens are of
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("its tokenizer has no chat template; set tokenizer.chat_template, or leave chat out")
    if not tokenizer.is_fast:
        raise UsageError("this tokenizer does not say where its tokens stand in a text; open it as a fast one")
    inputs: dict[str, Ids] = {"input_ids": [], "attention_mask": []}
    labels: Ids = []
    for row, chat in enumerate(chats):
        text, spans = _spoken(table, row, chat, tokenizer)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        learned = [any(start <= at[0] and at[1] <= end for start, end in spans) for at in places]
        if len(ids) > cuts.limit:
            cuts.note(row, len(ids))
        kept = [token if said else IGNORED for token, said in zip(ids, learned, strict=True)][: cuts.limit]
        if all(label == IGNORED for label in kept[1:]):  # of the first token there is no prediction
            found = f"nothing that the {_SPEAKER} says is within {cuts.limit} tokens"
            raise table.error(row, f"{found}; raise max_length or remove the row")
        inputs["input_ids"].append(ids[: cuts.limit])
        inputs["attention_mask"].append([1] * len(kept))
        labels.append(kept)
    return inputs, labels


def _spoken(table: Table, row: int, chat: list[dict[str, Any]], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text of a chat, and from where to where the assistant speaks."""

    def text_of(said: list[dict[str, Any]], **options: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(said, tokenize=False, **options))
        except Exception as error:  # a template may raise anything
            raise table.error(row, f"its chat template refuses the chat: {first_line(error)}") from None

    whole, spans = text_of(chat), []
    for at, said in enumerate(chat):
        content = said.get("content")
        # A template for texts writes parts as Python spells them, and a model would learn the brackets.
        if content and not isinstance(content, str) and str(content) in whole:
            what = f"its chat template takes the content of message {at + 1} for text, and it is {short(content)}"
            raise table.error(row, f"{what}; give it as one text")
    for at in (at for at, said in enumerate(chat) if said["role"] == _SPEAKER):
        told, answered = text_of(chat[:at], add_generation_prompt=True), text_of(chat[: at + 1])
        if not answered.startswith(told) or not whole.startswith(answered.rstrip()):
            what = f"its chat template writes message {at + 1} otherwise when others follow"
            raise table.error(row, f"{what}: it cannot be told what is learned; give each answer a row of its own")
        # What stands after the last word, a line's end say, separates it from the next and belongs to neither.
        spans.append((len(told), len(answered.rstrip())))
    return whole, spans


def packed(inputs: Mapping[str, Ids], labels: Ids, limit: int) -> tuple[dict[str, Ids], Ids]:
    """Rows of several texts, one after the other, of up to ``limit`` tokens; no text is cut, and their order stays.

    A text attends to those before it in its row, but its first token is not predicted from them.
    """
    rows: dict[str, Ids] = {"input_ids": [], "attention_mask": []}
    learned: Ids = []
    for ids, own in zip(inputs["input_ids"], labels, strict=True):
        if not learned or len(learned[-1]) + len(ids) > limit:
            rows["input_ids"].append([])
            learned.append([])
        rows["input_ids"][-1] += ids
        learned[-1] += [IGNORED, *own[1:]] if learned[-1] else own
    rows["attention_mask"] = [[1] * len(ids) for ids in rows["input_ids"]]
    return rows, learned
