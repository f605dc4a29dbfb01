"""Run an exported model: a folder that transformers' exporters wrote, in the runtime it was written for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import ArtifactError, UsageError, first_line
from ..graph.precision import coarsest, dtype_name
from ..models.layered import own_configs
from ..parity.inputs import InputSpec, specs_of
from ..parity.runner import PROVIDERS, Place, Runner

#: ONNX's names of the dtypes weights come in.
_ONNX_FLOATS = {"FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16, "FLOAT": torch.float32, "DOUBLE": torch.float64}


def open_exported(folder: Path, place: Place, label: str, trusted: bool = False) -> Runner:
    """A runner for a folder that transformers' exporters or lorafx wrote; see :func:`lorafx.proof.open.open_runner`."""
    from transformers.exporters.base import ExportedModel

    kind = read_json(folder / "export.json").get("export_format", "unknown")
    if kind == "dynamo" and not trusted:
        raise UsageError(
            f"{folder}: a .pt2 is pickled, so opening it runs code it holds; if you trust it, pass trust_remote_code"
        )
    options: dict[str, Any] = session_options_for(place) if kind == "onnx" else {"device": place.device()}
    try:
        with own_configs():
            exported = ExportedModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trusted, **options
            )
        names = list(exported.components)
        if len(names) != 1:
            parts = " and ".join(names)
            raise UsageError(f"{folder}: exported for generation ({parts}); only single graphs are compared and timed")
        backend: Any = exported.runners[names[0]]
    except (ArtifactError, UsageError):
        raise
    except Exception as error:  # each runtime has its own exceptions for a broken file
        raise ArtifactError(f"{folder}: the {kind} model cannot be opened: {first_line(error)}") from error
    dtype = _exported_dtype(exported)
    if place.dtype not in (None, dtype):
        raise UsageError(f"{folder}: exported in {dtype_name(dtype)}; it cannot be computed in another dtype")
    specs, used = _exported_specs(exported, backend), f"torch {place.provider}"
    if kind == "onnx":
        used = backend.session.get_providers()[0]
    asked = PROVIDERS[place.provider] if kind == "onnx" else used
    note = "" if used == asked else f"{asked} was asked for but cannot be loaded here; {used} ran it"

    def call(inputs: dict[str, Any]) -> Any:
        return backend(**inputs)

    return Runner(label, kind, used, place.threads, dtype, specs, call, exported.config, folder, note=note)


def session_options_for(place: Place) -> dict[str, Any]:
    """How an ONNX Runtime session is opened, so that it computes and uses threads as torch does."""
    import onnxruntime

    options = session_options(place.threads)
    if place.by_block:
        # Weights stay in their file, mapped, and one at a time is converted where the CPU computes in another dtype;
        # any optimisation would do that, or pack them, for all of them at once, and so would the usual order.
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.enable_cpu_mem_arena = False
    cpu, cuda = PROVIDERS["cpu"], PROVIDERS["cuda"]
    if place.provider == "cpu" or cuda not in onnxruntime.get_available_providers():
        return {"session_options": options, "providers": [cpu]}
    # torch computes fp32 matrix products in fp32 by default; ONNX Runtime would use TF32, 13 bits coarser.
    return {"session_options": options, "providers": [(cuda, {"use_tf32": "0"}), cpu]}


def session_options(threads: int) -> Any:
    """Options of an ONNX Runtime session that uses this many threads while it runs, and none afterwards."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only, also while the file is read: a slot is a warning there
    onnxruntime.set_default_logger_severity(3)
    # By default a session takes every core of the machine, and its threads keep spinning when it is done, which slows
    # down what runs next.
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _exported_dtype(exported: Any) -> torch.dtype:
    """The lowest precision among the weights of an exported model."""
    component = next(iter(exported.components.values()))
    found = [getattr(torch, component.metadata.export_dtype)]
    graph = getattr(component.program, "graph", None)
    for value in getattr(graph, "initializers", {}).values():
        dtype = _ONNX_FLOATS.get(value.dtype.name) if value.dtype is not None else None
        # Scalars are constants of the conversion, not weights.
        if dtype is not None and value.shape is not None and any(size != 1 for size in value.shape):
            found.append(dtype)
    return coarsest(found)


def _exported_specs(exported: Any, backend: Any) -> tuple[InputSpec, ...]:
    """What an exported model takes: from the session for ONNX, else from what was recorded at its export."""
    recorded = next(iter(exported.components.values())).metadata.kwargs
    tensors = {name: entry for name, entry in recorded.items() if "shape" in entry}
    example = {
        name: torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        for name, entry in tensors.items()
    }
    specs = specs_of(example, exported.config)
    session = getattr(backend, "session", None)
    if session is None:
        return specs
    # The graph keeps the inputs it reads only; a name instead of a number is a free axis.
    sizes = {
        entry.name: tuple(s if isinstance(s, int) else None for s in entry.shape) for entry in session.get_inputs()
    }
    read = [spec for spec in specs if spec.name in sizes]
    return tuple(InputSpec(spec.name, spec.dtype, sizes[spec.name], spec.low, spec.high) for spec in read)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, empty when the file holds something else; ArtifactError when it cannot be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{file}: not valid JSON ({error}); export the model again") from None
    return value if isinstance(value, dict) else {}
