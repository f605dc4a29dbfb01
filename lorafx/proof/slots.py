"""A model with slots and an adapter in them, as ONNX Runtime runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ArtifactError, first_line
from ..formats.slots import ADAPTER, model_file, read_slots
from ..parity.runner import Place, Runner
from .decoder import from_nothing
from .exported import session_options_for
from .open import open_runner


class Filled:
    """A session whose slots are filled: by an adapter's file, or by values.

    Args:
        session: ONNX Runtime's, which others may share
        adapter: a loaded ``LoraAdapter``, if any
        values: further inputs of every call
    """

    def __init__(self, session: Any, adapter: Any = None, values: Mapping[str, np.ndarray] | None = None):
        import onnxruntime

        self.session, self.values = session, dict(values or {})
        self.adapter = adapter  # run options hold a pointer to it, not a reference
        self.options = onnxruntime.RunOptions()
        if adapter is not None:
            self.options.add_active_adapter(adapter)

    def run(self, names: Sequence[str] | None, feed: Mapping[str, Any]) -> list[Any]:
        """As in an ONNX Runtime session."""
        return self.session.run(names, {**self.values, **feed}, self.options)

    def get_inputs(self) -> list[Any]:
        """The inputs of a call, without slots."""
        return self.session.get_inputs()


def load_adapter(folder: Path, slots: Path) -> Any:
    """The adapter in a folder, as ONNX Runtime loads it. ArtifactError: it is for another base than the one in
    ``slots``, or is not an adapter."""
    import onnxruntime

    file, known = folder / ADAPTER, read_slots(slots)
    adapters: Any = onnxruntime.AdapterFormat  # it only takes paths as text, whatever its signature says
    try:
        version = adapters.read_adapter(str(file)).get_model_version()
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(file))
    except Exception as error:  # ONNX Runtime has its own exceptions
        raise ArtifactError(f"{file}: not an adapter for ONNX Runtime: {first_line(error)}") from None
    if version != known.number:
        raise ArtifactError(f"{file}: an adapter of another base than {slots} (base {version}, not {known.number})")
    return adapter


def open_filled(slots: Path, adapter: Any = None, values: Mapping[str, np.ndarray] | None = None) -> Runner:
    """A runner for a folder with slots, with these in them; see :class:`Filled`."""
    import onnxruntime

    runner = open_runner(slots, sealed=False)
    options = session_options_for(Place("cpu", torch.get_num_threads(), None))
    filled = Filled(onnxruntime.InferenceSession(model_file(slots), **options), adapter, values)
    if runner.decoder is not None:
        decoder = dataclasses.replace(runner.decoder, session=filled)
        return dataclasses.replace(runner, call=from_nothing(decoder), decoder=decoder)
    outputs = [entry.name for entry in filled.session.get_outputs()]

    def call(inputs: dict[str, Any]) -> Any:
        found = filled.run(outputs, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(outputs, found, strict=True)}

    return dataclasses.replace(runner, call=call)
