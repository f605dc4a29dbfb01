"""Sparse patches: the few weights of a checkpoint that an edit changed, put on and taken off bit by bit.

A patch is one safetensors file. For each changed tensor NAME it holds ``NAME.indices`` (ascending flat positions, int32
where they fit), ``NAME.values`` and ``NAME.old`` (the new and the old weights there, in the checkpoint's dtype), so its
size is proportional to the number of changed weights. Its metadata holds each tensor's dtype and shape, the sha256 of
the old weights at the indices, and the sha256 of the whole tensor before and after.

New and old weights are both stored, though the xor of their bits would save a third of the file: any tool that reads
safetensors can then show an edit, and apply it in one line (``weight.view(-1)[indices] = values``).

The hashes of whole tensors make wrong bases, second applications and corruption errors, never silent wrong weights. So
patches made one after another on one model come off in the reverse order.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import ArtifactError, UsageError
from ..files.folder import read_manifest
from ..files.whole import write_whole
from ..graph.precision import dtype_name
from ..graph.tree import get_tensor, has_tensor, named_tensors, persistent, put_tensor, tensor_hash
from ..models.checkpoint import check_safetensors

if TYPE_CHECKING:
    from ..public import Program

#: The file's name inside a folder.
PATCH = "patch.safetensors"
#: The version of the format this code writes, and the newest it reads.
FORMAT = 1
#: The only key of the file's metadata: with several, their order would change from run to run.
_KEY = "lorafx_patch"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Change:
    """What a patch changes in one tensor.

    Attributes:
        names: its names in the checkpoint; several when it is tied
        shape: its shape
        indices: ascending flat positions of the changed weights, (changed,), int32 or int64
        values: the new weights there, (changed,), in the tensor's dtype
        old: the old ones
        before: sha256 of the whole tensor's bytes without the patch
        after: the same with the patch
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    indices: Tensor
    values: Tensor
    old: Tensor
    before: str
    after: str

    @property
    def name(self) -> str:
        """The tensor's first name."""
        return self.names[0]

    def to_json(self) -> dict[str, Any]:
        """What ``lorafx patch inspect`` shows."""
        size, largest = math.prod(self.shape), float((self.values.double() - self.old.double()).abs().max())
        return {
            "names": list(self.names),
            "dtype": dtype_name(self.values.dtype),
            "shape": list(self.shape),
            "changed": len(self.indices),
            "share": len(self.indices) / size,
            "largest_change": largest if math.isfinite(largest) else None,
            "before": self.before,
            "after": self.after,
        }

    def check(self, current: Tensor, where: str, *, undo: bool = False) -> None:
        """ArtifactError unless ``current`` is the tensor this change (or, with ``undo``, its reversal) is for."""
        if current.dtype != self.values.dtype or tuple(current.shape) != self.shape:
            found = f"{dtype_name(current.dtype)} {tuple(current.shape)}"
            expected = f"{dtype_name(self.values.dtype)} {self.shape}"
            raise ArtifactError(f"{where}: wrong base: {self.name} is {found}, the patch is for {expected}")
        digest, expected, other = tensor_hash(current), self.before, self.after
        if undo:
            expected, other = other, expected
        if digest == other:
            state = "is not applied here, so there is nothing to revert" if undo else "is applied here already"
            raise ArtifactError(f"{where}: the patch {state} ({self.name} shows it)")
        if digest != expected:
            raise ArtifactError(
                f"{where}: wrong base: {self.name} is not the tensor the patch was made for (its sha256 differs); "
                "use the checkpoint it was made from, and take later patches off first"
            )

    def exchanged(self, current: Tensor, *, undo: bool = False) -> Tensor:
        """A copy of the checked tensor ``current`` with the new weights (the old ones with ``undo``)."""
        result = current.detach().cpu().contiguous().clone()
        # As integers, so that NaN payloads and signed zeros stay as they are.
        _bits(result)[self.indices.long()] = _bits(self.old if undo else self.values)
        if tensor_hash(result) != (self.before if undo else self.after):
            raise ArtifactError(f"the patch is corrupted: {self.name} does not become what it should; make it again")
        return result


@dataclass(frozen=True)
class Patch:
    """The weights an edit changed, one :class:`Change` for each tensor; ``about`` holds notes of its maker (JSON
    values)."""

    changes: tuple[Change, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def changed(self) -> int:
        """How many weights it changes; tied ones count once."""
        return sum(len(change.indices) for change in self.changes)

    def to_json(self) -> dict[str, Any]:
        """What ``lorafx patch inspect`` shows."""
        return {"changed": self.changed, "about": dict(self.about), "tensors": [c.to_json() for c in self.changes]}

    def noting(self, **about: Any) -> Patch:
        """The same patch with more notes."""
        return dataclasses.replace(self, about={**self.about, **about})

    # ---- files

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write the patch as one file that appears whole or not at all. Equal patches give equal bytes.

        UsageError when ``path`` exists (unless ``overwrite``), ArtifactError when it cannot be written.
        """
        file = Path(path)
        if file.exists() and not overwrite:
            raise UsageError(f"{file}: exists already; choose another file, or overwrite it (--overwrite)")
        tensors, entries = {}, []
        for change in self.changes:
            entry = {"names": change.names, "shape": change.shape, "before": change.before, "after": change.after}
            entries.append({**entry, "dtype": dtype_name(change.old.dtype), "old": tensor_hash(change.old)})
            stored = {"indices": change.indices, "values": change.values, "old": change.old}
            tensors.update({f"{change.name}.{part}": value for part, value in stored.items()})
        record = {"format": FORMAT, "about": dict(self.about), "tensors": entries}
        write_whole(file, save(tensors, metadata={_KEY: json.dumps(record, ensure_ascii=False)}))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Patch:
        """Read a patch from its file, or from a folder that holds it as ``patch.safetensors``.

        ArtifactError when there is no file, or it is not a patch, of a newer format, or corrupted.
        """
        file = Path(path)
        if file.is_dir():
            if (file / "lorafx.json").is_file():
                read_manifest(file)
            file = file / PATCH
        if not file.is_file():
            raise ArtifactError(f"{file}: no such patch")
        entries = check_safetensors(file)
        try:
            with safe_open(file, framework="pt") as stored:
                text = (stored.metadata() or {}).get(_KEY)
                if text is None:
                    raise ArtifactError(f"{file}: a safetensors file, but no patch; `lorafx edit` writes patches")
                record = json.loads(text)
                if record["format"] > FORMAT:
                    raise ArtifactError(f"{file}: format {record['format']}, newer than this lorafx; upgrade lorafx")
                changes = tuple(_read_change(stored, entry) for entry in record["tensors"])
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):
            raise ArtifactError(f"{file}: corrupted patch; make it again") from None
        if len(entries) != 3 * len(changes):
            raise ArtifactError(f"{file}: corrupted patch: it holds tensors it does not speak of; make it again")
        return cls(changes, record["about"])

    # ---- programs

    def apply_to(self, program: Program) -> Program:
        """A new program with the patched weights; ``program`` is not changed, unpatched tensors are shared.

        Like a folded program it can be run, rewritten and exported, not saved as a run: runs refer to their base.

        Raises:
            ArtifactError: the program's weights are not those that the patch is for, or are already patched
        """
        return self._exchange(program, undo=False)

    def remove_from(self, program: Program) -> Program:
        """A new program with the weights as they were before the patch. ArtifactError when it is not applied."""
        return self._exchange(program, undo=True)

    def _exchange(self, program: Program, undo: bool) -> Program:
        result = program.copy()
        for change in self.changes:
            name = program_name(program, change.names)
            current = get_tensor(result.root, name)
            change.check(current, program.name, undo=undo)
            value = change.exchanged(current, undo=undo).to(current.device)
            fresh = nn.Parameter(value, current.requires_grad) if isinstance(current, nn.Parameter) else value
            for alias, tensor in list(named_tensors(result.root)):
                if tensor is current:
                    put_tensor(result.root, alias, fresh, persistent(result.root, alias))
        # An export is compared with what the program computes now, not with what it computed before the patch.
        return dataclasses.replace(result, origin=result)


def program_name(program: Program, names: tuple[str, ...]) -> str:
    """The program's name for the tensor that its checkpoint stores under one of ``names``.

    Checkpoints of bare models lack the prefix of the base model (``transformer.`` in GPT-2), as transformers allows.
    ArtifactError when the program has no such tensor.
    """
    prefix = getattr(program.source.model, "base_model_prefix", "")
    for name in [*names, *(f"{prefix}.{name}" for name in names)]:
        if has_tensor(program.root, name):
            return name
    raise ArtifactError(f"{program.name} has no tensor {names[0]}: the patch is for another model")


# ---- making


def make(base: Mapping[str, Tensor], edited: Mapping[str, Tensor]) -> Patch:
    """The patch that turns the tensors ``base`` into ``edited``: every weight whose bits differ, NaNs and -0 included.

    Args:
        base: tensors by name; two names of one storage (tied weights) are patched as one
        edited: the same names, shapes and dtypes

    Raises:
        UsageError: the two do not hold the same tensors, or hold no values (meta device)
    """
    for name in sorted(base.keys() ^ edited.keys()):
        raise UsageError(f"no patch between these: {name} is in one of the two only")
    groups: dict[Any, list[str]] = {}
    for name in base:
        groups.setdefault((_place(name, base[name]), _place(name, edited[name])), []).append(name)
    changes = [_difference(tuple(names), base[names[0]], edited[names[0]]) for names in groups.values()]
    return Patch(tuple(change for change in changes if change is not None))


def _difference(names: tuple[str, ...], base: Tensor, edited: Tensor) -> Change | None:
    if base.dtype != edited.dtype or base.shape != edited.shape:
        kinds = [f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}" for tensor in (base, edited)]
        raise UsageError(f"no patch between these: {names[0]} is {kinds[0]} in one, {kinds[1]} in the other")
    old, new = (tensor.detach().cpu().contiguous().reshape(-1) for tensor in (base, edited))
    indices = (_bits(old) != _bits(new)).nonzero().reshape(-1)
    if not len(indices):
        return None
    narrow = indices.to(torch.int32) if old.numel() <= torch.iinfo(torch.int32).max else indices
    shape = tuple(base.shape)
    return Change(names, shape, narrow, new[indices], old[indices], tensor_hash(old), tensor_hash(new))


def _place(name: str, value: Tensor) -> Any:
    if value.is_meta:
        raise UsageError(f"no patch between these: {name} is on the meta device and has no values")
    return (value.data_ptr(), value.shape, value.stride()) if value.numel() else name


# ---- parts


def _bits(value: Tensor) -> Tensor:
    """A contiguous tensor's elements as integers of their size; a flat view."""
    return value.reshape(-1).view(_INTEGERS[value.element_size()])


def _read_change(stored: Any, entry: Mapping[str, Any]) -> Change:
    """One change of an open file; ValueError when it does not fit together."""
    names, shape = tuple(entry["names"]), tuple(entry["shape"])
    indices, values, old = (stored.get_tensor(f"{names[0]}.{part}") for part in ("indices", "values", "old"))
    places = indices.long()
    whole = (
        {indices.shape, values.shape, old.shape} == {(len(places),)}
        and len(places) > 0
        and bool((places.diff() > 0).all())
        and int(places[0]) >= 0
        and int(places[-1]) < math.prod(shape)
        and {dtype_name(values.dtype), dtype_name(old.dtype)} == {entry["dtype"]}
        and tensor_hash(old) == entry["old"]
    )
    if not whole:
        raise ValueError(names[0])
    return Change(names, shape, indices, values, old, str(entry["before"]), str(entry["after"]))
