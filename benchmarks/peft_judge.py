"""The judge of a model with an adapter inside: whether lorafx folds it to what it computed, and PEFT's own merge."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lorafx
from lorafx.errors import CaptureError, LorafxError, first_line
from lorafx.graph.site import WEIGHT_OPS
from lorafx.public import Program

aten = torch.ops.aten

#: Two forms of one function in fp64, relative to its largest value: 1e-16 a rounding, of some thousand of them.
EXACT = 1e-12
#: The same where the model itself computes a part in fp32, whatever it is given.
SINGLE = 1e-6
#: An adapter that changes nothing proves nothing.
IDLE = 1e-9
#: The operators that an unmerged adapter adds at least one of.
_PRODUCTS = (*WEIGHT_OPS, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.einsum.default, aten.mul.Tensor)

Inputs = Mapping[str, Tensor]


@dataclass
class Finding:
    """What came of one case.

    Attributes:
        verdict: ``exact``; ``by nature`` (no weights compute it); ``kept`` (PEFT merges it, lorafx does not);
            ``refused``; ``wrong``; ``not built`` (PEFT itself cannot)
        reason: why, of any verdict but ``exact``
        error: the largest difference between the folded program and the unmerged model, in fp64
        merged: that of PEFT's merge; None where PEFT does not merge
        scale: the largest value of the unmerged model
    """

    title: str
    kind: str
    model: str
    verdict: str = "exact"
    reason: str = ""
    error: float | None = None
    merged: float | None = None
    scale: float = 0.0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def widened(model: nn.Module) -> nn.Module:
    """``model`` in fp64 and in evaluation mode, with what its modules remember of their dtype."""
    for module in model.modules():
        if isinstance(vars(module).get("dtype"), torch.dtype):
            vars(module)["dtype"] = torch.float64
    return model.double().eval()


@torch.no_grad()
def trained(model: nn.Module, seed: int = 1) -> nn.Module:
    """``model`` with every parameter that trains moved a little, as by training: nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def examine(found: Finding, model: Any, base: nn.Module, inputs: Sequence[Inputs]) -> Finding:
    """Fill in what comes of a PEFT model around ``base``, in fp64 and evaluation mode; the first of ``inputs`` is the
    example that it is captured on."""
    started = time.perf_counter()
    expected = [_answer(model, one) for one in inputs]
    found.scale = max(float(value.abs().max()) for value in expected)
    effect = max(_distance(_answer(base, one), value) for one, value in zip(inputs, expected, strict=True))
    if effect <= IDLE:
        found.verdict, found.reason = "not built", "the adapter changes nothing"
        return found
    found.merged, why = _merge(model, inputs, expected)
    try:
        _fold(found, model, base, inputs, expected, why)
    except LorafxError as error:
        found.verdict, found.reason = "refused", f"{type(error).__name__}: {error}"
    except Exception as error:  # anything else is a bug, which a sweep reports like the rest
        found.verdict, found.reason = "wrong", f"{type(error).__name__}: {first_line(error)}"
    found.seconds = round(time.perf_counter() - started, 2)
    return found


def _fold(
    found: Finding, model: Any, base: nn.Module, inputs: Sequence[Inputs], expected: Sequence[Tensor], why: str
) -> None:
    program = captured(model, inputs[0])
    folded = lorafx.fold(program)
    found.error = max(_distance(_run(folded, one), value) for one, value in zip(inputs, expected, strict=True))
    if found.error > max(found.merged or 0.0, _noise(program) * found.scale):
        found.verdict, found.reason = "wrong", f"it differs by {found.error:.1e} of {found.scale:.1e}"
        return
    plain = lorafx.fold(captured(base, inputs[0]))
    names = _unfolded(program, folded)
    if names or _products(folded) > _products(plain):
        left = ", ".join(sorted(_operators(folded) - _operators(plain)))
        kept = f"left are {left or 'more products'}, reading {', '.join(names) or 'constants'}"
        found.verdict, found.reason = ("kept", kept) if found.merged is not None else ("by nature", why)


def captured(model: nn.Module, inputs: Inputs) -> Program:
    """The program of a model, with its batch free if its code lets it be."""
    try:
        return lorafx.capture(model, inputs=inputs)
    except CaptureError:
        return lorafx.capture(model, inputs=inputs, dynamic=False)


def _merge(model: Any, inputs: Sequence[Inputs], expected: Sequence[Tensor]) -> tuple[float | None, str]:
    """The error of PEFT's own merge, or why there is none."""
    try:
        merged = copy.deepcopy(model).merge_and_unload()
    except Exception as error:  # every kind of adapter refuses in its own way
        return None, f"PEFT: {first_line(error)}"
    return max(_distance(_answer(merged, one), value) for one, value in zip(inputs, expected, strict=True)), ""


def _noise(program: Program) -> float:
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "call_function")
    single = any(isinstance(value, Tensor) and value.dtype == torch.float32 for value in values)
    return SINGLE if single else EXACT


def _unfolded(program: Program, folded: Program) -> list[str]:
    """The tensors of the adapter that are still read as they were."""
    read = {str(node.target) for node in folded.graph.find_nodes(op="get_attr")}
    theirs = sorted(read & program.source.adapters & program.roles.keys())
    return [name for name in theirs if torch.equal(program.tensor(name), folded.tensor(name))]


def _products(program: Program) -> int:
    return sum(node.target in _PRODUCTS for node in program.graph.nodes)


def _operators(program: Program) -> set[str]:
    calls = (node.target for node in program.graph.nodes if node.op == "call_function")
    return {getattr(target, "__name__", str(target)).removesuffix(".default") for target in calls}


@torch.no_grad()
def _answer(model: nn.Module, inputs: Inputs) -> Tensor:
    return model(**inputs)


@torch.no_grad()
def _run(program: Program, inputs: Inputs) -> Tensor:
    result: Any = program.module().eval()(**inputs)
    return result


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
