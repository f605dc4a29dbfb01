"""Writers for each format, into a folder that does not have its name yet."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..base import passes_of
from ..deferred.programs import resident
from ..errors import UsageError
from ..files.folder import FileEntry
from ..formats.hf import hf_model, refuse_unread
from ..formats.peft import adapter_config, adapter_keys
from ..formats.run import VALUES, base_record, plain_tensor
from ..formats.shards import write_checkpoint
from ..models.layered import own_configs
from ..models.tokenizers import length_limit
from ..public import Program
from ..version import __version__
from .archives import refusing_archives
from .quicker import quicker

_log = logging.getLogger(__name__)


@quicker()
def write_other(
    program: Program,
    folder: Path,
    kind: str,
    provider: str,
    dtype: torch.dtype | None,
    generate: bool,
    slots: Any,
    *,
    joined: bool = True,
) -> Mapping[str, Any]:
    """Write anything but a checkpoint, with slots at targets or an adapter for a folder's; facts of a decoder.

    ``joined`` lets products of weights become part of larger operators, where a provider has such.
    """
    if generate:
        return _write_decoder(program, folder, provider, dtype, slots)
    if kind == "peft":
        _write_adapter(program, folder, dtype)
    elif kind == "onnx-adapter":
        from .slots import write_adapter

        write_adapter(program, Path(slots), folder)
    else:
        _write_exported(program, folder, kind, provider, dtype, slots, joined=joined and slots is None)
    return {}


def write_hf(program: Program, folder: Path, dtype: torch.dtype | None, *, layered: bool) -> dict[str, FileEntry]:
    """Write a checkpoint; its files with what is known of them. UsageError when transformers would not open it, unless
    it is to be a ``layered`` one."""
    model = hf_model(program, dtype)
    if not layered:
        refuse_unread(program, model)
    return write_checkpoint(model, folder)


def _write_adapter(program: Program, folder: Path, dtype: torch.dtype | None) -> None:
    """The two files of a PEFT adapter; UsageError when PEFT cannot compute this program's function."""
    config, reason = adapter_config(program)
    if config is None:
        raise UsageError(f"PEFT cannot hold this program: {reason}")
    keys = adapter_keys(program)
    values = {keys[name]: plain_tensor(value.to(dtype or value.dtype)) for name, value in program.learned().items()}
    save_file(values, folder / VALUES, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_decoder(
    program: Program, folder: Path, provider: str, dtype: torch.dtype | None, slots: Any
) -> dict[str, Any]:
    """Write a decoder with its cache; what the report says of it."""
    from .decoder import decoder, write_decoder
    from .encoder_decoder import encoder_decoder, write_encoder_decoder
    from .late_weights import LostError
    from .slots import add_slots

    if getattr(program.config, "is_encoder_decoder", False):
        both = encoder_decoder(program, provider, dtype)
        write_encoder_decoder(both, program, folder, _record(program))
        return both.facts()
    try:
        made = decoder(program, provider, dtype)
    except LostError as error:
        _log.warning("%s: %s; the weights go into memory", program.name, error)
        made = decoder(resident(program), provider, dtype)
    if slots is not None:
        add_slots(made.graph, program, slots, shared_names=True)
    write_decoder(made, program, folder, _record(program))
    return made.facts()


def _record(program: Program) -> dict[str, str]:
    """The record in an ONNX file of how it was made."""
    record = {"lorafx_version": __version__, "lorafx_history": json.dumps(history_record(program))}
    return {**record, "lorafx_base": json.dumps(base_record(program))}


def _write_exported(
    program: Program,
    folder: Path,
    kind: str,
    provider: str,
    dtype: torch.dtype | None,
    slots: Any,
    *,
    joined: bool,
) -> None:
    # Not imported for a checkpoint: the converters of ONNX are most of what is waited for when a small one is written.
    from .onnx_kernels import unfuse_batch_transposes, unfuse_mixed_norms, unfuse_skip_norms
    from .onnx_launches import launch_less
    from .onnx_ranges import hold_ranges
    from .onnx_statements import leave_out
    from .replay import converted
    from .slots import add_slots

    exported = converted(program, kind, provider, dtype)
    if kind == "onnx":
        for component in exported.components.values():
            component.program.metadata_props.update(_record(program))
            unfuse_batch_transposes(component.program)
            unfuse_mixed_norms(component.program)
            if provider == "cuda" and joined:
                launch_less(component.program)
            hold_ranges(component.program, program.signature.domain, length_limit(program.config))
            if provider == "cpu":
                unfuse_skip_norms(component.program)
            leave_out(component.program)
            if slots is not None:
                add_slots(component.program, program, slots, shared_names=False)
    for key, value in program.config_changes.items():
        exported.config = copy.deepcopy(exported.config)
        setattr(exported.config, key, value)
    with own_configs(exported.config), refusing_archives():
        exported.save_pretrained(folder)


def history_record(program: Program) -> list[dict[str, Any]]:
    """The passes of a program, as a recipe has them."""
    from ..recipes.recipe import pass_dict

    return [pass_dict(step) for step in passes_of(program)]
