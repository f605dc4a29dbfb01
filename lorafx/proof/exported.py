"""Run an exported model: a folder that transformers' exporters wrote, in the runtime it was written for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ArtifactError, UsageError, first_line
from ..graph.domain import input_nodes, leaves_of, nested
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

    taken = _recorded(exported)

    def call(inputs: dict[str, Any]) -> Any:
        if kind == "onnx":  # whose inputs stand side by side
            return backend(**{_flat(name): value for name, value in inputs.items()})
        return backend(**nested(taken, inputs))

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
    specs = specs_of(_recorded(exported), exported.config)
    session = getattr(backend, "session", None)
    if session is None:
        return specs
    # The graph keeps the inputs it reads only; a name instead of a number is a free axis.
    sizes = {
        entry.name: tuple(s if isinstance(s, int) else None for s in entry.shape) for entry in session.get_inputs()
    }
    read = [spec for spec in specs if _flat(spec.name) in sizes]
    return tuple(InputSpec(spec.name, spec.dtype, sizes[_flat(spec.name)], spec.low, spec.high) for spec in read)


def _recorded(exported: Any) -> dict[str, Any]:
    """What a graph was exported on, without values: its tensors, in the structure that the model takes them in."""
    from transformers.exporters.metadata import load_treespec

    metadata = next(iter(exported.components.values())).metadata
    spec = load_treespec(metadata.in_spec)
    _, inputs = pytree.tree_unflatten([None] * spec.num_leaves, spec)
    entries: dict[str, Any] = {}
    for name, entry in metadata.kwargs.items():
        inner = entry.get("leaves")
        entries |= {name: entry} if inner is None else {f"{name}.{path}": leaf for path, leaf in inner.items()}
    made = _in_lists(next(iter(exported.components.values())).program, [*leaves_of(inputs)])
    for path in leaves_of(inputs):
        entry = entries.get(_flat(path), {})
        if "shape" in entry:
            made[path] = torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
    return {name: value for name, value in nested(inputs, made).items() if value is not None}


def _in_lists(program: Any, paths: list[str]) -> dict[str, Any]:
    """The inputs of a graph within lists, of which no record holds more than that they are lists."""
    if isinstance(program, torch.export.ExportedProgram):
        found = [(path, node.meta.get("val")) for path, node in zip(paths, input_nodes(program), strict=False)]
        shaped = {path: [int(size) for size in value.shape] for path, value in found if isinstance(value, Tensor)}
        dtypes = {path: value.dtype for path, value in found if isinstance(value, Tensor)}
    else:
        values = {value.name: value for value in program.graph.inputs}
        known = {path: values[_flat(path)] for path in paths if _flat(path) in values}
        shaped = {path: [size if isinstance(size, int) else 2 for size in value.shape] for path, value in known.items()}
        dtypes = {path: torch.from_numpy(np.zeros(0, value.dtype.numpy())).dtype for path, value in known.items()}
    inner = [path for path in shaped if path.endswith("]")]
    return {path: torch.zeros(shaped[path], dtype=dtypes[path], device="meta") for path in inner}


def _flat(path: str) -> str:
    """What an ONNX graph calls the input at a path: ``pair.0`` for ``pair[0]``."""
    return re.sub(r"\['?(.*?)'?\]", r".\1", path)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, empty when the file holds something else; ArtifactError when it cannot be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{file}: not valid JSON ({error}); export the model again") from None
    return value if isinstance(value, dict) else {}
