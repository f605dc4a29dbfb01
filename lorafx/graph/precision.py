"""Precision: how close two computations of one function must be, and a program computed in another dtype."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from ..errors import UsageError
from .fake import likeness
from .program import P
from .tree import named_tensors, persistent, put_tensor

#: The one table of tolerances: the largest difference allowed, as a share of the largest reference value of an output.
#: Two correct computations differ by the order of their sums; how much that costs grows with depth, not with size.
TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-12,  # about 10⁴ roundings of 1.1e-16; a wrong formula is off by far more than that
    torch.float32: 1e-5,  # about 170 roundings of 6e-8: fused kernels against unfused ones, 30 blocks deep
    torch.float16: 5e-3,  # about 10 roundings of 4.9e-4: every block rounds its activations (six blocks measured: 1e-3)
    torch.bfloat16: 4e-2,  # likewise, roundings of 3.9e-3 (measured: 1e-2); judge merges in fp32 or fp64 instead
}


def tolerance(dtype: torch.dtype) -> float:
    """The tolerance of a dtype; UsageError when the table has none."""
    if dtype not in TOLERANCES:
        known = ", ".join(map(dtype_name, TOLERANCES))
        raise UsageError(f"no tolerance is known for {dtype_name(dtype)}; known: {known}")
    return TOLERANCES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The floating dtype of the lowest precision; fp32 when there is none."""
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def recast(program: P, dtype: torch.dtype | None = None, device: torch.device | None = None) -> P:
    """The program computed in ``dtype`` or on ``device``, with tensors of its own.

    Floating tensors are converted, and so is every dtype or device the graph names: a model that computes its norms in
    fp32 computes them in ``dtype`` here, or rounding would hide what a comparison in fp64 is to find.
    """
    result = program.copy()
    moved: dict[int, Tensor] = {}
    for name, value in list(named_tensors(result.root)):
        if id(value) not in moved:
            moved[id(value)] = _moved(value, dtype, device)
        put_tensor(result.root, name, moved[id(value)])
    for name, module in list(result.root.named_children()):
        if isinstance(module, fx.GraphModule):
            setattr(result.root, name, _moved_graph_module(module, dtype, device))
    _move_graph(result.graph, dtype, device)
    result.example = {
        name: _moved(value, dtype, device) if isinstance(value, Tensor) else value
        for name, value in program.example.items()
    }
    return result


def gathered(program: P) -> P:
    """The program with its graph and its example where its tensors are; the program itself where they are there.

    A model may be captured in one place and train in another, and a graph names the devices of its capture.
    """
    device = program.device
    named = [value for node in program.graph.nodes for value in (*node.args, *node.kwargs.values())]
    places = {value for value in named if isinstance(value, torch.device)}
    places |= {value.device for value in program.example.values() if isinstance(value, Tensor)}
    return program if device.type == "meta" or places <= {device} else recast(program, None, device)


def relaid(program: P) -> P:
    """The program with a copy of every tensor, none of which trains: two programs laid out alike compute the same bits.

    A product with a weight that trains is summed in another order by torch than one with a weight that is frozen.
    """
    result = program.copy()
    copies: dict[int, Tensor] = {}
    for name, value in list(named_tensors(result.root)):
        if id(value) not in copies:
            copy = value.detach().clone()
            copies[id(value)] = nn.Parameter(copy, requires_grad=False) if isinstance(value, nn.Parameter) else copy
        put_tensor(result.root, name, copies[id(value)], persistent(result.root, name))
    return result


def _moved(value: Tensor, dtype: torch.dtype | None, device: torch.device | None) -> Tensor:
    moved = value.detach().to(dtype=dtype if value.is_floating_point() else None, device=device)
    if (moved.dtype, moved.device) == (value.dtype, value.device):
        return value
    return nn.Parameter(moved, value.requires_grad) if isinstance(value, nn.Parameter) else moved


def _moved_graph_module(module: fx.GraphModule, dtype: torch.dtype | None, device: torch.device | None) -> nn.Module:
    """A copy of an inner graph (the body of a no-grad or autocast region, say), moved with the graphs inside it."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    _move_graph(graph, dtype, device)
    copied = fx.GraphModule(module, graph)
    for name, child in list(copied.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(copied, name, _moved_graph_module(child, dtype, device))
    for name, value in list(copied.named_buffers(recurse=False)):
        copied.register_buffer(name, _moved(value, dtype, device))
    return copied


def _move_graph(graph: fx.Graph, dtype: torch.dtype | None, device: torch.device | None) -> None:
    """Change what the nodes name, and the fake values that passes read dtypes from."""

    def moved(value: Any) -> Any:
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return dtype or value
        return device or value if isinstance(value, torch.device) else value

    known: dict[Any, Tensor] = {}  # blocks repeat, and a fake value is nothing but its metadata

    def moved_value(value: FakeTensor) -> Tensor:
        wanted = dtype or value.dtype if value.is_floating_point() else value.dtype
        if wanted == value.dtype and device in (None, value.device):
            return value
        key = likeness(value), id(value.fake_mode)
        if key not in known:
            # As it lies in memory, which a conversion would change for what has gaps.
            with value.fake_mode:
                known[key] = torch.empty_strided(
                    value.shape, value.stride(), dtype=wanted, device=device or value.device
                )
        return known[key]

    for node in graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = pytree.tree_map(moved, (node.args, node.kwargs))
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map_only(FakeTensor, moved_value, node.meta["val"])
