"""What lies in a folder: names and sizes, for links and for how much a model weighs on disk."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

#: The files that hold numbers, by how their names end; what an ONNX graph keeps beside it, too.
_WEIGHTS = (".onnx", ".onnx.data", ".onnx_data", ".onnx_adapter", ".safetensors", ".bin", ".pt2")
#: Inputs kept for a capture are not weights.
_INPUTS = "example_inputs.safetensors"


@dataclass(frozen=True)
class Contents:
    """The files of a folder by their path below it, with their bytes.

    Attributes:
        files: sorted by path, with ``/`` between the parts; hidden ones are left out
        model: what the path of a file begins with that belongs to the model itself, where a folder holds several
    """

    files: tuple[tuple[str, int], ...] = ()
    model: str = ""

    @classmethod
    def of(cls, folder: str | PathLike[str] | None, model: str = "") -> Contents:
        """What lies in ``folder``; nothing for None."""
        if folder is None:
            return cls()
        top = Path(folder)
        names = sorted(file.relative_to(top).as_posix() for file in top.rglob("*") if file.is_file())
        shown = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
        return cls(tuple((name, (top / name).stat().st_size) for name in shown), model)

    @property
    def weights(self) -> tuple[tuple[str, int], ...]:
        """The files that hold the model's numbers."""
        own = [(name, size) for name, size in self.files if name.startswith(self.model)]
        return tuple((name, size) for name, size in own if name.endswith(_WEIGHTS) and not name.endswith(_INPUTS))

    @property
    def size(self) -> int | None:
        """How many bytes the model's numbers take on disk; None where none are known."""
        return sum(size for _, size in self.weights) or None


def megabytes(size: int) -> str:
    """Bytes as people say them."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
