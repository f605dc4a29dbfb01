"""Slots: the inputs of an ONNX model that take an adapter at run time, and what its file says about them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import ArtifactError
from ..graph.program import Program
from ..graph.tree import named_tensors, tensor_hash

#: Where the metadata of a model's file has them.
SLOTS = "lorafx_slots"
ADAPTER = "adapter.onnx_adapter"
_MODELS = ("model.onnx", "onnx/model.onnx")


@dataclass(frozen=True)
class Pair:
    """The slot of one linear weight: inputs ``a`` (in, rank) and ``b`` (rank, out), of rank 0 unless given."""

    a: str
    b: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Slots:
    """The slots of a model.

    Attributes:
        base: identifies its base, see :func:`fingerprint`
        pairs: by the module's path
        tensors: inputs that stand for whole tensors of the base, by the tensor's name; they have the base's values
            unless given, or none at all (NaN) where the base had none
        transposed: those of ``tensors`` that the model holds transposed
        dtype: of all of them
    """

    base: str
    pairs: Mapping[str, Pair]
    tensors: Mapping[str, str]
    transposed: tuple[str, ...] = ()
    dtype: str = "float32"

    def to_json(self) -> str:
        """As metadata."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def number(self) -> int:
        """The base as the version of a model, which adapter files name: 31 bits."""
        return int(self.base[:8], 16) >> 1


def fingerprint(program: Program) -> str:
    """Identifies the base of a program, whatever was inserted or trained: a hash of its tensors, except those that no
    file holds."""
    base = program.captured or program
    held = ((n, v) for n, v in named_tensors(base.root) if base.roles.get(n) not in ("constant", "unread"))
    found = sorted((name, tensor_hash(value)) for name, value in held if name not in base.source.drawn)
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def model_file(folder: Path) -> Path:
    """The model in a folder; ArtifactError when there is none."""
    file = next((folder / name for name in _MODELS if (folder / name).is_file()), None)
    if file is None:
        raise ArtifactError(f"{folder}: no ONNX model; give the folder that `--adapters slots` wrote")
    return file


def read_slots(folder: Path) -> Slots:
    """The slots of the model in a folder; ArtifactError when it has none."""
    import onnx

    file = model_file(folder)
    try:
        properties = onnx.load(file, load_external_data=False).metadata_props
    except Exception as error:  # the parser of the format has classes of its own
        raise ArtifactError(f"{file}: not an ONNX model ({type(error).__name__}); export it again") from None
    found = next((entry.value for entry in properties if entry.key == SLOTS), None)
    if found is None:
        raise ArtifactError(f"{file}: has no slots for adapters; export the base with --adapters slots")
    data = json.loads(found)
    pairs = {module: Pair(**pair) for module, pair in data["pairs"].items()}
    return Slots(data["base"], pairs, data["tensors"], tuple(data["transposed"]), data["dtype"])
