"""Certificates: what a folder was made from and what was proven about it, as one JSON file that can be checked again.

A folder with a certificate can be moved and copied. What the certificate says about its own files can be checked
anywhere; what it says about base and adapters, where those are available.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ArtifactError, UsageError
from ..files.folder import MANIFEST, FileEntry, find_manifest, found
from ..files.places import found_from, relative_place
from ..files.progress import PASSING
from ..formats.adapter import read_adapter
from ..formats.run import base_record
from ..frontend.adapters import learned_digest
from ..graph.tree import has_tensor, named_tensors
from ..models.hub import local_folder
from ..models.identity import has_identity
from ..public import Program
from ..version import __version__
from .merges import check_merge
from .tensors import COLUMNS, TensorProof

CERTIFICATE = "certificate.json"
#: Certificates of another format are not read.
_FORMAT = 1
#: Files that opening a folder reads, whatever their names: weights, code, configs and vocabularies.
_READ = {".bin", ".data", ".gguf", ".h5", ".jinja", ".json", ".model", ".msgpack", ".onnx", ".onnx_data", ".pt", ".pt2"}
_READ |= {".pth", ".py", ".safetensors", ".txt"}


def write_certificate(
    reference: Program,
    program: Program,
    folder: Path,
    kind: str,
    files: Mapping[str, FileEntry],
    parity: Mapping[str, Any],
    tensors: TensorProof | None,
) -> dict[str, FileEntry]:
    """Write the certificate of an exported folder; the files that it names, as they were read for it.

    Args:
        reference: what ``program`` was folded from
        program: what was written
        folder: where
        kind: in which format
        files: those that were hashed as they were written; all others are read
        parity: which functions were compared, and how closely
        tensors: what was found for each tensor
    """
    import transformers

    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    names = [name for name in names if name not in PASSING]
    entries = {name: files.get(name) or found(folder / name) for name in names}
    record = {
        "format": _FORMAT,
        "versions": {"lorafx": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "kind": kind,
        "base": {"path": _place_of(folder, program.source.path), **base_record(program)},
        "adapters": [
            {"path": _place_of(folder, one["path"]), "name": Path(one["path"]).name}
            | {key: one[key] for key in ("weight", "files")}
            for one in program.source.added
        ],
        "nothing_but_adapters": _alone(reference),
        "passes": [applied.step.pass_name() for applied in program.history],
        "result": {name: {"bytes": entry.size, "sha256": entry.sha256} for name, entry in entries.items()},
        "tensors": _tensors(tensors),
        "removed": list(_removed(program)),
        "functions": dict(parity),
    }
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (folder / CERTIFICATE).write_text(text, encoding="utf-8")
    return entries


def _alone(reference: Program) -> bool:
    """Whether a program is its base with adapters as their files hold them: nothing was inserted or trained since."""
    added = reference.source.added
    return bool(added) and all(one.get("learned") == learned_digest(reference) for one in added)


def _place_of(folder: Path, path: str | None) -> str | None:
    return None if path is None else relative_place(folder, path)


def _tensors(proof: TensorProof | None) -> dict[str, Any] | None:
    if proof is None:
        return None
    how = f"the operators that each stands for, in fp64, in {COLUMNS} columns; one rounding is 0.5 of the last place"
    return {
        "compared_with": how,
        "places": proof.largest,
        "folded": [
            {"name": one.output, "made_of": list(proof.made_of[one.output]), "largest": one.max_abs}
            for one in proof.cases
            if one.output in proof.made_of
        ],
        "unchanged": [one.output for one in proof.cases if one.output not in proof.made_of],
        "compared_with_the_whole_only": list(proof.left),
    }


def _removed(program: Program) -> Iterator[dict[str, Any]]:
    """The base's tensors that became smaller or are gone."""
    if program.captured is None:
        return
    why = {"why": "channels that are zero or that nothing reads (dead-channels): each removal was tried on the example"}
    for name, old in named_tensors(program.captured.root):
        if program.captured.roles.get(name) not in ("base", "head"):
            continue
        new = list(program.tensor(name).shape) if has_tensor(program.root, name) else None
        if new != list(old.shape):
            yield {"name": name, "was": list(old.shape), "is": new, **why}


# ---- checking one again


@dataclass(frozen=True)
class Found:
    """The result of checking a certificate: what holds, what could not be checked, and what does not hold."""

    holds: tuple[str, ...]
    unseen: tuple[str, ...]
    broken: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return not self.broken

    def text(self) -> str:
        """One line each."""
        marks = (("ok", self.holds), ("not looked at", self.unseen), ("BROKEN", self.broken))
        return "\n".join(f"{mark}: {line}" for mark, lines in marks for line in lines)


def check_folder(path: Path, base: Path | None = None, adapters: Sequence[Path] = ()) -> Found:
    """Check the certificate of a folder against its files, and against base and adapters where they are.

    Args:
        path: a folder that :func:`lorafx.export` wrote
        base: where its base is now
        adapters: where its adapters are now, in the order they were put on

    Raises:
        ArtifactError: there is no certificate, or one that cannot be read
        UsageError: more or fewer places of adapters than there are adapters
    """
    record = _read(path)
    holds: list[str] = []
    unseen: list[str] = []
    broken = list(_changed(path, {name: entry["sha256"] for name, entry in record["result"].items()}))
    broken += _added(path, record["result"])
    holds += [] if broken else [f"{len(record['result'])} files of {path} are those that were written"]
    base, adapters = base and local_folder(base), [local_folder(adapter) for adapter in adapters]
    first, others = _origins(record, path, base, adapters)
    there = True
    for one in (first, *others):
        if one.place is None or not one.place.is_dir():
            unseen.append(f"its {one.what} {one.place or one.name} is not here; give its place (--{one.what})")
            there = False
            continue
        changed = list(_changed(one.place, one.files))
        broken += [f"{one.what}: {line}" for line in changed]
        holds += (
            [] if changed else [f"{len(one.files)} files of {one.what} {one.place} are those that it was made from"]
        )
    if there and not broken:
        weights = [float(one["weight"]) for one in record["adapters"]]
        summed = {str(one.place): weight for one, weight in zip(others, weights, strict=True)}
        _check_composition(record, path, first.place, summed, (holds, unseen, broken))
    return Found(tuple(holds), tuple(unseen), tuple(broken))


def _check_composition(
    record: Mapping[str, Any], path: Path, base: Path | None, weights: Mapping[str, float], said: tuple[list[str], ...]
) -> None:
    """Compose every tensor again from base and adapters, if the folder was made of these alone."""
    holds, unseen, broken = said
    if record["kind"] != "hf" or not record["nothing_but_adapters"] or record["removed"]:
        unseen.append("what its tensors are made of: more than a checkpoint and LoRA adapters that files hold")
        return
    try:
        for folder in weights:
            read_adapter(folder)
    except ArtifactError as error:
        unseen.append(f"what its tensors are made of: {error}")
        return
    assert base is not None
    result = check_merge(base, weights, path, task=record["base"]["task"])
    holds += [result.text()] if result.ok else []
    broken += [str(fault) for fault in result.faults]


@dataclass(frozen=True)
class _Origin:
    """An ingredient of a folder, base or adapter: where it is, if known, and its files by hash."""

    what: str
    name: str
    place: Path | None
    files: Mapping[str, str]


def _origins(
    record: Mapping[str, Any], path: Path, base: Path | None, adapters: Sequence[Path]
) -> tuple[_Origin, list[_Origin]]:
    """Base and adapters, at the places given or else at those in the certificate."""
    held = record["adapters"]
    if adapters and len(adapters) != len(held):
        names = ", ".join(_name(one) for one in held) or "none"
        raise UsageError(f"{path}: its adapters are {names}; give the place of each, in this order (--adapter)")
    given = adapters or [None] * len(held)
    first = _Origin("base", _name(record["base"]), base or _place(path, record["base"]), record["base"]["hashes"])
    return first, [
        _Origin("adapter", _name(one), own or _place(path, one), one["files"])
        for own, one in zip(given, held, strict=True)
    ]


def _place(path: Path, record: Mapping[str, Any]) -> Path | None:
    return found_from(path, record["path"]) if isinstance(record["path"], str) else None


def _name(record: Mapping[str, Any]) -> str:
    """The ingredient of that name; older certificates have only its path."""
    return str(record.get("name") or Path(str(record["path"])).name)


def _changed(folder: Path, files: Mapping[str, str]) -> Iterator[str]:
    for name, known in files.items():
        if not (folder / name).is_file():
            yield f"{folder / name} is gone"
        elif not has_identity(folder / name, known):
            yield f"{folder / name} is another file (its sha256 differs)"


def _added(folder: Path, files: Mapping[str, Any]) -> Iterator[str]:
    """Files that were added later and may change the model that opening the folder gives, such as an adapter that
    transformers picks up."""
    for file in sorted(file for file in folder.rglob("*") if file.suffix in _READ and file.is_file()):
        name = file.relative_to(folder).as_posix()
        if name not in files and name not in (CERTIFICATE, MANIFEST) and not name.startswith("."):
            yield f"{file} was put there later, and is read by who opens the folder"


def _read(path: Path) -> dict[str, Any]:
    file = path / CERTIFICATE
    if not file.is_file():
        manifest = find_manifest(path)
        if manifest is not None and manifest.kind == "run":
            raise UsageError(
                f"{path}: a run, which is checked when it is opened; certificates are of what was exported"
            )
        raise ArtifactError(f"{path}: no {CERTIFICATE}; lorafx writes one into every folder that it folds or exports")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["format"] != _FORMAT:
            raise ArtifactError(f"{file}: a certificate of format {record['format']}; this lorafx reads {_FORMAT}")
        shaped = isinstance(record["base"]["hashes"], dict) and isinstance(record["adapters"], list)
        if not shaped or not all("sha256" in entry for entry in record["result"].values()):
            raise ValueError(file)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{file}: broken certificate; write the folder again") from None
    return record
