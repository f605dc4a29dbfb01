"""Weights that are computed as they are written, on their way through PyTorch's tracer and converter.

Those take plain tensors only. So each deferred weight has a stand-in while they work: a tensor of its shape and dtype
over memory that nothing is written into, which the system therefore does not hand out. Converters transpose weights,
and join those of one input: where the result lies in memory, or what it was joined of, says which weights it is. What
is computed from the numbers of a stand-in cannot be told, so all that the graph reads have to be found again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

from ..deferred.tensor import deferred, is_deferred, passing_tiles, value
from ..errors import CaptureError
from ..graph.tree import named_tensors, persistent, put_tensor

#: The first numbers of a stand-in tell it from all others, which converters would merge with it as equal.
_MARKS = 4
_BASE = 1 << 8


class LostError(CaptureError):
    """A weight was not found again in what its stand-in became."""


class StandIns:
    """The stand-ins of one export and what they stand for, by where they lie in memory."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[Tensor, Tensor]] = {}
        #: Of joined weights, where their parts lie.
        self._parts: dict[int, list[int]] = {}
        self._read: dict[int, str] = {}

    # ---- before the conversion

    def hollow(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """A copy of ``model`` in ``dtype`` whose matrices are stand-ins of the model's own."""
        memo: dict[int, Any] = {}
        for _, tensor in named_tensors(model):
            if isinstance(tensor, nn.Parameter) and tensor.dim() > 1 and tensor.is_floating_point():
                cast = nn.Parameter(deferred(tensor.detach()).to(dtype), requires_grad=False)
                memo[id(tensor)] = self._made(cast).requires_grad_(tensor.requires_grad)
        return copy.deepcopy(model, memo).to(dtype)

    def of(self, tensors: Mapping[str, Tensor], read: Iterable[str]) -> dict[str, Tensor]:
        """The same tensors by name, stand-ins where they are deferred; one for all names of one tensor. Those ``read``
        have to be found again (:meth:`settle`)."""
        made: dict[int, Tensor] = {}
        for tensor in tensors.values():
            if id(tensor) not in made:
                made[id(tensor)] = self._made(tensor) if is_deferred(tensor) else tensor
        found = {name: made[id(tensor)] for name, tensor in tensors.items()}
        places = {found[name].data_ptr(): name for name in read if name in found}
        self._read = {place: name for place, name in places.items() if place in self._of}
        return found

    def take_place(self, root: nn.Module, read: Iterable[str]) -> None:
        """Put stand-ins where ``root`` has deferred tensors, in place; see :meth:`of`."""
        for name, tensor in self.of(dict(named_tensors(root)), read).items():
            put_tensor(root, name, tensor, persistent(root, name))

    def give_place(self, root: nn.Module) -> None:
        """Put deferred tensors back where ``root`` has their stand-ins; in place."""
        for name, tensor in list(named_tensors(root)):
            known = None if is_deferred(tensor) or tensor.is_meta else self._of.get(tensor.data_ptr())
            if known is not None:
                put_tensor(root, name, known[1], persistent(root, name))

    def _made(self, tensor: Tensor) -> Tensor:
        """A stand-in; of a few numbers, those themselves."""
        if tensor.numel() < _MARKS:
            plain = value(tensor)
        else:
            memory = np.zeros(tensor.numel() * tensor.dtype.itemsize, np.uint8)
            plain = torch.from_numpy(memory).view(tensor.dtype).reshape(tensor.shape)
            number = len(self._of) + 1
            marks = [number // _BASE**digit % _BASE for digit in range(_MARKS)]
            plain.view(-1)[:_MARKS] = torch.tensor(marks, dtype=tensor.dtype)
            self._of[plain.data_ptr()] = (plain, tensor)
        return nn.Parameter(plain, requires_grad=False) if isinstance(tensor, nn.Parameter) else plain

    # ---- after it

    def watch(self, graph: ir.Graph) -> None:
        """Have what joins weights of ``graph`` from now on join those that their stand-ins stand for; in place."""
        for one in graph.initializers.values():
            array = _array(one)
            if array is not None and self._holds(array):
                watched = array.view(_Watched)
                watched.stand_ins = self
                one.const_value = ir.tensor(watched, dtype=one.dtype, name=one.name)

    def settle(self, graph: ir.Graph) -> None:
        """Put the weights where ``graph`` has stand-ins, to be computed as they are written; in place.

        Raises:
            LostError: a weight that the graph read before it was converted is not there, or only in part
        """
        found: set[int] = set()
        for one in graph.initializers.values():
            array = _array(one)
            if array is not None and self._holds(array):
                late = self.stood_for(array)
                assert one.const_value is not None
                one.const_value = _Late(late, one.const_value.dtype, str(one.name))
                place = array.ctypes.data
                found.update((place, *self._parts.get(place, ())))
        lost = next((name for place, name in self._read.items() if place not in found), None)
        if lost is not None:
            raise LostError(f"{lost}: the conversion to ONNX computed with its numbers, so it cannot be computed later")

    def stood_for(self, array: np.ndarray) -> Tensor:
        """What stands behind an array over a stand-in: the deferred tensor, its dimensions in another order, or in
        another shape. LostError: a part of it, or anything else."""
        held, tensor = self._of.get(array.ctypes.data, (None, None))
        if held is None or tensor is None or held.numel() != array.size or held.itemsize != array.itemsize:
            raise LostError(f"a constant of shape {array.shape} is a part of a weight that is computed later")
        order = _order(held, array)
        if order is not None:
            return tensor if order == sorted(order) else tensor.permute(order)
        if array.flags.c_contiguous:
            return tensor.reshape(array.shape)
        raise LostError(f"a constant of shape {array.shape} is an odd view of a weight that is computed later")

    def joined(self, arrays: list[np.ndarray], axis: int) -> np.ndarray:
        """The stand-in of the weights behind ``arrays``, joined."""
        parts = [self.stood_for(one) if self._holds(one) else torch.from_numpy(np.asarray(one)) for one in arrays]
        stand_in = self._made(torch.cat([deferred(part) for part in parts], axis))
        places = [one.ctypes.data for one in arrays]
        self._parts[stand_in.data_ptr()] = [inner for place in places for inner in (place, *self._parts.get(place, ()))]
        return stand_in.numpy()

    def _holds(self, array: np.ndarray) -> bool:
        """Whether an array lies in the memory of a stand-in."""
        place = array.ctypes.data
        return any(start <= place < start + held.nbytes for start, (held, _) in self._of.items())


class _Watched(np.ndarray):
    """An array over a stand-in that is joined with others as what it stands for."""

    stand_ins: StandIns | None

    def __array_finalize__(self, made_from: Any) -> None:
        self.stand_ins = getattr(made_from, "stand_ins", None)

    def __array_function__(self, func: Callable[..., Any], types: Any, args: Any, kwargs: Any) -> Any:
        if func is np.concatenate and self.stand_ins is not None:
            return self.stand_ins.joined(list(args[0]), *args[1:], **kwargs)
        return super().__array_function__(func, types, args, kwargs)


class _Late(ir.LazyTensor):
    """A tensor of a graph that is computed a tile at a time as it is written."""

    def __init__(self, tensor: Tensor, dtype: ir.DataType, name: str):
        def whole() -> ir.TensorProtocol:
            return TorchTensor(value(tensor).contiguous(), name=name)

        super().__init__(whole, dtype, ir.Shape(tuple(tensor.shape)), name=name)
        self._tensor_later = tensor

    def tofile(self, file: Any) -> None:
        for tile in passing_tiles(self._tensor_later):
            file.write(tile.contiguous().view(-1).view(torch.uint8).numpy())


def _array(one: ir.Value) -> np.ndarray | None:
    """The numbers of a constant where they lie."""
    return None if one.const_value is None else one.const_value.numpy()


def _order(held: Tensor, array: np.ndarray) -> list[int] | None:
    """Which dimension of a stand-in each of a view's is; None when it is no other order of them."""
    left = [*enumerate(zip(held.shape, (step * held.itemsize for step in held.stride()), strict=True))]
    order = []
    for wanted in zip(array.shape, array.strides, strict=True):
        match = next((entry for entry in left if entry[1] == wanted), None)
        if match is None:
            return None
        left.remove(match)
        order.append(match[0])
    return None if left else order
