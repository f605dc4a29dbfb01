"""Opening a checkpoint folder: which class, are the files whole, what did it not hold."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..errors import ArtifactError, UsageError, first_line
from ..files.folder import LFS_START, MANIFEST, find_manifest
from ..files.whole import failure_of, said
from ..ranges import MOST_LABELS, Range
from .layered import own_configs
from .quantized import Quantization, read_in_full
from .sentences import pooled
from .tasks import SETTINGS, auto_class, head_modules

_log = logging.getLogger(__name__)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_config(path: Path) -> dict[str, Any]:
    """The folder's ``config.json``; ArtifactError when it is missing or no JSON object."""
    if not path.is_dir():
        remedy = "give one with config.json and weights, or org/name on Hugging Face's hub"
        raise ArtifactError(f"{path}: no such checkpoint folder; {remedy}")
    file = path / "config.json"
    if not file.is_file():
        raise ArtifactError(f"{path}: no config.json; is this a transformers checkpoint folder?")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{file}: not valid JSON ({error}); fetch the checkpoint again") from None
    if not isinstance(config, dict):
        raise ArtifactError(f"{file}: expected a JSON object; fetch the checkpoint again")
    return config


def check_safetensors(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, after checking that the file is whole. ArtifactError says what is wrong."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if (start + stream.read(64)).startswith(LFS_START):
            raise ArtifactError(f"{file}: a git-lfs pointer, not the weights; run `git lfs pull` in that folder")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length < 2 or length > size - 8:
            raise ArtifactError(f"{file}: not a whole safetensors file ({size} bytes); fetch it again")
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise ArtifactError(f"{file}: corrupted safetensors header; fetch it again") from None
    if end != size:
        raise ArtifactError(f"{file}: truncated or padded, {size} bytes where its header says {end}; fetch it again")
    return entries


def weight_files(path: Path, *, allow_pickle: bool = False) -> list[Path]:
    """The folder's weight files, each checked to be whole. Empty when there are none."""
    files = sorted(path.glob("*.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return _indexed(index)
    for file in files:
        check_safetensors(file)
    if files:
        return files
    pickles = sorted([*path.glob("pytorch_model*.bin"), *path.glob("model*.bin")])
    if pickles and not allow_pickle:
        raise ArtifactError(f"{pickles[0]}: pickled weights; pass --allow-pickle to load them (weights only)")
    return pickles


def _indexed(index: Path) -> list[Path]:
    """The files that an index names; each has to be whole, and to hold the tensors that the index looks for in it."""
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: index.parent / name for name in sorted(set(places.values()))}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{index}: broken index of weight files; fetch it again") from None
    missing = next((name for name, file in files.items() if not file.is_file()), None)
    if missing is not None:
        raise ArtifactError(f"{index.parent}: {missing} is named in {index.name} but missing; fetch it again")
    held = {name: check_safetensors(file) for name, file in files.items()}
    for key, name in places.items():
        if key not in held[name]:
            raise ArtifactError(f"{index}: {key} is said to be in {name}, which does not hold it; fetch both again")
    owners: dict[str, str] = {}
    for name, entries in held.items():
        twice = next((key for key in entries if key in owners), None)
        if twice is not None:
            raise ArtifactError(
                f"{index.parent}: {owners[twice]} and {name} both hold {twice}; fetch the checkpoint again"
            )
        owners |= dict.fromkeys(entries, name)
    return list(files.values())


def open_model(
    path: Path, task: str | None, options: Mapping[str, Any], *, meta: bool = False, allow_pickle: bool = False
) -> tuple[nn.Module, frozenset[str]]:
    """The eager model of a checkpoint folder, and the names of parameters the folder did not hold.

    Args:
        task: a key of :data:`lorafx.models.tasks.TASKS`; None opens the class named in the config
        options: passed to transformers (``num_labels``, ``dtype``, ``trust_remote_code``, …)
        meta: build it on the meta device from the config alone; no weight is read
        allow_pickle: whether weights in ``.bin`` files may be read
    """
    check_kind(path)
    config = read_config(path)
    cls = auto_class(task) if task is not None else _named_class(path, config)
    # Said either way: left open, transformers asks at the terminal.
    options = {"trust_remote_code": False, **SETTINGS.get(task, {}), **options}
    allowed = bool(options.get("ignore_mismatched_sizes"))
    check_dtype(options.get("dtype"), meta=meta)
    _check_labels(options.get("num_labels"))
    quantization = Quantization.of(config)
    if quantization is not None:
        dtype, reading = options.get("dtype"), quantization.options(path)
        options |= {"dtype": torch.float32 if dtype in (None, "auto") else dtype, **({} if meta else reading)}
    try:
        if meta:
            model = _build_on_meta(cls, path, options)
            if quantization is None:
                _misfits(path, model, {"mismatched_keys": _head_misfits(path, model)}, allowed=allowed)
            return pooled(model, path, task), frozenset()
        files = weight_files(path, allow_pickle=allow_pickle)
        if not files:
            raise ArtifactError(f"{path}: no weights (*.safetensors); fetch the checkpoint, or capture with meta=True")
        model, info = read_in_full(cls, path, files, options, quantization)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        _check_trust(path, error)
        raise _unopened(path, "transformers cannot open it", error) from error
    except TypeError as error:
        odd = next((name for name in options if f"'{name}'" in str(error)), None)
        if odd is None:
            raise
        raise UsageError(f"{path}: transformers takes no {odd!r} for this model; leave that option out") from error
    misfits = _misfits(path, model, info, allowed=allowed)
    chosen = task is not None or bool(config.get("architectures"))
    masks = _masks(path) if quantization is None else ()  # whole numbers may be weights there
    unread = sorted(key for key in info["unexpected_keys"] if key not in masks)
    _check_unread(path, model, unread, chosen=chosen)
    return pooled(model, path, task), frozenset(info["missing_keys"]) | misfits


def _misfits(path: Path, model: nn.Module, info: Mapping[str, Any], *, allowed: bool) -> frozenset[str]:
    """The weights that the files hold in another shape, which the model therefore initialises; ArtifactError unless
    that was asked for."""
    found = sorted(info["mismatched_keys"])
    if found and not allowed:
        key, theirs, ours = found[0]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ArtifactError(
            f"{path}: its files hold {key} as {tuple(theirs)}, where a {type(model).__name__} of this config and "
            f"these options has {tuple(ours)}{more}; correct config.json or the option, or let the head start afresh: "
            "ignore_mismatched_sizes = true in Python and under [model] of a recipe, --ignore-mismatched-sizes"
        )
    return frozenset(key for key, *_ in found)


def _head_misfits(path: Path, model: nn.Module) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """What the files hold of the model's head in another shape, by their headers alone: names, shapes there and here.

    Other weights may be stored under names or in shapes that transformers converts.
    """
    heads = tuple(f"{module}." for module in head_modules(model))
    own = {name: tuple(value.shape) for name, value in model.state_dict().items() if name.startswith(heads)}
    files = [file for file in weight_files(path, allow_pickle=True) if file.suffix == ".safetensors"] if own else []
    held = {key: tuple(entry["shape"]) for file in files for key, entry in check_safetensors(file).items()}
    return [(name, held[name], shape) for name, shape in own.items() if held.get(name, shape) != shape]


def _masks(path: Path) -> set[str]:
    """What safetensors files hold besides weights: the masks and single numbers that older classes kept there."""
    files = [file for file in weight_files(path, allow_pickle=True) if file.suffix == ".safetensors"]
    entries = {name: entry for file in files for name, entry in check_safetensors(file).items()}
    return {name for name, entry in entries.items() if not entry["shape"] or "F" not in entry["dtype"]}


def _check_unread(path: Path, model: nn.Module, unread: list[str], *, chosen: bool) -> None:
    """What a checkpoint holds and its model does not take: the head of another task at most, and that is logged.

    Raises ArtifactError when a weight belongs within what the model has (blocks that the config does not count, an
    adapter's matrices), or when no class was named or asked for, so that nobody chose to leave a head out.
    """
    if not unread:
        return
    name = type(model).__name__
    inside = next((key for key in unread if not _is_another_head(model, key)), None)
    if inside is not None:
        raise ArtifactError(
            f"{path}: its files hold {inside}, for which a {name} of this config has no place; correct config.json, or "
            "merge what was added into the checkpoint"
        )
    if not chosen:
        raise ArtifactError(
            f"{path}: config.json names no architecture, and a {name} leaves out {unread[0]}; say which task to "
            "open it for (--task)"
        )
    more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
    _log.warning("%s: %s%s is in its files but not in a %s, and is left out", path, unread[0], more, name)


def _is_another_head(model: nn.Module, key: str) -> bool:
    """Whether a weight is of a part beside the model's own: a child that neither the model nor its base has."""
    base = getattr(model, "base_model", model)
    parts = key.split(".")
    if parts[0] == getattr(model, "base_model_prefix", "") and len(parts) > 1:
        parts = parts[1:]
    return all(getattr(owner, parts[0], None) is None for owner in (model, base))


def _named_class(path: Path, config: Mapping[str, Any]) -> Any:
    """The class that a config names: of transformers, or of the code in its folder by way of an Auto class."""
    import transformers

    names = config.get("architectures") or []
    if not names:
        return transformers.AutoModel
    auto = next((key for key, code in (config.get("auto_map") or {}).items() if _names(code, names[0])), names[0])
    cls = getattr(transformers, auto, None)
    if cls is None:
        raise ArtifactError(f"{path}: this transformers knows no {names[0]}; say which task to open it for (--task)")
    return cls


def _names(code: Any, name: str) -> bool:
    return isinstance(code, str) and code.rpartition(".")[2] == name


def open_tokenizer(path: str | PathLike[str], trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder. ArtifactError: it cannot be opened; UsageError: its code is not trusted."""
    from transformers import AutoTokenizer

    try:
        with own_configs():  # a tokenizer may look into the config
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError) as error:
        _check_trust(path, error)
        raise _unopened(path, "its tokenizer cannot be opened", error) from error


def _unopened(path: str | PathLike[str], what: str, error: Exception) -> ArtifactError:
    """What to say of an error of transformers: of a disk's, which file it is about and what to do."""
    failure = failure_of(error)
    if failure is not None and failure.filename is not None:
        return ArtifactError(f"{failure.filename}: cannot be used: {said(failure)}")
    return ArtifactError(f"{path}: {what}: {first_line(error)}")


def _check_trust(path: str | PathLike[str], error: Exception) -> None:
    if "trust_remote_code" in str(error):
        remedy = "if you trust it, pass trust_remote_code (--trust-remote-code)"
        raise UsageError(f"{path}: it runs code of its own; {remedy}") from None


def check_kind(path: Path) -> None:
    """Refuse a folder that is not a checkpoint, even where transformers would open it (it opens an adapter's base).

    Raises:
        UsageError: lorafx wrote it as something else
        ArtifactError: a PEFT adapter
    """
    manifest = find_manifest(path) if (path / MANIFEST).is_file() else None
    if manifest is not None and manifest.kind != "hf":
        raise UsageError(
            f"{path}: a folder of kind {manifest.kind}, not a checkpoint; give the checkpoint it came from"
        )
    file = path / "adapter_config.json"
    if file.is_file():
        try:
            base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (ValueError, AttributeError):
            base = None
        raise ArtifactError(
            f"{path}: a PEFT adapter{f' of {base}' if base else ''}, not a checkpoint; give its base and "
            f"--adapter {path} (adapter=… in Python), or merge it first (lorafx fold BASE --adapter {path} -o MERGED)"
        )


def check_dtype(asked: Any, *, meta: bool) -> None:
    """UsageError for a dtype that no model is opened in."""
    found = getattr(torch, asked, None) if isinstance(asked, str) else asked
    by_part = isinstance(asked, Mapping) and not meta
    if asked not in (None, "auto") and not by_part and found not in _DTYPES:
        known = ", ".join(str(kind).removeprefix("torch.") for kind in _DTYPES)
        raise UsageError(f"dtype = {asked!r} is not one that a model is opened in: {known}, or auto for its config's")


def _check_labels(asked: Any) -> None:
    """UsageError for a number of classes that no head has: transformers would make names for all of them."""
    flaw = None if asked is None else Range(least=1, most=MOST_LABELS, whole=True).flaw(asked)
    if flaw is not None:
        raise UsageError(f"num_labels = {asked!r}, {flaw} (size of the classification head)")


def _build_on_meta(cls: Any, path: Path, options: dict[str, Any]) -> nn.Module:
    import transformers
    from transformers.initialization import no_init_weights

    dtype = options.pop("dtype", None)
    options.pop("ignore_mismatched_sizes", None)  # nothing is read that could not fit
    with own_configs():
        config, unknown = transformers.AutoConfig.from_pretrained(path, return_unused_kwargs=True, **options)
    odd = next((name for name in unknown if name != "trust_remote_code"), None)
    if odd is not None:
        raise UsageError(f"{path}: transformers takes no {odd!r} for this model; leave that option out")
    dtype = getattr(config, "dtype", None) if dtype in (None, "auto") else dtype
    default = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    previous = torch.get_default_dtype()
    torch.set_default_dtype(default or previous)
    try:
        with own_configs(), torch.device("meta"), no_init_weights():
            trusted = {"trust_remote_code": options["trust_remote_code"]}
            model = cls.from_config(config, **trusted) if cls.__name__.startswith("Auto") else cls(config)
            model.tie_weights()  # left out with the initial values, which meta tensors have not
            vars(model.config).pop("quantization_config", None)  # its weights are taken in full
            return model
    finally:
        torch.set_default_dtype(previous)
