"""Compare the files of a checkpoint with the program they were folded from, without ever having all of it in memory.

Three checks together show what one comparison shows for a small model: each weight is what its operators compute
(:mod:`.tensors`), each block of the folded program with the weights of the files is the block it was folded from
(:mod:`.blocks`), and transformers reads the files as that program. How much is checked has a name: :data:`Check`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..deferred.running import LargeInParts
from ..deferred.tensor import forget
from ..errors import UsageError
from ..graph.tree import has_tensor, named_tensors, put_tensor
from ..models.checkpoint import open_model
from ..models.tokenizers import is_mask
from ..parity.answers import example_batches
from ..parity.comparison import Comparison
from ..parity.runner import Runner
from ..public import Program
from .blocks import prove_blocks
from .exports import held_against
from .open import open_runner
from .tensors import TensorProof, prove_tensors
from .verify import verify

#: How a checkpoint is compared: each tensor by itself; tensors, and blocks on the values that reach them; or the
#: whole function, from inputs to outputs.
Check = Literal["tensors", "blocks", "full"]
CHECKS = get_args(Check)


def refuse_check(check: object, kind: str, dtype: torch.dtype | None) -> None:
    """UsageError for an unknown check, or one that exports of this kind do not have."""
    if isinstance(check, bool) or check == "full":
        return
    if check not in CHECKS:
        raise UsageError(f"cannot check {check!r}; what can be checked: {', '.join(CHECKS)}, or True and False")
    if kind != "hf":
        raise UsageError(f"{check} are compared in a checkpoint (hf), not in {kind}; give --check full")
    if dtype is not None:
        raise UsageError(
            f"another dtype rounds every weight, so {check} differ; leave --dtype out, or give --check full"
        )


def hold_checkpoint(
    reference: Program,
    folded: Program,
    folder: Path,
    check: Check,
    dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> tuple[Comparison, TensorProof | None]:
    """Compare the checkpoint in ``folder`` with ``reference``, which ``folded`` was folded from.

    Returned with the comparison is what was found for each tensor, where tensors were checked. Where tensors alone
    prove too little, blocks are compared too. Where blocks cannot be compared (their hidden states lost channels) or
    differ, the whole is, on the example inputs; also in another ``dtype``, whose weights were rounded on purpose.

    Raises:
        ParityError: as :func:`prove_tensors`; any other difference is the caller's to judge
    """
    model = _opened(folder, trust_remote_code)
    for part in model.modules():
        part.register_forward_hook(_forget_own)
    opened = _in_parts(open_runner(model, label=str(folder)))
    if check == "full":
        return held_against(reference, opened, by_block=True), None
    if dtype is not None:
        return held_against(reference, opened, by_block=True, inputs=[_example(reference)]), None
    written = _weights(model, folded)
    proof = prove_tensors(reference, folded, written)
    if check == "tensors" and not proof.left:
        return dataclasses.replace(proof.comparison(reference, str(folder)), notes=(str(proof),)), proof
    result = _by_blocks(reference, _with_weights(folded, written), opened)
    return dataclasses.replace(result, notes=(*result.notes, str(proof))), proof


def proof_of_files(
    reference: Program, folded: Program, folder: Path, *, trust_remote_code: bool = False
) -> TensorProof | None:
    """The proof of each weight of a checkpoint, read from its files; None for one that nothing was folded into."""
    if folded.origin is None:
        return None
    return prove_tensors(reference, folded, _weights(_opened(folder, trust_remote_code), folded))


def _opened(folder: Path, trusted: bool) -> nn.Module:
    """The checkpoint as transformers opens it, its weights mapped from the files."""
    return open_model(folder, None, {"trust_remote_code": True} if trusted else {})[0]


def _in_parts(runner: Runner) -> Runner:
    """The same runner, reading large matrices as programs that run by block do."""

    def call(inputs: dict[str, Tensor]) -> Any:
        with LargeInParts():
            return runner.call(inputs)

    return dataclasses.replace(runner, call=call)


def _weights(model: nn.Module, program: Program) -> dict[str, Tensor]:
    """The weights of a model that ``program`` has, by name."""
    named = ((name, tensor) for name, tensor in named_tensors(model) if isinstance(tensor, nn.Parameter))
    return {name: tensor.detach() for name, tensor in named if has_tensor(program.root, name)}


def _by_blocks(reference: Program, program: Program, opened: Runner) -> Comparison:
    """The blocks of ``program``, which has the weights of the files, and the files as transformers reads them."""
    blocks = prove_blocks(reference, program, reference.example, opened.label)
    inputs = _example(reference)
    if not blocks.ok:
        result = held_against(reference, opened, by_block=True, inputs=[inputs])
        return dataclasses.replace(result, notes=(*result.notes, f"as a whole only: {blocks}"))
    # Both sides have the same weights: padding shows nothing more here, and outputs there are arbitrary.
    unpadded = {name: torch.ones_like(value) if is_mask(name) else value for name, value in inputs.items()}
    whole = verify(open_runner(program, by_block=True), opened, inputs=[unpadded])
    found = dataclasses.replace(blocks.comparison, notes=(*whole.notes, str(blocks)), checked="blocks")
    return found if whole.ok else whole


def _example(program: Program) -> dict[str, Tensor]:
    return example_batches(program)[0].values


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
    """Release the memory of a module's own weights, which are mapped from their file."""
    for tensor in part.parameters(recurse=False):
        forget(tensor)
