"""The files of a checkpoint folder besides config and weights, and which of them still hold for a rewritten model.

There is no complete list of the files of tokenizers, processors, sentence encoders and model code. So everything is
copied except what is named here: weights, records of how the model was made, and descriptions of another model.
"""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, UsageError, first_line
from ..files.folder import MANIFEST
from ..models.sentences import MODULES, SentenceEncoder, pooling_of, write_modules
from ..reporting.report import PAGE, REPORT

if TYPE_CHECKING:
    from ..graph.program import Program

GENERATION = "generation_config.json"

#: Weights, in the formats they come in, and the indexes of their parts.
_WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.pt2", "*.ckpt", "*.ckpt.*", "*.h5", "*.msgpack", "*.npz", "*.ot"),
    *("*.gguf", "*.onnx", "*.onnx_data", "*.onnx.data", "*.tflite", "*.mlmodel", "*.pkl", "*.pdparams"),
    *("*.safetensors.index.json", "*.bin.index.json", "*.h5.index.json", "*.msgpack.index.json"),
)
#: What was measured or proven of the very weights beside it: scores, what lorafx wrote, the name of an ONNX graph.
_OF_ITS_WEIGHTS = (
    "*results.json",
    *(MANIFEST, "certificate.json", "recipe.toml", REPORT, PAGE, "blocks.svg", "export.json", "genai_config.json"),
)
#: About the base alone: its card and results, how it was trained, an adapter of it, how its weights were quantised.
_OF_THE_BASE = (
    *("README*", "MODEL_CARD*", "model_card*", "trainer_state.json", "training_args*", "events.out.*", "*.log"),
    *("adapter_config.json", "quant*_config.json", "hf_quant_config.json"),
    *_OF_ITS_WEIGHTS,
)
#: What sentence-transformers says about the model in the folder: another head makes it another model.
_OF_THE_ENCODER = (MODULES, "sentence_*_config.json", "config_sentence_transformers.json")
#: A folder in the folder that holds one of these, and no weights, belongs to the tokenizer or the processor.
_OF_A_PROCESSOR = ("tokenizer*", "vocab.*", "*.model", "*.jinja", "*processor_config.json", "*preprocessor*.json")


def companions(folder: str | PathLike[str]) -> list[str]:
    """The paths below a checkpoint folder, with ``/``, that are copied: files, and empty folders."""
    top = Path(folder)
    chosen = [file.name for file in top.iterdir() if file.is_file() and _goes_along(file.name)]
    return sorted(chosen + inner_companions(top))


def inner_companions(folder: str | PathLike[str]) -> list[str]:
    """Those of :func:`companions` that lie in folders of their own."""
    top = Path(folder)
    modules = _module_folders(top)
    wanted = [inner for inner in top.iterdir() if inner.is_dir() and (inner in modules or _of_a_processor(inner))]
    # A module may lie deeper than that.
    wanted += [module for module in modules if module.parent != top]
    found = {entry for inner in wanted for entry in (inner, *inner.rglob("*")) if _is_leaf(entry)}
    return sorted(entry.relative_to(top).as_posix() for entry in found)


def is_weights(name: str) -> bool:
    """Whether a file has the name of a weight file, in any format."""
    return _matches(name, _WEIGHTS)


def is_of_its_weights(name: str) -> bool:
    """Whether a file tells what was measured or proven of the weights beside it, so that it is untrue of any others."""
    return _matches(name, _OF_ITS_WEIGHTS)


def copy_companions(program: Program, folder: Path) -> list[str]:
    """Copy companion files from the checkpoint of ``program`` to a folder written for it; returns what was copied.

    Files that the folder already has are kept, except the generation settings, which there come from the config alone.

    A model that came from memory has generation settings only.

    Raises:
        ArtifactError: the checkpoint is gone
        UsageError: a model from memory whose generation settings contradict each other
    """
    if program.source.path is None:
        write_modules(program.source.model, folder)
        return _write_generation(program, folder)
    base = Path(program.source.path)
    if not (base / "config.json").is_file():
        raise ArtifactError(f"{base}: the checkpoint it was captured from is gone; put it back, its files go along")
    left = _not_of(program, base)
    names = [name for name in companions(base) if not any(_under(name, other) for other in left)]
    copied = [name for name in names if name == GENERATION or not (folder / name).exists()]
    for name in copied:
        copy_entry(base / name, folder / name)
    write_modules(program.source.model, folder)
    return copied


def copy_entry(source: Path, target: Path) -> None:
    """Copy a file, or make an empty folder, with the folders above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        target.mkdir(exist_ok=True)
    else:
        shutil.copyfile(source, target)


def _write_generation(program: Program, folder: Path) -> list[str]:
    if not _generates(program):
        return []
    settings: Any = program.source.model.generation_config
    try:
        settings.save_pretrained(folder)
    except ValueError as error:
        raise UsageError(f"{program.name}: its generation_config cannot be written: {first_line(error)}") from None
    return [GENERATION]


def _generates(program: Program) -> bool:
    model = program.source.model
    return bool(getattr(model, "can_generate", lambda: False)()) and hasattr(model, "generation_config")


def _not_of(program: Program, base: Path) -> list[str]:
    """Companions of the base that do not hold for this program: of a head that it no longer has, or of generation."""
    left = [] if _generates(program) else [GENERATION]
    named = json.loads((base / "config.json").read_text(encoding="utf-8")).get("architectures") or [program.name]
    # A folder that says how its encoder is pooled would be opened as a sentence encoder.
    bare = not isinstance(program.source.model, SentenceEncoder) and pooling_of(base, asked=False) is not None
    if program.name not in named or bare:
        left += [name for name in companions(base) if _matches(name, _OF_THE_ENCODER)]
        left += [module.relative_to(base).as_posix() for module in _module_folders(base)]
    return left


def _goes_along(name: str) -> bool:
    hidden_or_own = name.startswith(".") or name == "config.json"
    return not (hidden_or_own or is_weights(name) or _matches(name, _OF_THE_BASE))


def _module_folders(top: Path) -> set[Path]:
    """The folders of sentence-transformers' modules, with their weights: lorafx does not rewrite them."""
    try:
        entries = json.loads((top / MODULES).read_text(encoding="utf-8"))
        paths = [PurePosixPath(entry["path"]) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError):  # no such file, or one that names nothing
        return set()
    inside = [path for path in paths if path.parts and not path.is_absolute() and ".." not in path.parts]
    return {top / path for path in inside if (top / path).is_dir()}


def _of_a_processor(inner: Path) -> bool:
    if inner.name.startswith(".") or (inner / MANIFEST).exists():
        return False
    names = [entry.name for entry in inner.iterdir() if entry.is_file()]
    return any(_matches(name, _OF_A_PROCESSOR) for name in names) and not any(
        is_weights(entry.name) for entry in inner.rglob("*")
    )


def _is_leaf(entry: Path) -> bool:
    return entry.is_file() or (entry.is_dir() and not any(entry.iterdir()))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _under(name: str, other: str) -> bool:
    return name == other or name.startswith(other + "/")
