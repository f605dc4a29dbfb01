"""An exported graph brought to operators that have a translation to ONNX, each where it stands.

torch's converter traces a graph again for that, which takes longer than all that follows. Of graphs that write nothing
what it changes is little: operators that are two in aten and one in ONNX, and those that give back their own input.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Set
from typing import Any, cast

import torch
from torch import Tensor, fx

from ..graph.shapes import in_rows

aten: Any = torch.ops.aten

#: What becomes of an operator: another target with its arguments; a node, whose value it is; None, where a trace has to
#: find out.
Lowered = tuple[Any, tuple[Any, ...], dict[str, Any]] | fx.Node | None
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def lower(exported: torch.export.ExportedProgram, translated: Set[Any]) -> bool:
    """Bring the graph to operators that are ``translated``, in place; False, and no change, where that takes a trace.

    The graph's function stays as it is, in evaluation: what torch decomposes without being asked is decomposed here in
    the same way, or not at all.
    """
    graph = exported.graph_module.graph
    called = [node for node in graph.nodes if node.op == "call_function"]
    named = set(graph.output_node().all_input_nodes)  # by the program's signature
    if any(node.op not in ("placeholder", "call_function", "output") for node in graph.nodes):
        return False
    if not all(_lowers(node, translated) and not (node in named and _given_back(node)) for node in called):
        return False
    for node in called:
        if node.target is aten.flatten.using_ints:
            _say_sizes(node)
        if node.target is aten.reshape.default:
            _lay_in_rows(node)
        change = _lowered(node)
        if isinstance(change, fx.Node):
            node.replace_all_uses_with(change)
            graph.erase_node(node)
        elif change is not None:
            node.target, node.args, node.kwargs = change
    graph.lint()
    exported.graph_module.recompile()
    return True


def _lowered(node: fx.Node) -> Lowered:
    rule = _RULES.get(node.target)
    if rule is None and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        rule = _apart
    return rule(node) if rule else (node.target, node.args, node.kwargs)


def _lowers(node: fx.Node, translated: Set[Any]) -> bool:
    change = _lowered(node)
    return isinstance(change, fx.Node) or (change is not None and "val" in node.meta and _stays(change[0], translated))


def _given_back(node: fx.Node) -> bool:
    return isinstance(_lowered(node), fx.Node)


def _stays(target: Any, translated: Set[Any]) -> bool:
    """Whether a trace would leave the operator: one that has a translation, writes nothing, and is not made of views,
    which torch always takes apart."""
    if target is operator.getitem:
        return True
    if target not in translated:
        return False
    if not isinstance(target, torch._ops.OpOverload):
        return not isinstance(target, torch._ops.HigherOrderOperator)
    views = any(result.alias_info is not None for result in target._schema.returns)
    return not target._schema.is_mutable and not (views and target.has_kernel_for_dispatch_key(_COMPOSITE))


def _same(node: fx.Node) -> Lowered:
    return node.args[0] if isinstance(node.args[0], fx.Node) else None


def _rows(node: fx.Node) -> Lowered:
    """A copy: what follows may be a view of it."""
    return aten.clone.default, node.args[:1], {"memory_format": torch.contiguous_format}


def _dropout(node: fx.Node) -> Lowered:
    train = node.args[2] if len(node.args) > 2 else node.kwargs.get("train")
    return _same(node) if train is False else None


def _to(node: fx.Node) -> Lowered:
    """A copy in another dtype; on one device."""
    before, after = _value(node.args[0]), _value(node)
    if before is None or after is None or before.device != after.device:
        return None
    if before.dtype == after.dtype:
        return _same(node)
    return aten._to_copy.default, node.args[:1], {"dtype": after.dtype}


def _reshape(node: fx.Node) -> Lowered:
    """A view, as :func:`_lay_in_rows` sees to it. Unlike a reshape, its translation knows of dimensions of size 0."""
    return None if _value(node.args[0]) is None or node.kwargs else (aten.view.default, node.args, {})


def _flatten(node: fx.Node) -> Lowered:
    """A reshape, as :func:`_say_sizes` makes it."""
    value = _value(node.args[0])
    return None if value is None or not value.dim() or node.kwargs else (aten.view.default, node.args, {})


def _say_sizes(node: fx.Node) -> None:
    """Make a reshape of a flatten: to sizes that the graph computes, as one that is -1 cannot be told where there are
    no elements."""
    given, *dims = node.args
    value = _value(given)
    assert value is not None  # _flatten saw to it
    first, last = (int(dim) % value.dim() for dim in (*dims, *(0, -1)[len(dims) :]))  # pyright: ignore[reportArgumentType]
    with node.graph.inserting_before(node):
        sizes = [
            size if isinstance(size, int) else _before(node, aten.sym_size.int, (given, dim), size)
            for dim, size in enumerate(value.shape)
        ]
        merged = functools.reduce(functools.partial(_times, node), sizes[first + 1 : last + 1], sizes[first])
    node.target, node.args = aten.reshape.default, (given, [*sizes[:first], merged, *sizes[last + 1 :]])


def _times(node: fx.Node, left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        return left * right
    a, b = (side.meta["val"] if isinstance(side, fx.Node) else side for side in (left, right))
    return _before(node, operator.mul, (left, right), a * b)


def _lay_in_rows(node: fx.Node) -> None:
    """Copy what is reshaped, if it does not lie in rows; and say a size that is -1, if known: rules that fuse operators
    look for numbers."""
    given, shape, *_ = cast(Any, node.args)
    before = given.meta["val"]
    pairs: Any = zip(shape, node.meta["val"].shape, strict=True)
    node.args = (given, [found if size == -1 and isinstance(found, int) else size for size, found in pairs])
    if in_rows(before):
        return
    rows: Any = {"memory_format": torch.contiguous_format}
    with node.graph.inserting_before(node):
        node.args = (_before(node, aten.clone.default, (given,), before.clone(**rows), **rows), node.args[1])


def _before(node: fx.Node, target: Any, args: tuple[Any, ...], value: Any, **kwargs: Any) -> fx.Node:
    """A node of a part of what ``node`` computes, whose value is like ``value``."""
    made = node.graph.call_function(target, args, kwargs)
    made.meta = {**node.meta, "val": value}  # where in the model's code it comes from, too
    return made


def _apart(node: fx.Node) -> Lowered:
    """The operator that does not write, for one that writes into a value which nothing reads any more."""
    target: Any = node.target
    written: Any = node.args[0]
    name = target._schema.name.removeprefix("aten::")
    twin = getattr(getattr(aten, name.removesuffix("_"), None), target._overloadname, None)
    if twin is None or not name.endswith("_") or twin._schema.is_mutable or not _has_own_memory(written):
        return None
    if not all(user is node or (user < node and _has_own_memory(user)) for user in written.users):
        return None
    kinds = {value.dtype for other in node.all_input_nodes if (value := _value(other)) is not None}
    return (twin, node.args, node.kwargs) if kinds == {node.meta["val"].dtype} else None


def _has_own_memory(node: Any) -> bool:
    """Whether the value cannot be its operand, or a view of one: of composites, dropout for one, schemas don't say."""
    target = getattr(node, "target", None)
    if not isinstance(target, torch._ops.OpOverload) or target.has_kernel_for_dispatch_key(_COMPOSITE):
        return False
    return all(result.alias_info is None for result in target._schema.returns)


def _chunk(node: fx.Node) -> Lowered:
    """Parts of one size, but for the last."""
    value, (_, chunks, *rest) = _value(node.args[0]), node.args
    dim = rest[0] if rest else node.kwargs.get("dim", 0)
    if value is None or not isinstance(chunks, int) or not isinstance(dim, int):
        return None
    size = value.shape[dim]
    return (aten.split.Tensor, (node.args[0], -(-size // chunks), dim), {}) if isinstance(size, int) and size else None


def _as(target: Any) -> Callable[[fx.Node], Lowered]:
    return lambda node: (target, node.args, node.kwargs)


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


_RULES: dict[Any, Callable[[fx.Node], Lowered]] = {
    aten.dropout.default: _dropout,
    aten.contiguous.default: _rows,
    aten.lift_fresh_copy.default: _same,
    aten.detach.default: _same,
    aten._assert_tensor_metadata.default: _same,  # the same for every size, and read by nobody
    **dict.fromkeys((aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other), _to),
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _flatten,
    aten.square.default: lambda node: (aten.pow.Tensor_Scalar, (node.args[0], 2), {}),
    aten.chunk.default: _chunk,
    aten.__and__.Tensor: _as(aten.bitwise_and.Tensor),
    aten.__or__.Tensor: _as(aten.bitwise_or.Tensor),
    aten.min.other: _as(aten.minimum.default),
    aten.max.other: _as(aten.maximum.default),
}
