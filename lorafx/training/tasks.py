"""What models learn from a table, one entry for each task: the columns it reads, how they become inputs and labels, and
what pads them. The loss that transformers has for a model's class decides which task it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor

from ..errors import UsageError
from ..models.sentences import LOSS
from ..models.tasks import loss_type, problem_type
from .answers import learn_answers
from .chats import chats_of, encode_chats, packed
from .labels import numbers
from .pairs import PairCollator, learn_pairs
from .reading import Columns, Learned, Reading
from .tagging import learn_tags
from .tokens import IGNORED

if TYPE_CHECKING:
    from ..graph.program import Program

_CLASSIFIES = "ForSequenceClassification"


@dataclass(frozen=True)
class Task:
    """What a model may learn from a table.

    Attributes:
        loss: transformers' name of the loss that trains it
        columns: what it reads
        learn: makes inputs and labels of a table
        collate: what makes a batch of rows, given the tokenizer and the eager model
        problem: the ``problem_type`` of a classifier's config
        apart: whether two texts are separate inputs, not joined into one
    """

    loss: str
    columns: Columns
    learn: Callable[[Reading], Learned]
    collate: Callable[[Any, Any], Any]
    problem: str | None = None
    apart: bool = False


def task_of(program: Program) -> tuple[str, Task]:
    """What ``program`` can learn from a table, and its name in :data:`TASKS`.

    UsageError when it does not learn from one.
    """
    loss, config = loss_type(program.source.model), program.config
    problem = problem_type(config) if loss == _CLASSIFIES else None
    found = next(((kind, task) for kind, task in TASKS.items() if (task.loss, task.problem) == (loss, problem)), None)
    encodes = getattr(config, "is_encoder_decoder", False)
    if found is None or "input_ids" not in program.signature.inputs or (found[0] == "sequence") != encodes:
        raise UsageError(
            f"{program.name} does not learn from a table of texts and labels; "
            "pass a dataset whose rows are its inputs and labels (lorafx.train(program, dataset, collator=...))"
        )
    if found[0] == "number" and config.num_labels != 1:
        raise UsageError(
            f"{program.name} learns {config.num_labels} numbers a row, which no column holds; set num_labels = 1, or "
            "pass a dataset of its inputs and labels"
        )
    return found


# ---- texts and a label


def _encoded(reading: Reading) -> Mapping[str, Any]:
    """The inputs of one text, or two, for each row."""
    reading.refuse("chat", "packing")
    return dataclasses.replace(reading.texts, end=None).encode(reading.text, reading.pair)


def _learn_class(reading: Reading) -> Learned:
    inputs = _encoded(reading)
    labels, names = reading.classes().of_rows()
    return Learned(inputs, {"labels": labels}, names)


def _learn_classes(reading: Reading) -> Learned:
    inputs = _encoded(reading)
    labels, names = reading.classes().of_sets()
    return Learned(inputs, {"labels": labels}, names)


def _learn_number(reading: Reading) -> Learned:
    return Learned(_encoded(reading), {"labels": numbers(reading.table, reading.label)})


def _learn_sequence(reading: Reading) -> Learned:
    return Learned(_encoded(reading), {"labels": reading.texts.targets(reading.label)})


def _learn_masked(reading: Reading) -> Learned:
    inputs = _encoded(reading)
    if reading.options.label:
        raise UsageError(f"{reading.program.name} learns from {reading.text!r} alone: leave label out")
    special = {*reading.texts.tokenizer.all_special_ids}
    for row, ids in enumerate(inputs["input_ids"]):
        if special.issuperset(ids):
            raise reading.table.error(row, f"{reading.text!r} has no token to hide and learn; mend or remove the row")
    return Learned(inputs, {})


# ---- what follows


def _learn_next(reading: Reading) -> Learned:
    inputs, labels = _continuations(reading)
    if reading.options.packing:
        inputs, labels = packed(inputs, labels, reading.texts.cuts.limit)
    return Learned(inputs, {"labels": labels})


def _continuations(reading: Reading) -> tuple[Mapping[str, Any], list[Any]]:
    """What a causal model learns: all of a text, what follows a prompt, or what an assistant says."""
    table, texts, options, text = reading.table, reading.texts, reading.options, reading.text
    if options.chat:
        chats = chats_of(table, text, reading.label)
        return encode_chats(table, chats, texts.tokenizer, texts.cuts)
    if options.label:
        if options.text_pair is not None:
            raise UsageError("a causal model learns what follows one text: leave text_pair out, or label")
        return texts.continued(text, options.label)
    if options.label is None and any(isinstance(value, str) for value in table.columns.get("label", ())):
        raise UsageError(
            f"{table.name}: the column 'label' holds texts: say label='label' to learn them as what follows "
            f"{text!r}, or label='' to learn {text!r} alone"
        )
    inputs = texts.encode(text, options.text_pair)
    for row, ids in enumerate(inputs["input_ids"]):
        if len(ids) < 2:
            raise table.error(row, f"{text!r} has fewer than two tokens: no next one to learn; remove the row")
    return inputs, [list(ids) for ids in inputs["input_ids"]]


# ---- padding


def _padded(tokenizer: Any, model: Any) -> Any:
    return transformers.DataCollatorWithPadding(tokenizer)


class _Hiding(transformers.DataCollatorForLanguageModeling):
    """Hides some tokens of a batch, and hides anew where chance chose none: the mean loss of none is not a number."""

    def torch_mask_tokens(self, inputs: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The batch with tokens hidden, and what they were: -100 elsewhere."""
        hidden, labels = super().torch_mask_tokens(inputs.clone(), *args, **kwargs)
        for _ in range(1000):  # of one token it takes six tries
            if bool((labels != IGNORED).any()):
                break
            hidden, labels = super().torch_mask_tokens(inputs.clone(), *args, **kwargs)
        return hidden, labels


def _masked(tokenizer: Any, model: Any) -> Any:
    return _Hiding(tokenizer, mlm=True)


def _by_token(tokenizer: Any, model: Any) -> Any:
    return transformers.DataCollatorForTokenClassification(tokenizer)


def _pairs(tokenizer: Any, model: Any) -> Any:
    return PairCollator(_padded(tokenizer, model))


def _next(tokenizer: Any, model: Any) -> Any:
    # Pads labels with -100 by position. The collator for language modelling would do it by token, and with the
    # end-of-text token as padding a model would never learn to end.
    return transformers.DataCollatorForSeq2Seq(tokenizer)


def _sequence(tokenizer: Any, model: Any) -> Any:
    return transformers.DataCollatorForSeq2Seq(tokenizer, model)


#: By the names this package has for them.
TASKS: dict[str, Task] = {
    "class": Task(_CLASSIFIES, Columns(), _learn_class, _padded, "single_label_classification"),
    "classes": Task(_CLASSIFIES, Columns(), _learn_classes, _padded, "multi_label_classification"),
    "number": Task(_CLASSIFIES, Columns(), _learn_number, _padded, "regression"),
    "tags": Task("ForTokenClassification", Columns("tokens", label="tags"), learn_tags, _by_token),
    "answer": Task("ForQuestionAnswering", Columns("question", "context", "answers"), learn_answers, _padded),
    "pair": Task(LOSS, Columns("text", "text_pair", None), learn_pairs, _pairs, apart=True),
    "next-token": Task("ForCausalLM", Columns(label=None), _learn_next, _next),
    "masked-token": Task("ForMaskedLM", Columns(label=None), _learn_masked, _masked),
    "sequence": Task("ForConditionalGeneration", Columns(), _learn_sequence, _sequence),
}
