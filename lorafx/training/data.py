"""From a table of texts to rows of model inputs: number the classes, tokenise, and choose how rows become batches."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import Dataset

from ..errors import ArtifactError, UsageError, did_you_mean
from ..files.table import Table, short, table_of
from ..models.tasks import loss_type
from ..models.tokenizers import TOKEN_TYPES, length_limit
from .chats import chats_of, encode_chats, packed
from .collating import dataset_collator, text_collator
from .tokens import Cuts, Texts

if TYPE_CHECKING:
    from ..graph.program import Program
    from ..recipes.options import TrainOptions

_log = logging.getLogger(__name__)


# ---- labels


def class_ids(
    table: Table, column: str, config: Any, like: Prepared | None = None
) -> tuple[list[int], Mapping[str, int] | None]:
    """The class of every row as a number, and the numbers of the class names if the table has names.

    Integers are taken as they are. Class names get the numbers the config has for them; names it does not know are
    sorted, numbered from 0, and recorded as the config's ``id2label`` and ``label2id``.

    Args:
        like: the training rows, when ``table`` is for evaluation: their numbers hold

    Raises:
        ArtifactError: a row without a label, an integer the head has no class for, names and integers mixed, more
            names than the head has classes, or a name the training table does not have
    """
    values = table.column(column)
    numbers = [_integer(value) for value in values]
    integers = sum(number is not None for number in numbers)
    names = None if like is None else like.names
    if names is None and (integers or like is not None):
        for row, number in enumerate(numbers):
            _check_class(table, row, values[row], number, config)
        return [number for number in numbers if number is not None], None
    texts = _class_names(table, values)
    names = names or _numbered(table, column, texts, config)
    for row, text in enumerate(texts):
        if text not in names:
            raise table.error(row, f"label {text!r} is none of the classes{did_you_mean(text, names)}: {_some(names)}")
    return [names[text] for text in texts], names


def _check_class(table: Table, row: int, value: Any, number: int | None, config: Any) -> None:
    if number is None:
        raise table.error(row, f"label {short(value)} is not an integer, as other labels are")
    if not 0 <= number < config.num_labels:
        classes = f"the head has {config.num_labels} classes, 0 to {config.num_labels - 1}"
        raise table.error(row, f"label {number}, but {classes}; number the classes from 0, or set num_labels")


def _class_names(table: Table, values: list[Any]) -> list[str]:
    for row, value in enumerate(values):
        if not isinstance(value, str) or not value:
            wrong = "neither an integer nor a class name" if _integer(value) is None else "no class name, as others are"
            raise table.error(row, f"label {short(value)} is {wrong}")
    return values


#: What a table may write for numbers: not all that Python reads as one, which also takes 1_0 for 10.
_INTEGER = re.compile(r"\s*[+-]?[0-9]+\s*")
_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")


def _integer(value: Any) -> int | None:
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, int) or (isinstance(value, str) and _INTEGER.fullmatch(value)):
        return int(value)
    return None


def _numbered(table: Table, column: str, texts: list[str], config: Any) -> dict[str, int]:
    found = sorted(set(texts))
    known = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    if all(name in known for name in found):
        return known
    if len(found) > config.num_labels:
        raise ArtifactError(
            f"{table.name}: {len(found)} classes in {column!r} ({_some(found)}), but the head has {config.num_labels};"
            f" rewrite the checkpoint with num_labels = {len(found)}"
        )
    spare = [f"LABEL_{number}" for number in range(len(found), config.num_labels)]
    config.id2label = dict(enumerate([*found, *spare]))
    config.label2id = {name: number for number, name in config.id2label.items()}
    return {name: number for number, name in enumerate(found)}


def _some(names: Iterable[str], most: int = 6) -> str:
    shown = list(names)
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")


def _numbers(table: Table, column: str) -> list[float]:
    values = table.column(column)
    for row, value in enumerate(values):
        written = _NUMBER.fullmatch(value) if isinstance(value, str) else isinstance(value, (int, float))
        if not written or not math.isfinite(float(value)):
            raise table.error(row, f"label {short(value)} is not a number")
    return [float(value) for value in values]


# ---- tokenising


class Rows(Dataset[dict[str, Any]]):
    """Tokenised rows: ``rows[i]`` is a dict of one row's model inputs."""

    def __init__(self, features: Mapping[str, Sequence[Any]]):
        self.features = dict(features)

    def __len__(self) -> int:
        return len(next(iter(self.features.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.features.items()}


@dataclass(frozen=True)
class Prepared:
    """What a Trainer is given: the rows and how to batch them.

    Attributes:
        rows: a dataset of model inputs
        collator: makes a batch of a list of rows; None for the Trainer's own choice
        names: numbers of the classes, when the table named them
        cut: how many rows were longer than what is kept of one
    """

    rows: Any
    collator: Any = None
    names: Mapping[str, int] | None = None
    cut: int = 0


#: transformers' names of the losses a table can train, and what each model learns from one.
_KINDS = {
    "ForSequenceClassification": "class",
    "ForCausalLM": "next-token",
    "ForMaskedLM": "masked-token",
    "ForConditionalGeneration": "sequence",
}


def kind_of(program: Program) -> str:
    """What ``program`` can learn from a table: ``class``, ``number``, ``next-token``, ``masked-token`` or ``sequence``.

    UsageError when it does not learn from texts.
    """
    kind = _KINDS.get(loss_type(program.source.model) or "")
    encodes = getattr(program.config, "is_encoder_decoder", False)
    if kind is None or "input_ids" not in program.signature.inputs or (kind == "sequence") != encodes:
        raise UsageError(
            f"{program.name} does not learn from a table of texts and labels; "
            "pass a dataset whose rows are its inputs and labels (lorafx.train(program, dataset, collator=...))"
        )
    return "number" if kind == "class" and program.config.num_labels == 1 else kind


def prepare(
    data: Any,
    program: Program,
    tokenizer: Any,
    options: TrainOptions,
    *,
    collator: Any = None,
    like: Prepared | None = None,
) -> Prepared:
    """Rows of model inputs for ``program`` from a table, or from a dataset that has them already.

    Args:
        data: what :func:`~lorafx.files.table.table_of` takes, or a dataset whose rows hold the model's inputs
        tokenizer: the checkpoint's; it may be None for a dataset of model inputs
        collator: makes a batch of a list of rows; chosen by the model when None
        like: the prepared training table, when this is the evaluation table: its class numbers hold

    Raises:
        ArtifactError: the table cannot be used; names the file, the line and what to do
        UsageError: the model does not learn from a table, or the tokenizer does not fit it
    """
    if _has_inputs(data, program):
        padded = None if tokenizer is None else dataset_collator(program, pad_like(tokenizer, program.config))
        return Prepared(data, collator or padded)
    kind = kind_of(program)
    if tokenizer is None:
        raise UsageError(f"{program.name} was captured without a tokenizer beside it; pass tokenizer=")
    table = table_of(data)
    if not len(table):
        raise ArtifactError(f"{table.name}: no rows")
    tokenizer = pad_like(tokenizer, program.config)
    limit = min(options.max_length, tokenizer.model_max_length, positions(program))
    brackets = tokenizer.num_special_tokens_to_add(pair=options.text_pair is not None)
    if limit <= brackets:
        raise UsageError(f"max_length = {limit} leaves no room for text beside {brackets} special tokens")
    end = tokenizer.eos_token_id if options.end_of_text and kind in ("next-token", "sequence") else None
    texts = Texts(table, tokenizer, Cuts(limit), end)
    inputs, labels, names = _rows(program, kind, texts, options, like)
    _check_inputs(program, inputs, options)
    features: dict[str, Any] = {name: inputs[name] for name in program.signature.inputs if name in inputs}
    if labels is not None:
        features["labels"] = labels
    _say_cut(texts.cuts, table, options)
    return Prepared(Rows(features), collator or text_collator(kind, tokenizer, program), names, len(texts.cuts.cut))


def _rows(
    program: Program, kind: str, texts: Texts, options: TrainOptions, like: Prepared | None
) -> tuple[Mapping[str, Any], list[Any] | None, Mapping[str, int] | None]:
    """The inputs of every row by name, its label, and the numbers of class names."""
    table, label = texts.table, options.label or "label"
    if kind == "next-token":
        inputs, labels = _continuations(texts, options)
        if options.packing:
            inputs, labels = packed(inputs, labels, texts.cuts.limit)
        return inputs, labels, None
    asked = next((name for name in ("chat", "packing") if getattr(options, name)), None)
    if asked is not None:
        raise UsageError(f"{program.name} learns no next tokens: leave {asked} out")
    inputs = dataclasses.replace(texts, end=None).encode(options.text, options.text_pair)
    if kind == "class":
        return inputs, *class_ids(table, label, program.config, like)
    if kind == "number":
        return inputs, _numbers(table, label), None
    if kind == "sequence":
        return inputs, texts.targets(label), None
    if options.label:
        raise UsageError(f"{program.name} learns from {options.text!r} alone: leave label out")
    return inputs, None, None


def _continuations(texts: Texts, options: TrainOptions) -> tuple[Mapping[str, Any], list[Any]]:
    """What a causal model learns: all of a text, what follows a prompt, or what an assistant says."""
    table = texts.table
    if options.chat:
        chats = chats_of(table, options.text, options.label or "label")
        return encode_chats(table, chats, texts.tokenizer, texts.cuts)
    if options.label:
        if options.text_pair is not None:
            raise UsageError("a causal model learns what follows one text: leave text_pair out, or label")
        return texts.continued(options.text, options.label)
    if options.label is None and any(isinstance(value, str) for value in table.columns.get("label", ())):
        raise UsageError(
            f"{table.name}: the column 'label' holds texts: say label='label' to learn them as what follows "
            f"{options.text!r}, or label='' to learn {options.text!r} alone"
        )
    inputs = texts.encode(options.text, options.text_pair)
    for row, ids in enumerate(inputs["input_ids"]):
        if len(ids) < 2:
            raise table.error(row, f"{options.text!r} has fewer than two tokens: no next one to learn; remove the row")
    return inputs, [list(ids) for ids in inputs["input_ids"]]


def _say_cut(cuts: Cuts, table: Table, options: TrainOptions) -> None:
    if not cuts.cut or int(os.environ.get("RANK", "0")):
        return
    held = cuts.limit < options.max_length
    more = f"the {cuts.limit} tokens the model holds" if held else f"max_length = {cuts.limit} tokens"
    hint = "" if held else "; raise max_length (--max-length) to keep more"
    rows = f"{len(cuts.cut)} of {len(table)} rows were cut to"
    _log.warning("%s: %s %s, the longest has %d%s", table.name, rows, more, cuts.longest, hint)


def _has_inputs(data: Any, program: Program) -> bool:
    """Whether ``data`` is a dataset of model inputs, not of texts."""
    if isinstance(data, (str, PathLike, Mapping)) or not (hasattr(data, "__getitem__") or hasattr(data, "__iter__")):
        return False
    columns = getattr(data, "column_names", None) or next(iter(data), {})
    return any(name in columns for name in program.signature.inputs)


def _check_inputs(program: Program, inputs: Mapping[str, Any], options: TrainOptions) -> None:
    made = {*inputs, "attention_mask", TOKEN_TYPES, "decoder_input_ids", "decoder_attention_mask"}
    lacking = [name for name in program.signature.inputs if name not in made]
    if lacking:
        raise UsageError(f"{program.name} was captured with {lacking[0]!r}, which a table of texts cannot give")
    if options.text_pair and TOKEN_TYPES in inputs and TOKEN_TYPES not in program.signature.inputs:
        raise UsageError(
            f"{program.name} was captured without token_type_ids, which tell two texts apart; capture its folder, "
            "tokenizer included, or give capture() inputs that have them"
        )
    size = program.config.get_text_config().vocab_size
    largest = max((max(ids, default=0) for ids in inputs["input_ids"]), default=0)
    if largest >= size:
        raise UsageError(
            f"the tokenizer gives the token id {largest}, but {program.name} has {size} tokens; "
            "use the tokenizer of its checkpoint"
        )


def positions(program: Program) -> int:
    """How many tokens the model has positions for."""
    held = program.signature.domain.bounds("input_ids", 1).high if "input_ids" in program.example else None
    limit = min(length_limit(program.config) or 2**31, held or 2**31)
    for name, module in program.source.model.named_modules():
        # RoBERTa and its kin count positions from the one after the padding token's.
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit


def pad_like(tokenizer: Any, config: Any) -> Any:
    """A copy of ``tokenizer`` that pads on the right with the token the model was captured to know as padding.

    The padding token's id is part of the graph (where a decoder's last token is, RoBERTa's positions), so the config
    wins over the tokenizer. A model without one gets the tokenizer's, or its end-of-text token.
    """
    result = copy.deepcopy(tokenizer)
    result.padding_side = "right"
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    if pad is not None and 0 <= pad < len(result) and pad != result.pad_token_id:
        result.pad_token = result.convert_ids_to_tokens(pad)
    if result.pad_token is None:
        result.pad_token = result.eos_token
    if result.pad_token is None:
        raise UsageError("the tokenizer has neither a padding nor an end-of-text token; set tokenizer.pad_token")
    return result
