"""A deployed graph in fewer bits, by ONNX Runtime's own tools: its weights, and with int8 what they are multiplied by.

Such a graph computes another function on purpose, so it is proven before, and scored before and after.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from ..errors import UsageError
from ..proof.decoder import DATA, MODEL
from ..proof.open import open_runner
from ..proof.scores import scores_of
from ..public import Program

if TYPE_CHECKING:
    import onnx_ir as ir

Bits = Literal["int8", "int4"]
KINDS = get_args(Bits)
#: The operators that the tools leave in place of a product with a weight.
_PRODUCTS = {"int8": "MatMulInteger", "int4": "MatMulNBits"}
_TOOLS = {
    "int8": "onnxruntime.quantization.quantize_dynamic: weights by channel, activations as they come",
    "int4": "onnxruntime.quantization.MatMulNBitsQuantizer: weights in blocks of 32, rounded to nearest",
}


def check_quantized(
    bits: str | None, data: Any, kind: str, provider: str, dtype: torch.dtype | None, adapters: str = "merged"
) -> None:
    """UsageError when a graph cannot be made of so few bits, as asked for."""
    if bits is None:
        if data is not None:
            raise UsageError(
                "data is what a quantised graph is scored on; give quantize (--quantize), or leave data out"
            )
        return
    if bits not in KINDS:
        raise UsageError(f"cannot quantize to {bits!r}; known: {', '.join(KINDS)}")
    if kind != "onnx":
        raise UsageError(f"ONNX graphs are quantised, not {kind}; leave --quantize out, or give --format onnx")
    if adapters != "merged":
        raise UsageError("a quantised graph has its adapters in its weights; leave --quantize out, or merge them")
    if bits == "int8" and provider == "cuda":
        raise UsageError(
            "ONNX Runtime multiplies dynamic int8 on the CPU alone; give --quantize int4, or --provider cpu"
        )
    if dtype not in (None, torch.float32) and (bits == "int8" or provider == "cpu" or dtype is torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        raise UsageError(f"{bits} is made of a float32 graph for {provider}, not of {name}; leave --dtype out")


def quantized(
    program: Program, folder: Path, bits: Bits, data: Any = None, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Put a graph of fewer bits in the place of the one in ``folder``; what the report says of both.

    Args:
        program: what the graph was made of
        folder: as :func:`lorafx.export` writes it, not sealed yet
        data: a table to score both on; their own examples when None
        options: how to read it, by the names of :class:`~lorafx.recipes.options.TrainOptions`

    Raises:
        UsageError: no product with a weight, or data that cannot be scored
        ArtifactError: a table that cannot be read
    """
    file = folder / MODEL if (folder / MODEL).is_file() else folder / "model.onnx"
    scores = scores_of(program, _opened(folder), data, options or {})
    size = _size(file)
    products, left = quantize(file, bits)
    return {
        "bits": bits,
        "tool": _TOOLS[bits],
        "products": products,
        "products_left": left,
        "bytes_before": size,
        "bytes_after": _size(file),
        **scores.with_other(_opened(folder)),
    }


def approximate(parity: dict[str, Any], facts: dict[str, Any] | None) -> dict[str, Any]:
    """What a report says of parity: of a quantised graph that it is approximate, and what it was before."""
    if facts is None:
        return parity
    was = {"ok_before": parity["ok"], "summary_before": parity["summary"]}
    return {**parity, "ok": None, "summary": _said(facts), **was}


def _said(facts: dict[str, Any]) -> str:
    sizes = f"{facts['bytes_before']:,} to {facts['bytes_after']:,} bytes"
    return (
        f"approximate, {facts['bits']}: {facts['metric']} {facts['before']:.4g} before, {facts['after']:.4g} after, "
        f"on {facts['on']}; {sizes}"
    )


def quantize(file: Path, bits: Bits) -> tuple[int, int]:
    """Make an ONNX file one of fewer bits; how many products with a weight are, and how many are not."""
    import onnx_ir as ir  # here: whoever writes a checkpoint comes by this module, and need not wait for ONNX

    with TemporaryDirectory(dir=file.parent) as beside, _silent():
        made = Path(beside) / "model.onnx"
        _int8(file, made) if bits == "int8" else _int4(file, made)
        model = ir.load(made)
        weights = [node for node in model.graph if node.op_type in ("MatMul", "Gemm") and _has_weight(node)]
        products = sum(node.op_type == _PRODUCTS[bits] for node in model.graph)
        if not products:
            raise UsageError(f"{file.name}: it multiplies by no weight that {bits} is for; leave --quantize out")
        data = _data(file)
        for old in (file, data):
            old.unlink(missing_ok=True)  # a session may have mapped it
        ir.save(model, file, external_data=data.name)
    return products, len(weights)


def _int8(file: Path, made: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(file, made, op_types_to_quantize=["MatMul"], per_channel=True, use_external_data_format=True)


def _int4(file: Path, made: Path) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = ONNXModel(onnx.load(file))
    model.replace_gemm_with_matmul()  # as quantize_dynamic does
    # Level 4: what a block is multiplied by is rounded to 8 bits, which is what onnxruntime-genai's builder asks for.
    quantizer: Any = MatMulNBitsQuantizer(model.model, bits=4, block_size=32, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(made), use_external_data_format=True)


def _has_weight(node: ir.Node) -> bool:
    """Whether the second factor of a product is a weight: as it is, or turned (a large table that is also the last
    layer's weight is turned where it is used, and the tools look for weights as they are)."""
    factor = node.inputs[1]
    while factor is not None and (maker := factor.producer()) is not None and maker.op_type in ("Transpose", "Cast"):
        factor = maker.inputs[0]
    return factor is not None and factor.is_initializer()


def _data(file: Path) -> Path:
    """Where the weights of an exported file are: what clients look for, or what transformers writes."""
    return file.with_name(Path(DATA).name if file.parts[-2:] == Path(MODEL).parts else f"{file.name}.data")


def _size(file: Path) -> int:
    return sum(part.stat().st_size for part in (file, _data(file)) if part.is_file())


def _opened(folder: Path) -> Any:
    # It is trusted as the program is.
    return open_runner(folder, sealed=False, trust_remote_code=True)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the tools from logging a line a node, and from setting up the logging of the process."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers, level = [*root.handlers], root.level
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
