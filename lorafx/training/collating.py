"""How rows of model inputs become batches: padded by the tokenizer, labels of tokens by -100."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import transformers

from ..errors import UsageError
from ..models.tasks import loss_type

if TYPE_CHECKING:
    from ..graph.program import Program


#: transformers' names of the losses with a label for every token.
_BY_TOKEN = ("ForTokenClassification", "ForCausalLM", "ForMaskedLM")


def dataset_collator(program: Program, tokenizer: Any) -> Any:
    """The collator that pads the inputs of ``program``, and labels where each token has one."""
    if getattr(program.config, "is_encoder_decoder", False):
        return Collator(transformers.DataCollatorForSeq2Seq(tokenizer, program.source.model))
    if loss_type(program.source.model) in _BY_TOKEN:
        return Collator(transformers.DataCollatorForTokenClassification(tokenizer), by_token=True)
    return Collator(transformers.DataCollatorWithPadding(tokenizer))


@dataclass(frozen=True)
class Collator:
    """A collator whose refusals say what is wrong with the rows.

    Attributes:
        collator: makes a batch of a list of rows
        by_token: labels are by token, so that a row has as many labels as tokens
    """

    collator: Any
    by_token: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """A batch of ``rows``; UsageError when they do not fit together."""
        for row in rows if self.by_token else ():
            labels, ids = row.get("labels"), row.get("input_ids")
            if labels is not None and ids is not None and len(labels) != len(ids):
                found = f"a row has {len(labels)} labels for {len(ids)} tokens"
                raise UsageError(f"{found}; give one a token, -100 where there is nothing to learn")
        try:
            return self.collator(list(rows))
        except (TypeError, ValueError, RuntimeError) as error:
            padded = getattr(getattr(self.collator, "tokenizer", None), "model_input_names", ())
            lengths = {name: {_length(row.get(name)) for row in rows} for name in rows[0] if name not in padded}
            ragged = next((name for name, found in lengths.items() if len(found) > 1), None)
            if ragged is None:
                raise
            hint = "" if padded else ", or a tokenizer to pad with"
            raise UsageError(
                f"rows differ in the length of {ragged!r}; pass a collator that pads them{hint}"
            ) from error


def _length(value: Any) -> int | None:
    return len(value) if hasattr(value, "__len__") and getattr(value, "shape", True) != () else None
