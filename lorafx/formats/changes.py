"""What an adapter changes in single tensors: each change computes the new tensor in fp64.

Merged weights are compared with these, and a graph with the adapter beside its weights has to compute the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..deferred.tensor import deferred, is_deferred
from ..graph.site import WeightOp


@dataclass(frozen=True)
class Change:
    """What an adapter changes in one tensor.

    Attributes:
        name: the tensor's name in the model
        keys: the keys of the adapter's file that this takes
        tied: whether tensors that are tied to it change with it
    """

    name: str
    keys: tuple[str, ...]
    tied: bool

    def updated(self, old: Tensor) -> Tensor:
        """The new tensor in fp64; deferred if ``old`` is (:mod:`lorafx.deferred`)."""
        raise TypeError(f"{type(self).__name__} does not say what it computes")


@dataclass(frozen=True, eq=False)
class Factors(Change):
    """A module's weight plus ``scale · B A``, whose rows are then rescaled to the lengths in ``magnitude``, if it is
    there (DoRA, arXiv 2402.09353, eq. 5); and ``scale · shift`` on its bias.

    A: (rank, in), B: (out, rank), followed by a convolution's kernel sizes.
    """

    module: str
    use: WeightOp
    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    shift: Tensor | None = None

    def of_bias(self) -> Shift | None:
        """The change of the module's bias, if there is one."""
        shift = self.shift
        return None if shift is None else Shift(f"{self.module}.bias", self.keys, False, shift, self.scale)

    def updated(self, old: Tensor) -> Tensor:
        a, b = (_like(old, value.detach().flatten(1).double()) for value in (self.a, self.b))
        matrix = self.use.matrix(old.detach()).double() + (b * self.scale) @ a
        if self.magnitude is not None:
            length = torch.linalg.vector_norm(matrix, dim=1)
            matrix = matrix * (self.magnitude.reshape(-1).double() / length).unsqueeze(1)
        return self.use.stored(matrix, old.shape)


@dataclass(frozen=True, eq=False)
class Shift(Change):
    """A bias that ``scale · shift`` is added to."""

    shift: Tensor
    scale: float

    def updated(self, old: Tensor) -> Tensor:
        return old.detach().double() + self.scale * self.shift.double()


@dataclass(frozen=True, eq=False)
class Stack(Change):
    """A parameter plus ``scale · B A`` for each expert of a stack; or to a parameter that is a single matrix.

    A: (experts · rank, in) with the expert slowest, B: (out, rank · experts) with the expert fastest. ``transposed``
    says that an expert is stored (in, out).
    """

    a: Tensor
    b: Tensor
    scale: float
    experts: int
    transposed: bool

    def updated(self, old: Tensor) -> Tensor:
        a = self.a.detach().double().reshape(self.experts, -1, self.a.shape[1])
        b = self.b.detach().double().reshape(self.b.shape[0], -1, self.experts).permute(2, 0, 1).contiguous()
        if old.dim() == 2:
            return old.detach().double() + _like(old, b[0] * self.scale) @ _like(old, a[0])
        delta = torch.bmm(_like(old, b * self.scale), _like(old, a))
        return old.detach().double() + (delta.transpose(1, 2) if self.transposed else delta)


@dataclass(frozen=True, eq=False)
class Rows(Change):
    """A table some of whose rows were trained."""

    rows: tuple[int, ...]
    values: Tensor

    def updated(self, old: Tensor) -> Tensor:
        return old.detach().double().index_copy(0, torch.tensor(self.rows), self.values.double())


@dataclass(frozen=True, eq=False)
class Whole(Change):
    """A tensor that was trained in full. For a module in ``modules_to_save`` PEFT trained a copy, so tensors tied to it
    keep their values; any other tensor is loaded into the model as it is."""

    value: Tensor

    def updated(self, old: Tensor) -> Tensor:
        return self.value.double()


def _like(old: Tensor, value: Tensor) -> Tensor:
    return deferred(value) if is_deferred(old) else value
