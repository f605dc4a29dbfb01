"""Low-rank updates of stacks of matrices, as PEFT's ``target_parameters`` has them: the weight itself is changed.

Which rows an expert sees is decided when the model runs, so a stack cannot have a branch beside it: ``W[e] + s B[e]
A[e]`` is computed from tensors alone, wherever and however the stack is used, and folds as constants do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from ..graph.edit import Edit
from ..graph.operands import node_at
from ..graph.program import Program
from ..graph.site import INSERTED_BY, Site

aten = torch.ops.aten


class StackShape(NamedTuple):
    """The parts of an update of a stack: A (experts · rank, in) with the expert slowest, B (out, rank · experts)
    with the expert fastest, times ``scale``. ``transposed`` says that a matrix is stored (in, out)."""

    rank: int
    experts: int
    transposed: bool
    scale: float

    def factors(self, stored: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of A and B for matrices that are stored in this shape (the last two sizes count)."""
        out, features = reversed(stored[-2:]) if self.transposed else stored[-2:]
        return (self.experts * self.rank, features), (out, self.rank * self.experts)


def stack_shape(program: Program, site: Site, rank: int, scale: float) -> StackShape:
    """The update of a stack at ``site``; which side of a matrix is ``in`` is decided as in PEFT: by ``is_transposed``,
    an attribute of the module that owns the stack, and never by how it is used.
    """
    owner = program.source.model.get_submodule(site.parameter.rpartition(".")[0])
    return StackShape(rank, site.matrices, bool(getattr(owner, "is_transposed", False)), scale)


def delta(edit: Edit, a: fx.Node, b: fx.Node, shape: StackShape) -> fx.Node:
    """The node of the update (experts, …, …), each matrix as it is stored."""
    features, out = a.meta["val"].shape[1], b.meta["val"].shape[0]
    each_a = edit.call(aten.view.default, a, [shape.experts, shape.rank, features])
    each_b = edit.call(aten.view.default, b, [out, shape.rank, shape.experts])
    product = edit.call(aten.bmm.default, edit.call(aten.permute.default, each_b, [2, 0, 1]), each_a)
    if shape.transposed:
        product = edit.call(aten.transpose.int, product, 1, 2)
    return edit.call(aten.mul.Tensor, product, shape.scale)


def plus(edit: Edit, stored: fx.Node, change: fx.Node) -> fx.Node:
    """The node of ``stored + change``, in the dtype of ``stored`` and rounded to it once: an earlier update's cast is
    skipped."""
    rounded = stored.target is aten.to.dtype and INSERTED_BY in stored.meta
    value = edit.cast(node_at(stored, 0) if rounded else stored, change.meta["val"].dtype)
    return edit.cast(edit.call(aten.add.Tensor, value, change), stored.meta["val"].dtype)


def update_stack(edit: Edit, site: Site, a: fx.Node, b: fx.Node, shape: StackShape) -> None:
    """Let what uses a stack at ``site`` read ``W[e] + s B[e] A[e]``; call it inside ``edit.before(site.reader)``."""
    stored, reader = site.stored, site.reader
    assert stored is not None
    assert reader is not None
    # A transposed view of a stack may have several users, each a site.
    if stored in reader.all_input_nodes:
        edit.feed(reader, stored, plus(edit, stored, delta(edit, a, b, shape)))
        edit.sweep([stored])
