"""One axis of a value: which dimensions it is, and one label for each channel along them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True)
class Axis:
    """Some dimensions of a value, in order, and one entry for each channel along them.

    Attributes:
        dims: which dimensions
        data: labels (or, in other analyses, facts about channels), in the shape of these dimensions
    """

    dims: tuple[int, ...]
    data: Array

    def moved(self, place: Callable[[int], int]) -> Axis:
        """The axis after its dimensions were renumbered, in increasing order."""
        dims = [place(dim) for dim in self.dims]
        order = sorted(range(len(dims)), key=dims.__getitem__)
        return Axis(tuple(dims[i] for i in order), self.data.transpose(order))


#: What is known of a node: its axes; of a node that gives several values, a list of those.
Known: TypeAlias = "list[Any]"


def axis_of(axes: Iterable[Axis], dim: int) -> Axis | None:
    """The axis that has ``dim``."""
    return next((axis for axis in axes if dim in axis.dims), None)
