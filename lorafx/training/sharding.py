"""A model whose tensors are split over processes (FSDP2), a block at a time; readers that need whole tensors get them
whole.

``fully_shard`` gathers a module's parameters when the module is called. A program is one graph over a bare tree of
tensors, so the blocks of that tree become modules that are called: each runs its own part of the graph. A
block whose tensors are read elsewhere too (tied weights, say) is not a unit of its own and stays with the root, whose
tensors are whole as long as the graph runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UsageError
from ..graph.segments import CompiledGraph
from ..graph.tree import get_tensor, ties


class Block(nn.Module):
    """The tensors of one block, as a module that runs a given function while they are whole."""

    def forward(self, run: Callable[..., Any], *taken: Any) -> Any:
        """``run(*taken)``."""
        return run(*taken)


def units(tree: nn.Module, graphs: Iterable[CompiledGraph]) -> dict[str, Block]:
    """The blocks of ``tree`` that nothing outside reads, in order of the graphs; their modules are :class:`Block` now.

    Raises:
        UsageError: a parameter without dimensions, which FSDP2 does not split
    """
    scalar = next((name for name, value in tree.named_parameters() if not value.dim()), None)
    if scalar is not None:
        raise UsageError(f"{scalar} is a single number, which FSDP2 does not split; train with DDP instead")
    segments = [segment for graph in graphs for segment in graph.segments]
    there = {path for path, module in tree.named_modules() if path and type(module) is nn.Module}
    found = dict.fromkeys(segment.block for segment in segments if segment.block in there)
    parameters = {name for name, _ in tree.named_parameters(remove_duplicate=False)}  # buffers are not split
    names = {name: alike for name, alike in ties(tree).items() if name in parameters}
    for segment in segments:
        for name in segment.tensors:
            for block in {_block_in(alias, found) for alias in names.get(name, ())} - {segment.block, ""}:
                del found[block]
    for path in found:
        tree.get_submodule(path).__class__ = Block
    return {path: module for path in found if isinstance(module := tree.get_submodule(path), Block)}


def _block_in(name: str, blocks: Mapping[str, object]) -> str:
    parts = name.split(".")
    paths = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((path for path in paths if path in blocks), "")


# ---- whole tensors


def whole(value: Tensor) -> Tensor:
    """A tensor that is split over processes, gathered (every process has to ask for it); any other as it is.

    Its gradient goes to the part each process holds.
    """
    return value.full_tensor() if isinstance(value, DTensor) else value


def split_like(value: Tensor, like: Tensor) -> Tensor:
    """``value``, which every process has whole, as ``like`` is split; as it is where ``like`` is whole."""
    if not isinstance(like, DTensor):
        return value
    device = like.to_local().device
    return distribute_tensor(value.to(device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy ``value``, which every process has whole, into ``target``, however that is split."""
    target.copy_(split_like(value.to(target.dtype), target))


@contextmanager
def whole_tensors(model: nn.Module) -> Iterator[Callable[[str], Tensor]]:
    """The tensors of ``model`` by name, whole and with whole gradients; what the block changes in them stays.

    Every process has to change the same in the same way.
    """
    shard_again(model)
    gathered: dict[int, tuple[Tensor, Tensor]] = {}

    def tensor(name: str) -> Tensor:
        value = get_tensor(model, name)
        if not isinstance(value, DTensor):
            return value
        if id(value) not in gathered:
            full = whole(value.detach())
            full.grad = None if value.grad is None else whole(value.grad)
            gathered[id(value)] = (value, full)
        return gathered[id(value)][1]

    yield tensor
    for value, full in gathered.values():
        assign(value, full)
        if value.grad is not None and full.grad is not None:
            assign(value.grad, full.grad)


def shard_again(model: nn.Module) -> None:
    """Free what an evaluation left gathered: only the split tensors belong to the model."""
    if is_sharded(model):
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on ``model``."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


# ---- the state of an optimiser


def whole_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state dict of an optimiser with every tensor whole, as a single process would have it."""
    kept = {
        index: {key: whole(value) if isinstance(value, Tensor) else value for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": kept}


def split_state(state: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """What :func:`whole_state` gave, split as the parameters in ``groups``, those of the optimiser that loads it."""
    parameters = dict(enumerate(value for group in groups for value in group["params"]))

    def part(value: Any, like: Tensor) -> Any:
        return split_like(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value

    kept = {
        index: {key: part(value, parameters[index]) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": kept}


# ---- statistics of every process


@torch.no_grad()
def average(values: Iterable[Tensor]) -> None:
    """Give every process the mean of each floating-point tensor; one message for all of a dtype and device."""
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for value in values:
        if value.is_floating_point():
            buckets.setdefault((value.dtype, value.device), []).append(value.detach())
    for bucket in buckets.values():
        flat = torch.cat([value.reshape(-1) for value in bucket])
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        for value, mean in zip(bucket, flat.split([value.numel() for value in bucket]), strict=True):
            value.copy_(mean.view_as(value))
