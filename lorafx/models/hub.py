"""Models by their names on Hugging Face's hub (``org/name``), found as transformers finds them: in the cache, else
fetched into it.

A folder that is there always comes first. Where ``HF_HUB_OFFLINE`` is set, nothing is fetched.
"""

from __future__ import annotations

import os
import re
from os import PathLike
from pathlib import Path

from ..errors import ArtifactError, first_line

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: What a model is opened from. A repository holds much more: other frameworks' weights, exports, training states.
_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.safetensors")
_PICKLED = ("pytorch_model*.bin", "model*.bin", "adapter_model.bin")
#: Folders that hold the same model for others.
_NOT_OURS = ("onnx/*", "openvino/*", "coreml/*", "original/*", "gguf/*")


def local_folder(place: str | PathLike[str], *, allow_pickle: bool = False) -> Path:
    """The folder that ``place`` names: itself, or the one in the hub's cache of the model of this name.

    Args:
        place: a folder, or ``org/name`` where there is no such folder
        allow_pickle: whether weights in ``.bin`` files are fetched too

    Raises:
        ArtifactError: no such folder, and no model of this name in the cache, or on the hub, where it may be used
    """
    path = Path(place)
    name = path.as_posix() if isinstance(place, Path) else os.fspath(place)  # ./org/name is a path
    # Beside a folder that exists, it is a mistyped path, and the hub is not asked about it.
    if path.exists() or path.parent.is_dir() or _NAME.fullmatch(name) is None:
        return path
    from huggingface_hub import snapshot_download

    wanted = [*_FILES, *(_PICKLED if allow_pickle else ())]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=list(_NOT_OURS)))
    except (OSError, ValueError) as error:  # what huggingface_hub raises for the network, the cache and the name
        raise ArtifactError(
            f"{name}: no such folder, and Hugging Face's hub or its cache has no such model ({first_line(error)})"
        ) from None
