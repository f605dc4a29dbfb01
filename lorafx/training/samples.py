"""What a causal model writes after its training: for rows that it was evaluated on, beside the wanted text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..models.tasks import IGNORED
from .data import positions
from .module import build_module
from .rows import Prepared

if TYPE_CHECKING:
    from ..graph.program import Program

#: At most: tokens given as the beginning of a text that is learned as a whole, and tokens written.
_BEGINNING, _NEW = 8, 32


def samples_of(program: Program, held_out: Prepared, tokenizer: Any, count: int) -> list[dict[str, str]]:
    """The most likely continuations of the first ``count`` rows: ``prompt``, what they ``wanted`` and what was
    ``written``.

    The prompt is the part of a row before what is learned; of a text that is learned as a whole, its beginning.
    """
    module, end = build_module(program).eval(), tokenizer.eos_token_id
    found = []
    for index in range(min(count, len(held_out.rows))):
        row = held_out.rows[index]
        ids = torch.as_tensor(row["input_ids"], device=program.device)[None]
        labels = torch.as_tensor(row["labels"]).tolist()
        start = next(at for at, label in enumerate(labels) if label != IGNORED)
        start = start or min(_BEGINNING, max(len(labels) // 2, 1))
        stop = next((at for at in range(start, len(labels)) if labels[at] == IGNORED), len(labels))
        room = min(_NEW, positions(program) - start)
        parts = {"prompt": ids[0, :start], "wanted": ids[0, start:stop]}
        parts["written"] = _written(module, ids[:, :start], room, end)[0, start:]
        found.append({name: tokenizer.decode(part, skip_special_tokens=True) for name, part in parts.items()})
    return found


def _written(module: Any, ids: Tensor, most: int, end: int | None) -> Tensor:
    for _ in range(most):
        with torch.no_grad():
            logits = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        token = logits[:, -1:].argmax(-1)
        ids = torch.cat((ids, token), 1)
        if int(token) == end:
            break
    return ids
