"""The eager model as the judge of its graph: on the example, at other sizes, and without inputs it can do without."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .domain import Domain, leaves_of
from .errors import CaptureError
from .inputs import pad_token
from .intact import intact, unwritten
from .trace import cacheless

if TYPE_CHECKING:
    from .program import Program

_log = logging.getLogger(__name__)

#: What a model may compute with where an input is left out; which of them it is, it is asked.
FILLS: tuple[str, ...] = ("ones", "zeros", "positions")


def filled(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """A tensor of ones, of zeros, or of positions along the last axis."""
    if kind == "positions":
        return torch.arange(shape[-1], dtype=dtype, device=device).expand(shape).contiguous()
    return (torch.ones if kind == "ones" else torch.zeros)(shape, dtype=dtype, device=device)


# ---- the same function?


def judged(program: Program) -> Program:
    """``program`` with its domain as it was found to be, by comparing its evaluation graph with the eager model.

    A trace can be wrong in silence: random numbers of another library become constants, for one, and so does a size
    that code reads past the tracer. So both are run on the example, and at other sizes; a size of 1, which a tracer
    tells apart from all others, is in the domain if they agree there.

    Raises:
        CaptureError: they differ on the example, or at sizes that the trace says it is right for
    """
    domain, model = program.signature.domain, program.source.model
    graph = unjudged(program).module().eval()
    usual = domain.sizes(leaves_of(program.example))
    with intact(model):
        model.eval()
        for sizes in _larger(domain, usual):
            if _differ(model, graph, _resized(program.example, domain, sizes)):
                raise CaptureError(
                    f"{program.name} computes something else as a graph{_at(domain, sizes)}; its code may read sizes "
                    "or values in a way a graph cannot follow: try dynamic=False, or example inputs of your own"
                )
        lows = _lows(
            domain, usual, lambda sizes: _differ(model, graph, _resized(program.example, domain, sizes)) is False
        )
    return _with_domain(program, domain.lowered(**lows))


def _lows(domain: Domain, usual: dict[str, int], agree: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    """How small each size may be whose lower end the trace leaves untold."""
    wide = domain.lowered(**dict.fromkeys(domain.untold, 1))
    lows = {}
    for name, low in domain.untold.items():
        for size in range(low - 1, 0, -1):
            sizes = {**usual, name: size}
            if not (wide.allows(sizes) and agree(sizes)):
                break
            lows[name] = size
    together = {**usual, **lows}
    return lows if len(lows) < 2 or (wide.allows(together) and agree(together)) else {}


def unjudged(program: Program) -> Program:
    """``program`` taken to be right for small sizes, too, as where there are no weights to compare with."""
    domain = program.signature.domain
    return _with_domain(program, domain.lowered(**dict.fromkeys(domain.untold, 1)))


def _with_domain(program: Program, domain: Domain) -> Program:
    signature = dataclasses.replace(program.signature, domain=domain)
    captured = program.captured and dataclasses.replace(program.captured, signature=signature)
    return dataclasses.replace(program, signature=signature, captured=captured)


def _at(domain: Domain, sizes: Mapping[str, int]) -> str:
    given = ", ".join(f"{domain.readable(name)} = {size}" for name, size in sizes.items())
    return f" ({given})" if given else ""


def _larger(domain: Domain, usual: dict[str, int]) -> Iterator[dict[str, int]]:
    """The example's sizes, then larger ones of which no two are the same: all together, or else one by one."""
    yield usual
    above = {
        name: min(2 * size + 1 + index, domain.ranges[name].high or 2 * size + 1 + index)
        for index, (name, size) in enumerate(usual.items())
    }
    together = [above] if domain.allows(above) else [{**usual, name: size} for name, size in above.items()]
    yield from (sizes for sizes in together if sizes != usual and domain.allows(sizes))


def _resized(example: Mapping[str, Any], domain: Domain, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The example at other sizes: cut, or repeated from its start."""
    leaves = leaves_of(example)
    spec = pytree.tree_structure(dict(example))
    return pytree.tree_unflatten(
        [_cut(value, domain.shape(name, sizes)) if name in domain.shapes else value for name, value in leaves.items()],
        spec,
    )


def _cut(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    for axis, size in enumerate(shape):
        if size != value.shape[axis]:
            index = torch.arange(size, device=value.device) % value.shape[axis]
            value = value.index_select(axis, index)
    return value


def _differ(model: nn.Module, graph: nn.Module, inputs: Mapping[str, Any]) -> bool | None:
    """Whether graph and eager model differ on ``inputs``; None when the eager model does not take them."""
    expected = _outcome(model, inputs)
    if expected is None:
        return None
    try:
        found = _run(graph, inputs)
    except Exception as error:  # a graph may fail in any operator
        _log.debug("the graph fails: %s", error)
        return True
    return not _same(expected, found)


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> list[Any]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]), cacheless(model), unwritten(model):
        torch.manual_seed(0)  # a model may be random in evaluation, too
        return pytree.tree_leaves(model(**inputs))


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(_close(x, y) for x, y in zip(a, b, strict=True))


def _close(a: Any, b: Any) -> bool:
    """Within the square root of the dtype's precision: far above rounding, far below any wrong operator."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return not isinstance(a, Tensor) and not isinstance(b, Tensor)
    if not a.is_floating_point() or not a.numel():
        return True
    scale = a[a.isfinite()].abs().max() if a.isfinite().any() else torch.zeros(())
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    return torch.allclose(a, b, rtol=0.0, atol=float(scale) * tolerance, equal_nan=True)


# ---- the same without an input?


@torch.compiler.disable()
def fills_for(program: Program, omitted: frozenset[str], given: Mapping[str, str]) -> dict[str, str] | None:
    """What the model computes with in place of ``omitted`` inputs, when it is also ``given`` others, by their fills.

    Found by asking the eager model, on the example, on the example mirrored, in which masks and positions run the
    other way, and on one with padding tokens: an input that stands for what another one says is no constant. None when
    the model cannot do without, or computes with something else than one of :data:`FILLS`.
    """
    model = program.source.model
    if program.device.type == "meta" or any(value.is_meta for value in model.parameters()):
        return None
    key = (omitted, frozenset(given.items()))
    known = program.signature.proven
    if key not in known:
        with intact(model):
            model.eval()
            known[key] = _proven(model, program.example, sorted(omitted), given)
    return known[key]


def _proven(
    model: nn.Module, example: Mapping[str, Any], omitted: list[str], given: Mapping[str, str]
) -> dict[str, str] | None:
    pad = pad_token(getattr(model, "config", None))
    examples = [
        dict(example),
        {name: _mirrored(value) for name, value in example.items()},
        {name: _padded(value, pad or 0) if name.endswith("input_ids") else value for name, value in example.items()},
    ]
    like = next((value for value in example.values() if is_text(value)), torch.zeros(1, 1))
    extra = {name: filled(kind, tuple(like.shape), torch.long, like.device) for name, kind in given.items()}
    wanted = [_outcome(model, {**_without(inputs, omitted), **extra}) for inputs in examples]
    for kinds in itertools.product(FILLS, repeat=len(omitted)):
        chosen = dict(zip(omitted, kinds, strict=True))
        found = (_outcome(model, _with(inputs, chosen)) for inputs in examples)
        if all(a is not None and b is not None and _same(a, b) for a, b in zip(wanted, found, strict=True)):
            return chosen
    return None


def is_text(value: Any) -> bool:
    """Whether ``value`` has a number for each token of each text."""
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def _outcome(model: nn.Module, inputs: Mapping[str, Any]) -> list[Any] | None:
    """What the model gives; None when it does not take these inputs."""
    try:
        return _run(model, inputs)
    except Exception as error:  # whatever a model raises, it is its answer to these inputs
        _log.debug("%s does not take such inputs: %s", type(model).__name__, error)
        return None


def _without(inputs: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}


def _with(inputs: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    made = {
        name: filled(kind, tuple(inputs[name].shape), inputs[name].dtype, inputs[name].device)
        for name, kind in kinds.items()
    }
    return {**inputs, **made}


def _mirrored(value: Any) -> Any:
    return value.flip(-1) if is_text(value) else value


def _padded(ids: Tensor, pad: int) -> Tensor:
    ids = ids.clone()
    ids[-1:, ids.shape[-1] // 2 + 1 :] = pad
    return ids
