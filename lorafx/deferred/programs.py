"""Programs whose weights are computed when they are written, and their way back into memory."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ..graph.program import P, Program
from ..graph.tree import named_tensors, persistent, put_tensor
from .recipe import Recipe
from .tensor import deferred, is_deferred, value
from .zeros import Zeros, zeros_of


def is_deferring(program: Program) -> bool:
    """Whether any tensor of the program is one that is computed later."""
    return any(is_deferred(tensor) for _, tensor in named_tensors(program.root))


def deferring(program: P) -> P:
    """The program with every matrix as a deferred tensor, adapters too: what passes make of them is noted down, for the
    product of two small ones is as large as a weight. Vectors stay as they are: they are small, and they decide."""
    result = program.copy()
    made: dict[int, Tensor] = {}
    for name, tensor in list(named_tensors(result.root)):
        matrix = isinstance(tensor, nn.Parameter) and tensor.dim() >= 2 and tensor.is_floating_point()
        if matrix and not tensor.is_meta:
            if id(tensor) not in made:
                made[id(tensor)] = nn.Parameter(deferred(tensor.detach()), requires_grad=False)
            put_tensor(result.root, name, made[id(tensor)])
    return result


def resident(program: P) -> P:
    """The program with all of its tensors in memory; itself when they are."""
    if not is_deferring(program):
        return program
    result = program.copy()
    made: dict[int, Tensor] = {}
    for name, tensor in list(named_tensors(result.root)):
        if is_deferred(tensor):
            if id(tensor) not in made:
                held = value(tensor)
                made[id(tensor)] = nn.Parameter(held, requires_grad=False) if isinstance(tensor, nn.Parameter) else held
            put_tensor(result.root, name, made[id(tensor)], persistent(result.root, name))
    return result


def has_zero_slices(program: Program) -> bool:
    """Whether any weight has a row or column of zeros; the weights of the checkpoint are read for it, once each.

    The rows of a table are looked up by number, so they are not channels: one of zeros (for padding) does not count.
    """
    tables = {
        id(program.tensor(str(node.args[0].target)))
        for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
        if isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr"
    }
    known: dict[Recipe, Zeros] = {}
    seen: set[int] = set()
    for _, tensor in named_tensors(program.root):
        if id(tensor) not in seen and tensor.dim() >= 2 and tensor.is_floating_point():
            seen.add(id(tensor))
            zeros = zeros_of(tensor, known)
            if bool(zeros.columns.any()) or (id(tensor) not in tables and bool(zeros.rows.any())):
                return True
    return False
