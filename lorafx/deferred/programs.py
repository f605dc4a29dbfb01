"""Programs whose weights are computed when they are written, and their way back into memory."""

from __future__ import annotations

from torch import Tensor, fx, nn

from ..graph.program import P, Program
from ..graph.site import WEIGHT_OPS
from ..graph.tree import has_tensor, named_tensors, persistent, put_tensor
from .slices import nonzero
from .tensor import deferred, is_deferred, value


def is_deferring(program: Program) -> bool:
    """Whether any tensor of the program is computed later."""
    return any(is_deferred(tensor) for _, tensor in named_tensors(program.root))


def deferring(program: P) -> P:
    """The program with every matrix as a deferred tensor, adapters too: what passes compute from them is recorded,
    since the product of two small ones is as large as a weight. Vectors stay as they are: they are small, and passes
    look at their values."""
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
    """The program with all of its tensors in memory; itself when they already are."""
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


def has_zeros(program: Program) -> bool:
    """Whether any weight in use has a row or column of zeros, or any vector that is not merely added a zero: without
    them no channel can be dead. Looks at the beginning of each row and column. The rows of a table are looked up by
    number, so they are not channels, and one of zeros (for padding) does not count.
    """
    read, tables, added = dict[int, Tensor](), set[int](), set[int]()
    for node in program.graph.find_nodes(op="get_attr"):
        if has_tensor(program.root, str(node.target)):
            tensor = program.tensor(str(node.target))
            read[id(tensor)] = tensor
            places = [_place(user, node) for user in node.users]
            of = added if all(place == "bias" for place in places) else tables if "table" in places else set[int]()
            of.add(id(tensor))
    for tensor in read.values():
        if not tensor.is_floating_point() or not tensor.dim():
            continue
        if tensor.dim() == 1:
            found = id(tensor) not in added and bool((tensor == 0).any())
        else:
            dims = range(1 if id(tensor) in tables else 0, tensor.dim())
            found = any(not bool(nonzero(tensor, dim).all()) for dim in dims)
        if found:
            return True
    return False


def _place(user: fx.Node, node: fx.Node) -> str:
    """How an operator uses a tensor: its ``bias``, its ``table``, or anything else."""
    use = WEIGHT_OPS.get(user.target)
    if use is None or user.args[use.weight] is node:
        return "table" if use is not None and use.kind == "embedding" else ""
    return "bias" if use.bias is not None and len(user.args) > use.bias and user.args[use.bias] is node else ""
