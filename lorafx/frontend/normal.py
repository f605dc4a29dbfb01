"""The normal form of a traced graph: one form for what a trace can express in several ways, with the same values."""

from __future__ import annotations

import torch
from torch import fx

from ..graph.effects import is_view, sharing
from ..graph.operands import is_mutable, rank_of

aten = torch.ops.aten

#: Operators that give a value another name.
_NAMES = (aten.detach.default, aten.alias.default)
#: The ways to write a transposed matrix.
_TURNS = (aten.numpy_T.default, aten.t.default, aten.transpose.int, aten.permute.default)


def normalise(graph: fx.Graph) -> None:
    """Bring a traced graph into normal form.

    - Checks of the dtype and device seen at capture go: they would refuse autocast, fp64 and any other device.
    - A tensor cast to the dtype it has, where it is, is the tensor: else a shared weight is read through its first
      user's cast.
    - An operator that overwrites a value of the graph's own becomes the one that makes a new value, of the same dtype;
      later readers of the value read that one.
    - A product with a transposed weight is a linear.
    """
    place = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target in (aten.to.dtype, aten.to.device) and _is_idle(node):
            node.replace_all_uses_with(node.args[0])
        elif names := _overwritten(node):
            _make_anew(node, [user for name in names for user in name.users if place.get(user, 0) > place[node]], names)
        elif node.target is aten.matmul.default:
            _to_linear(node)
    graph.eliminate_dead_code()


def _is_idle(node: fx.Node) -> bool:
    value = node.args[0]
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return False
    found = value.meta["val"]
    return node.args[1:] in ((found.dtype,), (found.device, found.dtype))


def _overwritten(node: fx.Node) -> set[fx.Node]:
    """The names of what the node writes into, if that is a fresh value that is seen only through them, and a pure twin
    of the operator exists; else none."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable or not node.args:
        return set()
    written = [a.alias_info is not None and a.alias_info.is_write for a in node.target._schema.arguments]
    if written != [True, *[False] * (len(written) - 1)] or _functional(node.target) is None:
        return set()
    value = node.args[0]
    while isinstance(value, fx.Node) and value.target in _NAMES:
        value = value.args[0]
    base = value
    while isinstance(base, fx.Node) and is_view(base) and len(base.users) == 1:  # of what nothing else reads
        base = base.args[0]
    if not isinstance(value, fx.Node) or not isinstance(base, fx.Node) or is_view(base):
        return set()
    if not isinstance(base.target, torch._ops.OpOverload) or (base is not value and len(base.users) > 1):
        return set()
    names = [value]
    for name in names:  # it grows
        names += [user for user in name.users if user.target in _NAMES and user not in names]
    others = {user for name in names for user in name.users if user not in names and user is not node}
    # Another that writes is met later; a view of a part would have to be written as a part.
    seen = [user for user in others if not set(names).isdisjoint(sharing(user)) and not is_mutable(user)]
    return set() if seen else set(names)


def _to_linear(node: fx.Node) -> None:
    """``x @ W.T`` as ``linear(x, W)``, the same product; ``W`` is a parameter."""
    turned = node.args[1]
    if not isinstance(turned, fx.Node) or turned.target not in _TURNS or turned.meta["val"].dim() != 2:
        return
    weight, value = turned.args[0], node.args[0]
    swaps = turned.args[1:] in ((), (0, 1), (1, 0), (-1, -2), (-2, -1), ([1, 0],))
    if isinstance(weight, fx.Node) and weight.op == "get_attr" and swaps and rank_of(value) > 1:
        node.target, node.args = aten.linear.default, (value, weight)


def _make_anew(node: fx.Node, later: list[fx.Node], names: set[fx.Node]) -> None:
    """Put the pure twin of an overwriting operator in its place, and let ``later`` readers of what it wrote into, under
    any of its ``names``, read the twin. What it writes into keeps its dtype: a comparison in place gives numbers where
    its twin gives truth values, an fp16 sum with an fp32 term stays fp16."""
    twin = _functional(node.target) if isinstance(node.target, torch._ops.OpOverload) else None
    assert twin is not None, "an operator that overwrites its own has a pure twin"
    node.target = twin
    before = node.meta["val"]
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    with before.fake_mode, torch.no_grad():
        after = twin(*args, **kwargs)
    result = node
    if after.dtype != before.dtype:
        with node.graph.inserting_after(node):
            result = node.graph.call_function(aten.to.dtype, (node, before.dtype))
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
        result.meta, node.meta = {**node.meta}, {**node.meta, "val": after}
    for user in later:
        for name in names & set(user.all_input_nodes):
            user.replace_input_with(name, result)


def _functional(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``."""
    packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    twin = getattr(packet, target._overloadname, None)
    return twin if twin is not None and twin is not target and not twin._schema.is_mutable else None
