"""From a table to rows of model inputs: cut to what the model holds, read as its task reads it, batched."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ArtifactError, UsageError
from ..files.table import Table, is_frame, table_of
from ..models.tokenizers import TOKEN_TYPES, find_tokenizer, length_limit
from .collating import dataset_collator
from .images import Images, find_processor, is_of_images, prepare_images
from .reading import Reading
from .rows import Prepared, Rows
from .tasks import task_of
from .tokens import Cuts, Texts

if TYPE_CHECKING:
    from ..graph.program import Program
    from ..recipes.options import TrainOptions

_log = logging.getLogger(__name__)


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
        tokenizer: the checkpoint's, or its image processor; it may be None for a dataset of model inputs
        collator: makes a batch of a list of rows; chosen by the model when None
        like: the prepared training table, when this is the evaluation table: its class numbers hold

    Raises:
        ArtifactError: the table cannot be used; names the file, the line and what to do
        UsageError: the model does not learn from a table, or the tokenizer does not fit it
    """
    if is_frame(data):
        data = table_of(data)
    if has_inputs(data, program):
        padded = None if tokenizer is None else dataset_collator(program, pad_like(tokenizer, program.config))
        return Prepared(data, collator or padded)
    if is_of_images(program):
        return prepare_images(data, program, tokenizer, options, collator, like)
    kind, task = task_of(program)
    if tokenizer is None:
        raise UsageError(f"{program.name} was captured without a tokenizer beside it; pass tokenizer=")
    table = table_of(data)
    if not len(table):
        raise ArtifactError(f"{table.name}: no rows")
    tokenizer = pad_like(tokenizer, program.config)
    limit = min(options.max_length, tokenizer.model_max_length, positions(program))
    end = tokenizer.eos_token_id if options.end_of_text and kind in ("next-token", "sequence") else None
    texts = Texts(table, tokenizer, Cuts(limit), end)
    reading = Reading(program, texts, options, task.columns, like)
    paired = reading.pair is not None and not task.apart
    brackets = tokenizer.num_special_tokens_to_add(pair=paired)
    if limit <= brackets:
        raise UsageError(f"max_length = {limit} leaves no room for text beside {brackets} special tokens")
    learned = task.learn(reading)
    _check_inputs(program, learned.inputs, paired=paired)
    features = {name: learned.inputs[name] for name in program.signature.inputs if name in learned.inputs}
    _say_cut(texts.cuts, table, options)
    collator = collator or task.collate(tokenizer, program.source.model)
    rows = Rows({**features, **learned.labels})
    return Prepared(rows, collator, learned.names, len(texts.cuts.cut), learned.metric)


def _say_cut(cuts: Cuts, table: Table, options: TrainOptions) -> None:
    if not cuts.cut or int(os.environ.get("RANK", "0")):
        return
    held = cuts.limit < options.max_length
    more = f"the {cuts.limit} tokens the model holds" if held else f"max_length = {cuts.limit} tokens"
    hint = "" if held else "; raise max_length (--max-length) to keep more"
    rows = f"{len(cuts.cut)} of {len(table)} rows were cut to"
    _log.warning("%s: %s %s, the longest has %d%s", table.name, rows, more, cuts.longest, hint)


def has_inputs(data: Any, program: Program) -> bool:
    """Whether ``data`` is a dataset of model inputs, not of texts."""
    if isinstance(data, (str, PathLike, Mapping, Table)) or not (
        hasattr(data, "__getitem__") or hasattr(data, "__iter__")
    ):
        return False
    columns = getattr(data, "column_names", None) or next(iter(data), {})
    return any(name in columns for name in program.signature.inputs)


def _check_inputs(program: Program, inputs: Mapping[str, Any], *, paired: bool) -> None:
    made = {*inputs, "attention_mask", TOKEN_TYPES, "decoder_input_ids", "decoder_attention_mask"}
    lacking = [name for name in program.signature.inputs if name not in made]
    if lacking:
        raise UsageError(f"{program.name} was captured with {lacking[0]!r}, which a table of texts cannot give")
    if paired and TOKEN_TYPES in inputs and TOKEN_TYPES not in program.signature.inputs:
        raise UsageError(
            f"{program.name} was captured without token_type_ids, which tell two texts apart; capture its folder, "
            "tokenizer included, or give capture() inputs that have them"
        )
    size = program.config.get_text_config().vocab_size
    largest = _largest(inputs["input_ids"])
    if largest >= size:
        raise UsageError(
            f"the tokenizer gives the token id {largest}, but {program.name} has {size} tokens; "
            "use the tokenizer of its checkpoint"
        )


def _largest(ids: Any) -> int:
    """The largest of token ids in lists of any depth."""
    return max(map(_largest, ids), default=0) if isinstance(ids, (list, tuple)) else int(ids)


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


def tokenizer_of(program: Program) -> Any:
    """The tokenizer of the checkpoint of ``program``, or its image processor; None where there is none."""
    folder = Path(program.source.path) if program.source.path is not None else None
    trusted = bool(program.source.options.get("trust_remote_code"))
    if is_of_images(program):
        return find_processor(folder, trust_remote_code=trusted)
    return find_tokenizer(folder, trust_remote_code=trusted)


def splits(data: Any, eval_data: Any) -> tuple[Any, Any]:
    """What is learned and what is evaluated: of a ``DatasetDict`` its parts.

    UsageError when it has none to train on, or when the evaluation data has several parts.
    """
    if _is_split(eval_data):
        raise UsageError(f"eval_data has the parts {', '.join(map(repr, eval_data))}; give one of them")
    if not _is_split(data):
        return data, eval_data
    if "train" not in data:
        raise UsageError(f"data has the parts {', '.join(map(repr, data))}, and none called 'train'; give one of them")
    held_out = next((data[name] for name in ("validation", "test") if name in data), None)
    return data["train"], held_out if eval_data is None else eval_data


def _is_split(data: Any) -> bool:
    """Whether it is a mapping of datasets, not of columns."""
    return isinstance(data, Mapping) and bool(data) and all(hasattr(part, "column_names") for part in data.values())


def warn_of_one_class(program: Program, rows: Prepared) -> None:
    """Say so when a classifier is to learn from a table whose rows are all of one class: the head of a sorted one."""
    if isinstance(rows.rows, Images):
        found = set(rows.rows.labels)
    elif isinstance(rows.rows, Rows) and task_of(program)[0] == "class":
        found = set(rows.rows.features["labels"])
    else:
        return
    if len(found) == 1 and len(rows.rows) > 1:
        name = (program.config.id2label or {}).get(next(iter(found)))
        _log.warning(
            "the training data: all %d rows are of one class (%s), so there is nothing to tell apart; check the column "
            "of the label, or add rows of others",
            len(rows.rows),
            name,
        )


def warn_of_random(program: Program) -> None:
    """Say so when a tensor that no checkpoint held, of a new head above all, is read and not among what trains."""
    idle = {*program.trainable(), *program.names("unread")}
    still = [name for name in program.untrained() if name not in idle]
    if still:
        _log.warning(
            "%s was drawn at random and does not train, since no pass of this program asks for it: name its module in "
            "trainable (a new head: auto), or give it to edit.train() in the finish() of a method of your own",
            still[0],
        )
