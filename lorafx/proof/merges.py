"""Check merges by other tools against base and adapter: which tensors are right, and what is wrong with the others.

Merged checkpoints are opened as transformers opens them, so that names and layouts are those of the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UsageError
from ..formats.adapter import Adapter
from ..formats.changes import Change, Factors, Whole
from ..frontend.adapters import Adapters, read_adapters, resize, weighted
from ..graph.tree import named_tensors, persistent, ties
from ..models.checkpoint import open_model, read_config
from ..models.hub import local_folder
from ..models.identity import check_written
from ..models.quantized import Quantization
from .fits import Made, judge


@dataclass(frozen=True)
class Fault:
    """A tensor that is not what base and adapter give, and the cause, if it was found."""

    name: str
    cause: str
    largest: float

    def __str__(self) -> str:
        return f"{self.name}: {self.cause} (largest difference {self.largest:.3g})"


@dataclass(frozen=True)
class Checked:
    """One tensor that was found to be right.

    Attributes:
        name: its name in the model
        dtype: in which it was found
        keys: the adapter's keys that went into it; empty for a tensor of the base
        largest: the largest difference from the exact value (fp64)
        share: the largest difference as a share of what rounding allows at that place
    """

    name: str
    dtype: str
    keys: tuple[str, ...]
    largest: float
    share: float


@dataclass(frozen=True)
class MergeCheck:
    """The result of checking a merge: the tensors that are right, and the faults."""

    tensors: tuple[Checked, ...]
    faults: tuple[Fault, ...]

    @property
    def ok(self) -> bool:
        """Whether every tensor is what base and adapter give."""
        return not self.faults

    def text(self) -> str:
        """For a terminal: the faults, or one line."""
        changed = sum(bool(one.keys) for one in self.tensors)
        if self.ok:
            return f"{changed} merged tensors and {len(self.tensors) - changed} others are what base and adapter make"
        head = f"{len(self.faults)} of {len(self.faults) + len(self.tensors)} tensors are not base + adapter:"
        return "\n".join([head, *(f"  {fault}" for fault in self.faults)])

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "ok": self.ok,
            "tensors": [dataclasses.asdict(one) for one in self.tensors],
            "faults": [dataclasses.asdict(fault) for fault in self.faults],
        }


def check_merge(base: str | Path, adapters: Adapters, merged: str | Path, *, task: str | None = None) -> MergeCheck:
    """Compare the checkpoint ``merged`` with ``base`` plus LoRA adapters, tensor by tensor.

    Weights are read from their files a tile at a time; where transformers puts several tensors of the files into one
    (experts), that one is in memory.

    Raises:
        ArtifactError: a folder that cannot be opened, an adapter that does not fit the base
        UsageError: the two checkpoints are of different classes, or the merged one is quantised
    """
    old_folder, new_folder = local_folder(base), local_folder(merged)
    if Quantization.of(read_config(new_folder)) is not None:
        raise UsageError(
            f"{merged}: its weights are quantised, which moved every one of them off base + adapter; check the merge "
            "as it was before that"
        )
    check_written(old_folder)  # the merge is held against it; whatever is wrong in that is found by this
    old, fresh = open_model(old_folder, task, {"dtype": "auto"})
    new, _ = open_model(new_folder, task, {"dtype": "auto"})
    if type(old) is not type(new):
        names = f"{type(old).__name__} and {type(new).__name__}"
        raise UsageError(f"{base} and {merged} are of two classes, {names}; say which task to open them for (--task)")
    return check_models(old, new, read_adapters(weighted(adapters)), fresh)


def check_models(
    base: Any, merged: Any, adapters: Sequence[tuple[Adapter, float]], fresh: frozenset[str] = frozenset()
) -> MergeCheck:
    """:func:`check_merge` of models that are open; ``fresh`` are the names of what the base's files do not hold."""
    resize(base, adapters)
    changes = [(weight, change) for adapter, weight in adapters for change in adapter.changes(base)]
    return _checked(base, merged, _by_name(base, changes), fresh)


def _by_name(model: Any, changes: Sequence[tuple[float, Change]]) -> dict[str, list[tuple[float, Change]]]:
    """The changes of each tensor, those of others that it is tied to included where they keep the tie."""
    tied = ties(model)
    found: dict[str, list[tuple[float, Change]]] = {}
    # Replacements come first: other changes are added to them.
    for weight, change in sorted(changes, key=lambda one: not isinstance(one[1], Whole)):
        for name in tied[change.name] if change.tied else [change.name]:
            found.setdefault(name, []).append((weight, change))
        moved = change.of_bias() if isinstance(change, Factors) else None
        if moved is not None:
            found.setdefault(moved.name, []).append((weight, moved))
    return found


def _checked(
    old: Any, new: Any, changes: Mapping[str, list[tuple[float, Change]]], fresh: frozenset[str]
) -> MergeCheck:
    before, after, tied = dict(named_tensors(old)), dict(named_tensors(new)), ties(old)
    right: list[Checked] = []
    faults: list[Fault] = []
    made = {name: _made(name, tensor, changes.get(name, ())) for name, tensor in before.items()}
    for name in sorted({*before, *changes}):
        found = after.get(name)
        if name not in before or found is None:
            faults.append(
                Fault(name, "the base has none, which the adapter changes" if found is None else "", math.inf)
            )
        elif not found.is_floating_point() or not persistent(old, name):
            continue
        elif found.shape != before[name].shape:
            shapes = f"{tuple(found.shape)} where {tuple(before[name].shape)} is expected"
            faults.append(Fault(name, f"another shape: {shapes}", math.inf))
        elif name in fresh and name not in changes:
            faults.append(Fault(name, "neither the base nor the adapter holds it", math.inf))
        else:
            others = [made[alias] for alias in tied[name] if alias != name and made[alias].changes]
            result, cause = judge(found, made[name], others)
            keys = tuple(key for _, change in made[name].changes for key in change.keys)
            if cause.startswith("skipped") and all(change.name != name for _, change in made[name].changes):
                cause = f"tie broken: it is the base's, where {made[name].changes[0][1].name} was changed"
            if cause:
                faults.append(Fault(name, cause, result.largest))
            else:
                right.append(
                    Checked(name, str(found.dtype).removeprefix("torch."), keys, result.largest, result.excess)
                )
    extra = sorted(after.keys() - before.keys())
    faults += [Fault(name, "the base has no such tensor", math.inf) for name in extra]
    return MergeCheck(tuple(right), tuple(faults))


def _made(name: str, tensor: Tensor, changes: Sequence[tuple[float, Change]]) -> Made:
    whole = [change for _, change in changes if isinstance(change, Whole)]
    rest = tuple((weight, change) for weight, change in changes if not isinstance(change, Whole))
    if whole and rest:  # other changes build on the replacement
        return Made(name, whole[0].value, rest)
    return Made(name, tensor, tuple(changes))
