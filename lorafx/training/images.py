"""Image classification: a folder with a folder of images for each class, or a table with a column of images.

Every image is opened before training begins, decoded when its turn comes, and turned into pixels by the checkpoint's
own image processor.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import default_data_collator

from ..errors import ArtifactError, UsageError, first_line
from ..files.table import Table, short, table_of
from ..models.tasks import loss_type
from .collating import Collator
from .labels import Classes
from .rows import Prepared

if TYPE_CHECKING:
    from ..graph.program import Program
    from ..recipes.options import TrainOptions

#: The input that takes images.
PIXELS = "pixel_values"


def is_of_images(program: Program) -> bool:
    """Whether ``program`` learns the classes of images."""
    return loss_type(program.source.model) == "ForImageClassification" and list(program.signature.inputs) == [PIXELS]


def find_processor(folder: Path | None, *, trust_remote_code: bool = False) -> Any:
    """The image processor of a checkpoint folder, None when it has none. ArtifactError when it cannot be opened."""
    if folder is None or not (folder / "preprocessor_config.json").is_file():
        return None
    from transformers import AutoImageProcessor

    try:
        # Pillow's: what training saw must not depend on whether torchvision is there.
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ArtifactError(f"{folder}: its image processor cannot be opened: {first_line(error)}") from error


@dataclass(frozen=True)
class Images(Dataset[dict[str, Any]]):
    """Rows of one image each, read on access.

    Attributes:
        table: where they stand, for messages
        sources: files, or Pillow images
        labels: the number of each one's class
        processor: turns an image into pixels
        mode: what Pillow calls the colours that the model takes
    """

    table: Table
    sources: Sequence[Any]
    labels: Sequence[int]
    processor: Any
    mode: str

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {PIXELS: self.pixels(index), "labels": self.labels[index]}

    def pixels(self, row: int) -> Tensor:
        """The pixels of one image, (channels, height, width). ArtifactError when it cannot be read."""
        with _opened(self.table, row, self.sources[row]) as opened:
            image = opened.convert(self.mode)
        try:
            return torch.as_tensor(self.processor(images=image, return_tensors="pt")[PIXELS][0])
        except (ValueError, TypeError) as error:  # a processor for other colours than the model's
            raise UsageError(f"the image processor takes no image of mode {self.mode}: {first_line(error)}") from error


def prepare_images(
    data: Any, program: Program, processor: Any, options: TrainOptions, collator: Any, like: Prepared | None
) -> Prepared:
    """Rows of images for ``program``.

    Raises:
        ArtifactError: a folder or a table that cannot be used, or an image that is missing or cannot be read
        UsageError: no image processor, one that makes other sizes than the model was captured with, or no Pillow
    """
    if processor is None:
        raise UsageError(f"{program.name} was captured without an image processor beside it; pass tokenizer=processor")
    label = options.label or "label"
    table = _of_folder(Path(data), options.text or "image", label) if _is_folder(data) else table_of(data)
    if not len(table):
        raise ArtifactError(f"{table.name}: no rows")
    home = Path(data).parent if isinstance(data, (str, PathLike)) and not _is_folder(data) else Path()
    sources = [_source(value, home) for value in table.column(options.text or "image")]
    for row, source in enumerate(sources):
        with _opened(table, row, source):
            pass
    names = None if like is None else like.names
    numbers, names = Classes(table, label, program.config, names, like is not None).of_rows()
    taken = program.example[PIXELS].shape[1:]
    rows = Images(table, sources, numbers, processor, "L" if taken[0] == 1 else "RGB")
    made = rows.pixels(0).shape
    if made != taken:
        raise UsageError(
            f"the image processor makes {_size(made)} pixels, but {program.name} was captured with {_size(taken)}; "
            "set its size to the model's in preprocessor_config.json"
        )
    return Prepared(rows, collator or Collator(default_data_collator), names)


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _is_folder(data: Any) -> bool:
    return isinstance(data, (str, PathLike)) and Path(data).is_dir()


def _of_folder(folder: Path, column: str, label: str) -> Table:
    """A folder of folders, each named after the class of the images in it."""
    files = [file for inner in sorted(folder.iterdir()) if inner.is_dir() for file in sorted(inner.rglob("*"))]
    files = [file for file in files if file.is_file() and not file.name.startswith(".")]
    if not files:
        raise ArtifactError(f"{folder}: no images; put those of each class into a folder in it called like the class")
    places = [file.relative_to(folder) for file in files]
    columns = {column: [str(file) for file in files], label: [place.parts[0] for place in places]}
    return Table(str(folder), columns, [place.as_posix() for place in places])


def _source(value: Any, home: Path) -> Any:
    """A file by its path, relative to the table's own folder unless absolute; any other value as it is."""
    if isinstance(value, Mapping):  # as datasets keep images that they have not decoded
        value = value.get("bytes") or value.get("path")
    return home / value if isinstance(value, (str, PathLike)) else value


@contextmanager
def _opened(table: Table, row: int, source: Any) -> Iterator[Any]:
    """The image of a row, opened by Pillow, which has read its header alone. ArtifactError when it is missing or
    broken."""
    try:
        from PIL import Image
    except ImportError:
        raise UsageError("reading images needs Pillow; pip install 'lorafx[images]'") from None
    if isinstance(source, Image.Image):
        yield source  # for its owner to close
        return
    if isinstance(source, Path) and not source.is_file():
        raise table.error(row, f"{source}: no such image")
    if not isinstance(source, (Path, bytes)):
        raise table.error(row, f"{short(source)} is neither an image nor the path of one")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            yield image
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for a file that is broken
        what = source if isinstance(source, Path) else "its image"
        raise table.error(row, f"{what} cannot be read ({first_line(error)}); repair or remove it") from None
