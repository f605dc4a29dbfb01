"""The eager model as the judge of its graph: on the example, and at other sizes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import CaptureError, first_line
from ..graph.domain import Domain, leaves_of
from ..graph.effects import written
from ..models.eager import answers, outcome, same, same_draws
from ..models.intact import intact
from ..training.module import build_module

if TYPE_CHECKING:
    from ..public import Program

_log = logging.getLogger(__name__)


def judged(program: Program) -> Program:
    """``program`` with the domain that comparing its evaluation graph with the eager model showed.

    A trace can be silently wrong: random numbers of another library become constants, for one, and so does a size that
    code reads without the tracer seeing it. So both are run on the example, and at other sizes; a size of 1, which a
    tracer tells apart from all others, is in the domain if they agree there.

    Raises:
        CaptureError: they differ on the example, or at sizes that the trace says it is right for; or their outputs
            change from one evaluation to the next; or the model was traced and does not run
    """
    domain, model = program.signature.domain, program.source.model
    graph = build_module(unjudged(program)).eval()
    usual = domain.sizes(leaves_of(program.example))
    with intact(model):
        model.eval()
        for sizes in _larger(domain, usual):
            differ = _differ(model, graph, _resized(program.example, domain, sizes))
            if differ is None and sizes == usual:
                raise _does_not_run(program)
            if differ:
                raise CaptureError(
                    f"{program.name} computes something else as a graph{_at(domain, sizes)}; its code may read sizes "
                    "or values in a way a graph cannot follow: try dynamic=False, or example inputs of your own"
                )
        moved = _moved(program, graph)
        if moved:
            raise CaptureError(
                f"{program.name} changes {moved} whenever it evaluates, and then answers otherwise: no graph is that "
                f"function; change {moved} in training mode alone, or take it as an input"
            )
        lows = _lows(
            domain, usual, lambda sizes: _differ(model, graph, _resized(program.example, domain, sizes)) is False
        )
    return _with_domain(program, domain.lowered(**lows))


def _does_not_run(program: Program) -> CaptureError:
    """The error for a model that does not take its own example: a comparison would show nothing."""
    why = "it runs now and then"
    try:
        answers(program.source.model, program.example)
    except Exception as error:  # whatever a model raises
        why = first_line(error)
    return CaptureError(
        f"{program.name} was traced, but does not run on its example inputs, so the graph has nothing to be compared "
        f"with: {why}; give inputs that it takes (check=False compares nothing)"
    )


def _lows(domain: Domain, usual: dict[str, int], agree: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    """How small each size may be whose lower end the trace leaves open."""
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
    """``program``, taken to be right for small sizes too, as where there are no weights to compare with."""
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
    """The example's sizes, then larger ones, all different: all together, or else one by one."""
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


def _moved(program: Program, graph: nn.Module) -> str:
    """The first buffer that evaluating the graph changes, if the outputs then differ for the same inputs.

    Counters, and values written alike each time, do not change outputs.
    """
    names = {str(node.target) for node in written(program.root, program.graph) if node.op == "get_attr"}
    watched = {name: value for name, value in graph.named_buffers() if name in names}
    if not watched:
        return ""
    before = {name: value.clone() for name, value in watched.items()}
    try:
        first, second = (_answer(graph, program.example) for _ in range(2))
        changed = [name for name, value in watched.items() if not torch.equal(value, before[name])]
    finally:
        for name, value in watched.items():
            value.copy_(before[name])
    alike = all(not isinstance(a, Tensor) or torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return "" if alike or not changed else changed[0]


def _answer(graph: nn.Module, inputs: Mapping[str, Any]) -> list[Any]:
    with torch.no_grad(), same_draws():
        # A result may be the very buffer that is written next.
        given = pytree.tree_leaves(graph(**inputs))
        return [value.clone() if isinstance(value, Tensor) else value for value in given]


def _differ(model: nn.Module, graph: nn.Module, inputs: Mapping[str, Any]) -> bool | None:
    """Whether graph and eager model differ on ``inputs``; None when the eager model does not take them."""
    expected = outcome(model, inputs)
    if expected is None:
        return None
    try:
        found = answers(graph, inputs)
    except Exception as error:  # a graph may fail in any operator
        _log.debug("the graph fails: %s", error)
        return True
    return not same(expected, found)
