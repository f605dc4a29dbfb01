"""What holds a checkpoint that was written a tile at a time, and is never in memory as a whole, to its program.

Three things together say what one comparison says of a small model: each weight is what its operators compute
(:mod:`.tensors`), each block of the folded program with the weights of the files is the block it was folded from
(:mod:`.blocks`), and transformers reads the files as that program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..deferred.tensor import forget
from ..graph.tree import named_tensors, put_tensor
from ..models.checkpoint import open_model
from ..models.tokenizers import is_mask
from ..parity.answers import example_batches
from ..parity.comparison import Comparison
from ..public import Program
from .blocks import prove_blocks
from .exports import held_against
from .open import open_runner
from .tensors import prove_tensors
from .verify import verify


def hold_streamed(
    reference: Program, folded: Program, folder: Path, dtype: torch.dtype | None, *, trust_remote_code: bool = False
) -> Comparison:
    """Compare the checkpoint in ``folder`` with ``reference``, which ``folded`` was folded from.

    Where blocks cannot be compared (their hidden states lost channels) or differ, the whole is, on the example inputs;
    so it is in another ``dtype``, whose weights were rounded on purpose.

    Raises:
        ParityError: as :func:`prove_tensors`; any other difference is the caller's to judge
    """
    model, _ = open_model(folder, None, {"trust_remote_code": True} if trust_remote_code else {})
    for part in model.modules():
        part.register_forward_hook(_forget_own)
    opened = open_runner(model, label=str(folder))
    inputs = example_batches(reference)[0].values
    if dtype is not None:
        return held_against(reference, opened, by_block=True, inputs=[inputs])
    written = {name: tensor.detach() for name, tensor in named_tensors(model) if isinstance(tensor, nn.Parameter)}
    program = _with_weights(folded, written)
    blocks = prove_blocks(reference, program, reference.example, str(folder))
    if blocks.ok:
        # Of one set of weights: padding shows nothing more here, and its outputs are anyone's.
        unpadded = {name: torch.ones_like(value) if is_mask(name) else value for name, value in inputs.items()}
        whole = verify(open_runner(program, by_block=True), opened, inputs=[unpadded])
        found = dataclasses.replace(blocks.comparison, notes=(*whole.notes, str(blocks)))
        result = found if whole.ok else whole
    else:
        result = held_against(reference, opened, by_block=True, inputs=[inputs])
        result = dataclasses.replace(result, notes=(*result.notes, f"as a whole only: {blocks}"))
    if not result.ok:
        return result
    proof = prove_tensors(reference, folded, written)
    return dataclasses.replace(result, notes=(*result.notes, str(proof)))


def _with_weights(program: Program, written: Mapping[str, Tensor]) -> Program:
    """The program with the weights of the files."""
    result = program.copy()
    made: dict[int, nn.Parameter] = {}
    for name in [name for name, _ in named_tensors(result.root) if name in written]:
        tensor = written[name]
        if id(tensor) not in made:
            made[id(tensor)] = nn.Parameter(tensor, requires_grad=False)
        put_tensor(result.root, name, made[id(tensor)])
    return result


def _forget_own(part: nn.Module, *_: Any) -> None:
    """Give back the memory of a module's own weights; they are mapped from their file."""
    for tensor in part.parameters(recurse=False):
        forget(tensor)
