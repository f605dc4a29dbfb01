"""One base in ONNX, any adapter at run time: slots beside its weights, and files that fill them.

A slot is two inputs with default values of rank 0, so that the model is the base's until an adapter is active. They are
added to the converted graph, after its fusions: whatever a weight became (a factor of a product, a part of a packed
one), it is found by its values.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..formats.slots import ADAPTER, SLOTS, Pair, Slots, fingerprint, read_slots
from ..graph.site import STACK
from ..graph.tree import put_tensor, tensor_hash
from ..passes.lora import Lora
from ..public import Program
from .plain_lora import factors

_PRODUCTS = ("MatMul", "Gemm")


@dataclass(frozen=True)
class Place:
    """Where a converted graph applies a weight: the product's input, and the value that is the weight's result."""

    source: ir.Value
    result: ir.Value


def add_slots(model: ir.Model, program: Program, targets: str | Sequence[str], *, shared_names: bool) -> Slots:
    """Put slots for the weights that ``targets`` name, and for the modules that train in full, into a converted model.

    ``shared_names`` calls them as onnxruntime-genai's builder does (model.layers.0.attn.q_proj.lora_A.MatMul.weight).

    Raises:
        UsageError: nothing is named, or a weight that is named is not found in the converted graph
    """
    step = Lora(targets=targets if isinstance(targets, str) else tuple(targets), rank=1)
    dtype = _dtype(model.graph)
    places, modules = _places(model.graph), _modules(program, dtype)
    pairs = {}
    for module, site in {site.module: site for site in step.sites(program).taken}.items():
        if site.kind == STACK:
            raise UsageError(f"{module}: a stack of matrices, for which there is no slot; leave it out of targets")
        weight = site.op.matrix(program.tensor(site.parameter)).t()
        key = _known(weight, dtype)
        if key not in places or len(modules[key]) > 1:
            why = f"has the numbers of {', '.join(modules[key])}" if key in places else "is no factor of a product"
            raise UsageError(
                f"{module}: its weight {why} in the converted model, so no slot fits; leave it out of targets"
            )
        path = module.replace(".self_attn.", ".attn.") if shared_names else module
        pair = Pair(f"{path}.lora_A.MatMul.weight", f"{path}.lora_B.MatMul.weight", *weight.shape)
        _insert(model.graph, pair, places[key])
        pairs[module] = pair
    names = heads(program)
    turned = tuple(name for name in names if _open(model.graph, program, name, dtype))
    slots = Slots(fingerprint(program), pairs, {name: name for name in names}, turned, dtype.name)
    model.metadata_props[SLOTS] = slots.to_json()
    return slots


def heads(program: Program) -> list[str]:
    """The tensors that train in full unless told otherwise, which have slots of their own."""
    paths = program.default_trainable()
    return sorted(f"{path}.{name}" for path in paths for name, _ in program.root.get_submodule(path).named_parameters())


def check_slots(program: Program, kind: str, adapters: str, slots: str | PathLike[str] | None) -> None:
    """UsageError when slots, or a file that fills them, cannot be written so."""
    if (kind == "onnx-adapter") != (slots is not None):
        raise UsageError("an onnx-adapter is for one base: give its folder with slots; nothing else takes one")
    if adapters != "slots":
        return
    if kind != "onnx":
        raise UsageError(f"slots are inputs of an ONNX model; {kind} has none")
    inserted = program.names("adapter", "gate") or sorted(program.source.adapters)
    if inserted:
        raise UsageError(
            f"slots are for the base, and this has {inserted[0]}; export the base, then this as onnx-adapter"
        )


def marked(program: Program) -> Program:
    """``program`` whose head has numbers to be found by: a bias of zeros would be left out by the conversion."""
    result, generator = program.copy(), torch.Generator().manual_seed(0)
    for name in heads(program):
        old = program.tensor(name)
        values = torch.randn(old.shape, generator=generator, dtype=torch.float32).to(old.dtype)
        put_tensor(result.root, name, nn.Parameter(values, requires_grad=False))
    return result


# ---- finding weights by their values


def _array(value: ir.Value | None) -> np.ndarray | None:
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def _digest(matrix: np.ndarray) -> str:
    shape = "x".join(map(str, matrix.shape))
    return f"{shape}:{hashlib.sha256(np.ascontiguousarray(matrix).data).hexdigest()}"


def _dtype(graph: ir.Graph) -> np.dtype[Any]:
    arrays = (value.const_value for value in graph.initializers.values())
    half = any(array is not None and array.dtype is ir.DataType.FLOAT16 for array in arrays)
    return np.dtype(np.float16 if half else np.float32)


def _known(matrix: Tensor, dtype: np.dtype[Any]) -> str:
    """The digest of a base's matrix as the converted model has it."""
    return _digest(matrix.detach().to(getattr(torch, dtype.name)).numpy())


def _modules(program: Program, dtype: np.dtype[Any]) -> dict[str, set[str]]:
    """The modules that apply each matrix (in, out), by its digest."""
    found: dict[str, set[str]] = defaultdict(set)
    for site in program.sites():
        if site.kind in ("linear", "addmm"):
            found[_known(site.op.matrix(program.tensor(site.parameter)).t(), dtype)].add(site.module)
    return found


def _places(graph: ir.Graph) -> dict[str, list[Place]]:
    """Where each matrix (in, out) is applied, by its digest."""
    found: dict[str, list[Place]] = defaultdict(list)
    for node in graph:
        matrix = _array(node.inputs[1]) if node.op_type in _PRODUCTS else None
        if matrix is None or matrix.ndim != 2:
            continue
        turned = node.attributes.get_int("transB", 0) if node.op_type == "Gemm" else 0
        for part, result in _parts(matrix.T if turned else matrix, node.outputs[0]):
            source = node.inputs[0]
            assert source is not None
            found[_digest(part)].append(Place(source, result))
    return found


def _parts(matrix: np.ndarray, result: ir.Value) -> Iterator[tuple[np.ndarray, ir.Value]]:
    """A product's matrix and result, or those of the products that were packed into it."""
    users = [use.node for use in result.uses()]
    yield matrix, result
    if len(users) == 1 and users[0].op_type == "Split":
        outputs = users[0].outputs
        sizes = _array(users[0].inputs[1]) if len(users[0].inputs) > 1 else None
        widths = [matrix.shape[1] // len(outputs)] * len(outputs) if sizes is None else sizes.tolist()
        if sum(widths) == matrix.shape[1]:
            ends = np.cumsum(widths)
            columns = (matrix[:, end - width : end] for width, end in zip(widths, ends, strict=True))
            yield from zip(columns, outputs, strict=True)


# ---- changing the graph


def _insert(graph: ir.Graph, pair: Pair, places: Sequence[Place]) -> None:
    dtype = places[0].result.dtype or ir.DataType.FLOAT
    a = _input(graph, pair.a, (pair.inputs, f"{pair.a}.rank"), np.zeros((pair.inputs, 0), dtype.numpy()))
    # Empty, it gives one column of zeros, not all of them: nothing as large as the activations is written for it.
    b = _input(graph, pair.b, (f"{pair.a}.rank", f"{pair.b}.width"), np.zeros((0, 1), dtype.numpy()))
    for number, place in enumerate(places):
        name = f"{pair.a.removesuffix('.lora_A.MatMul.weight')}.slot_{number}"
        readers = [(use.node, use.idx) for use in place.result.uses()]
        down = ir.node("MatMul", [place.source, a], name=f"{name}.lora_A")
        up = ir.node("MatMul", [down.outputs[0], b], name=f"{name}.lora_B")
        added = ir.node("Add", [place.result, up.outputs[0]], name=f"{name}.lora.Add")
        for node in (down, up, added):
            node.outputs[0].name, node.outputs[0].type = f"{node.name}.output", place.result.type
        added.outputs[0].shape = place.result.shape
        producer = place.result.producer()
        assert producer is not None
        graph.insert_after(producer, [down, up, added])
        for node, index in readers:
            node.replace_input_with(index, added.outputs[0])
        for index, output in enumerate(graph.outputs):
            if output is place.result:
                graph.outputs[index] = added.outputs[0]
                added.outputs[0].name, place.result.name = output.name, f"{name}.base"


def _input(graph: ir.Graph, name: str, shape: tuple[Any, ...], default: np.ndarray) -> ir.Value:
    kind = ir.TensorType(ir.DataType.from_numpy(default.dtype))
    value = ir.Value(name=name, shape=ir.Shape(shape), type=kind, const_value=ir.tensor(default, name=name))
    graph.register_initializer(value)
    graph.inputs.append(value)
    return value


def _open(graph: ir.Graph, program: Program, name: str, dtype: np.dtype[Any]) -> bool:
    """Make a tensor of the base an input that has its values unless given (NaN where no file holds any); whether the
    graph has it transposed. ``program`` is :func:`marked`. UsageError when it is not found, or stands for others, too.
    """
    tensor = program.tensor(name).detach()
    forms = {_known(tensor, dtype): False}
    if tensor.dim() == 2:
        forms.setdefault(_known(tensor.t(), dtype), True)
    held = [(value, array) for value in graph.initializers.values() if (array := _array(value)) is not None]
    same = [(value, array) for value, array in held if value.uses() and _digest(array) in forms]
    named = [(value, array) for value, array in same if value.name == name] or same
    if len(named) != 1 or len(named[0][0].uses()) != 1:
        raise UsageError(f"{name}: not found once in the converted model, so no slot fits")
    old, array = named[0]
    turned = forms[_digest(array)]
    base = (program.captured or program).tensor(name).detach().numpy()
    default = np.ascontiguousarray(base.T if turned else base, dtype=array.dtype)
    if name in program.source.drawn:
        default = np.full_like(default, np.nan)
    (use,) = old.uses()
    graph.initializers.pop(old.name or "")
    use.node.replace_input_with(use.idx, _input(graph, name, array.shape, default))
    return turned


# ---- filling them


def slot_values(program: Program, slots: Slots, folder: Path) -> dict[str, np.ndarray]:
    """What a trained program puts into the slots of its base, by the names of the inputs.

    Raises:
        UsageError: something was learned that no slot takes
    """
    found: dict[str, np.ndarray] = {}
    for update in factors(program) if program.names("adapter", "gate") else ():
        pair = slots.pairs.get(update.module)
        if pair is None:
            raise UsageError(f"{folder}: has no slot at {update.module}; export the base with --targets that name it")
        if update.rank:
            found |= {pair.a: update.a.t().numpy(), pair.b: update.b.t().numpy()}
    # Where a method froze the base, what trains of it was trained, whether it shows yet or not.
    base, trained = program.captured or program, program.learned() if program.names("adapter", "gate") else {}
    for name in base.roles:
        if name in slots.tensors:
            value = program.tensor(name).detach()
            found[slots.tensors[name]] = (value.t() if name in slots.transposed else value).numpy()
        elif name in trained or tensor_hash(program.tensor(name)) != tensor_hash(base.tensor(name)):
            raise UsageError(f"{folder}: has no slot for {name}, which was trained in full")
    return {name: np.ascontiguousarray(value, dtype=slots.dtype) for name, value in found.items()}


def write_adapter(program: Program, slots_folder: Path, folder: Path) -> Slots:
    """Write what a program learned as the file that ONNX Runtime and onnxruntime-genai load; for which slots it is.

    Raises:
        UsageError: it learned what no slot takes, or its base is another
    """
    import onnxruntime

    if program.origin is not None:
        raise UsageError("a folded program has no adapter left; give the run before fold()")
    if program.source.adapters:
        raise UsageError(
            "its adapter came inside the model: give LoRA as --adapter FOLDER, and fold any other (lorafx fold)"
        )
    slots = read_slots(slots_folder)
    if fingerprint(program) != slots.base:
        raise UsageError(
            f"{slots_folder}: its base is another than the one that was trained; export that one with slots"
        )
    values = slot_values(program, slots, slots_folder)
    kept = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()}
    adapter: Any = onnxruntime.AdapterFormat()  # which takes paths as text, whatever it declares
    adapter.set_adapter_version(1)
    adapter.set_model_version(slots.number)
    adapter.set_parameters(kept)
    adapter.export_adapter(str(folder / ADAPTER))
    return slots
