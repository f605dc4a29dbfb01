"""A deployed graph in fewer bits, by ONNX Runtime's own tools.

int4, and int8 of a graph that generates, store the weights alone in fewer bits: in blocks, each with its own scale
(``MatMulNBits``). int8 of any other graph also rounds what weights are multiplied by, with one scale for all of it
(``MatMulInteger``): about twice as fast on the CPU, and as good for encoders. The inputs of a decoder's products have a
range that one scale cannot hold.

Such a graph computes another function on purpose, so it is proven before, and scored before and after.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from ..errors import UsageError
from ..proof.decoder import MODEL
from ..proof.encoder_decoder import DECODER, ENCODER
from ..proof.open import open_runner
from ..proof.scores import scores_of
from ..public import Program

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

Bits = Literal["int8", "int4"]
KINDS = get_args(Bits)


@dataclass(frozen=True)
class _Form:
    """What a graph becomes.

    Attributes:
        operator: what stands in the place of a product with a weight
        tool: which makes it, as reports say
        make: reads one file and writes the other
    """

    operator: str
    tool: str
    make: Callable[[Path, Path], None]


def check_quantized(
    bits: str | None,
    data: Any,
    kind: str,
    provider: str,
    dtype: torch.dtype | None,
    adapters: str = "merged",
    *,
    generate: bool = False,
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
    dynamic = bits == "int8" and not generate
    if dynamic and provider == "cuda":
        raise UsageError(
            "ONNX Runtime multiplies dynamic int8 on the CPU alone; give --quantize int4, or --provider cpu"
        )
    if dtype not in (None, torch.float32) and (dynamic or provider == "cpu" or dtype is torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        raise UsageError(f"{bits} is made of a float32 graph for {provider}, not of {name}; leave --dtype out")


def quantized(
    program: Program, folder: Path, bits: Bits, data: Any = None, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Put graphs of fewer bits in the place of those in ``folder``; what the report says of both.

    Args:
        program: what the graph was made of
        folder: as :func:`lorafx.export` writes it, not sealed yet
        data: a table to score both on; their own examples when None
        options: how to read it, by the names of :class:`~lorafx.recipes.options.TrainOptions`

    Raises:
        UsageError: no product with a weight, or data that cannot be scored
        ArtifactError: a table that cannot be read
    """
    files = [folder / name for name in (MODEL, ENCODER, DECODER) if (folder / name).is_file()]
    generates, files = bool(files), files or [folder / "model.onnx"]
    scores = scores_of(program, _opened(folder), data, options or {})
    size = sum(map(_size, files))
    counts = [quantize(file, bits, generates) for file in files]
    return {
        "bits": bits,
        "tool": _form(bits, generates).tool,
        "products": sum(products for products, _ in counts),
        "products_left": sum(left for _, left in counts),
        "bytes_before": size,
        "bytes_after": sum(map(_size, files)),
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


def quantize(file: Path, bits: Bits, generates: bool = False) -> tuple[int, int]:
    """Make an ONNX file one of fewer bits; how many products with a weight are, and how many are not."""
    import onnx_ir as ir  # here: writing a checkpoint imports this module too, and need not wait for ONNX

    form = _form(bits, generates)
    with TemporaryDirectory(dir=file.parent) as beside, _silent():
        made = Path(beside) / "model.onnx"
        form.make(file, made)
        model = ir.load(made)
        weights = [node for node in model.graph if node.op_type in _PRODUCTS and _has_weight(node)]
        products = sum(node.op_type == form.operator for node in model.graph)
        if not products:
            raise UsageError(f"{file.name}: it multiplies by no weight that {bits} is for; leave --quantize out")
        data = _data(file)
        for old in (file, data):
            old.unlink(missing_ok=True)  # a session may have mapped it
        ir.save(model, file, external_data=data.name)
    return products, len(weights)


#: Products with a weight, unless the weight is another product.
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")


def _read(file: Path) -> onnx.ModelProto:
    """A graph with its weights, those that are transposed where they are used as they are multiplied by: the tools
    look for weights as they are."""
    import onnx
    import onnx_ir as ir

    from .onnx_kernels import turn_weights

    model = ir.load(file)
    turn_weights(model)
    proto = ir.to_proto(model)
    onnx.load_external_data_for_model(proto, str(file.parent))
    return proto


def _form(bits: Bits, generates: bool) -> _Form:
    if bits == "int8" and not generates:
        tool = "onnxruntime.quantization.quantize_dynamic: weights by channel, activations as they come"
        return _Form("MatMulInteger", tool, _dynamic)
    # Half the scales of what int4 takes cost eight bits no perplexity, and larger blocks are faster.
    number, block = (4, 32) if bits == "int4" else (8, 128)
    tool = f"onnxruntime.quantization.MatMulNBitsQuantizer: {number} bits, blocks of {block}, rounded to nearest"
    return _Form("MatMulNBits", tool, partial(_blocks, bits=number, size=block))


def _dynamic(file: Path, made: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(file, made, op_types_to_quantize=["MatMul"], per_channel=True, use_external_data_format=True)


def _blocks(file: Path, made: Path, bits: int, size: int) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    changed = ONNXModel(_read(file))
    changed.replace_gemm_with_matmul()  # as quantize_dynamic does
    # Level 4: what a block is multiplied by is rounded to 8 bits, which is what onnxruntime-genai's builder asks for.
    quantizer: Any = MatMulNBitsQuantizer(changed.model, bits=bits, block_size=size, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(made), use_external_data_format=True)


def _has_weight(node: ir.Node) -> bool:
    """Whether the second factor of a product is a weight: as it is, or turned."""
    factor = node.inputs[1]
    while factor is not None and (maker := factor.producer()) is not None and maker.op_type in ("Transpose", "Cast"):
        factor = maker.inputs[0]
    return factor is not None and factor.is_initializer()


def _data(file: Path) -> Path:
    """Where the weights of an exported file are: what clients look for, or what transformers writes."""
    mark = "_" if file.parent.name == Path(MODEL).parent.name else "."
    return file.with_name(f"{file.name}{mark}data")


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
