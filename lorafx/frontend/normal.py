"""The normal form of a traced graph: one spelling for what a trace can say in several ways, the values unchanged."""

from __future__ import annotations

import torch
from torch import fx

from ..graph.operands import rank_of

aten = torch.ops.aten

#: The ways to write a transposed matrix.
_TURNS = (aten.numpy_T.default, aten.t.default, aten.transpose.int, aten.permute.default)


def normalise(graph: fx.Graph) -> None:
    """Bring a traced graph into normal form.

    - Checks of the dtype and device seen at capture go: they would refuse autocast, fp64 and any other device.
    - A tensor cast to the dtype it has, where it is, is the tensor: else a shared weight is read through its first
      user's cast.
    - An operator that overwrites a value nobody else reads becomes the one that makes a new value, of the same dtype.
    - A product with a transposed weight is a linear.
    """
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target in (aten.to.dtype, aten.to.device) and _is_idle(node):
            node.replace_all_uses_with(node.args[0])
        elif _overwrites_its_own(node):
            _make_anew(node)
        elif node.target is aten.matmul.default:
            _to_linear(node)
    graph.eliminate_dead_code()


def _is_idle(node: fx.Node) -> bool:
    value = node.args[0]
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return False
    found = value.meta["val"]
    return node.args[1:] in ((found.dtype,), (found.device, found.dtype))


def _overwrites_its_own(node: fx.Node) -> bool:
    """Whether the node writes into its first argument, a fresh value that only it reads, and a pure twin exists."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable or not node.args:
        return False
    value = node.args[0]
    if not isinstance(value, fx.Node) or not isinstance(value.target, torch._ops.OpOverload):
        return False
    written = [a.alias_info is not None and a.alias_info.is_write for a in node.target._schema.arguments]
    fresh = all(result.alias_info is None for result in value.target._schema.returns)
    alone = len(value.users) == 1 and written == [True, *[False] * (len(written) - 1)]
    return fresh and alone and _functional(node.target) is not None


def _to_linear(node: fx.Node) -> None:
    """``x @ W.T`` as ``linear(x, W)``, the same product; ``W`` is a parameter."""
    turned = node.args[1]
    if not isinstance(turned, fx.Node) or turned.target not in _TURNS or turned.meta["val"].dim() != 2:
        return
    weight, value = turned.args[0], node.args[0]
    swaps = turned.args[1:] in ((), (0, 1), (1, 0), (-1, -2), (-2, -1), ([1, 0],))
    if isinstance(weight, fx.Node) and weight.op == "get_attr" and swaps and rank_of(value) > 1:
        node.target, node.args = aten.linear.default, (value, weight)


def _make_anew(node: fx.Node) -> None:
    """Put the pure twin of an overwriting operator in its place. What it writes into keeps its dtype: a comparison in
    place gives numbers where its twin gives truth values, an fp16 sum with an fp32 term stays fp16."""
    twin = _functional(node.target) if isinstance(node.target, torch._ops.OpOverload) else None
    assert twin is not None, "an operator that overwrites its own has a pure twin"
    node.target = twin
    before = node.meta["val"]
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    with before.fake_mode, torch.no_grad():
        after = twin(*args, **kwargs)
    if after.dtype == before.dtype:
        return
    with node.graph.inserting_after(node):
        cast = node.graph.call_function(aten.to.dtype, (node, before.dtype))
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    cast.meta, node.meta = {**node.meta}, {**node.meta, "val": after}


def _functional(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``."""
    packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    twin = getattr(packet, target._overloadname, None)
    return twin if twin is not None and twin is not target and not twin._schema.is_mutable else None
