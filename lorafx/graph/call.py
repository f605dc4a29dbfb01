"""From a call's keyword inputs to the graph's: nothing is silently dropped, and nothing is filled in that the model
would not fill in.

A call gives inputs of the graph, within its domain. For an input left out, the graph gets what the eager model was
found to use without it; an input that the graph does not have must be what the eager model uses anyway. All else is an
error.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable imports half a second of torch at once
from torch.utils import _pytree as pytree

from ..errors import UsageError, did_you_mean
from ..models.eager import FILLS, filled, is_text, proven
from ..models.intact import intact
from .domain import FLAGS, leaves_of

if TYPE_CHECKING:
    from .program import Program


def parameters_of(model: nn.Module) -> dict[str, inspect.Parameter]:
    """What the eager model takes by name, in order; a PEFT wrapper takes what its model takes."""
    unwrapped: Any = getattr(model, "get_base_model", None)
    base = model if unwrapped is None else unwrapped()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(base.forward).parameters
    return {name: parameter for name, parameter in found.items() if parameter.kind not in kinds}


def by_name(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Positional arguments by the names they have in the eager model. UsageError: too many, or one given twice."""
    names = list(parameters_of(program.source.model)) or list(program.example)
    named = dict(zip(names, args, strict=False))
    twice = next((name for name in named if name in kwargs), None)
    if twice is not None or len(args) > len(names):
        what = f"{twice!r} is given twice" if twice is not None else f"takes {len(names)} arguments, not {len(args)}"
        raise UsageError(f"{program.name}: {what}; pass inputs by name")
    return named


def arguments(program: Program, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What ``program`` uses in a call with ``inputs``, by name.

    UsageError: an input that the program was captured without, one that is missing, or a size outside the domain.
    """
    domain = program.signature.domain
    complete: dict[str, Any] = {}
    for name in program.example:
        value = inputs.get(name)
        if value is None and name in domain.values:
            value = _default(program, name)
        if value is not None or name in domain.values:
            complete[name] = value
    omitted = frozenset(name for name in program.example if name not in complete)
    extra = {name: value for name, value in inputs.items() if name not in program.example}
    extra = {name: value for name, value in extra.items() if not _is_default(program, name, value)}
    if omitted or extra:
        complete.update(_fills(program, complete, omitted, extra))
    domain.check(leaves_of(complete), program.name)
    return complete


def flatten(program: Program, inputs: Mapping[str, Any]) -> list[Any]:
    """The graph's positional inputs for keyword ``inputs`` (see :func:`arguments`)."""
    complete = arguments(program, inputs)
    return pytree.tree_leaves([complete[name] for name in program.signature.inputs])


def _default(program: Program, name: str) -> Any:
    """The eager model's value of a setting that a call leaves out."""
    if name == "use_cache":
        return False  # a program never returns a cache
    parameter = parameters_of(program.source.model).get(name)
    value = None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default
    return getattr(program.config, name, None) if value is None and name in FLAGS else value


def _is_default(program: Program, name: str, value: Any) -> bool:
    """Whether the eager model computes the same without this argument, by its own signature and config."""
    if isinstance(value, Tensor):
        return False
    default = _default(program, name)
    if value is None or value is default:
        return True
    return isinstance(value, (bool, int, float, str)) and type(value) is type(default) and value == default


def _fills(
    program: Program, given: Mapping[str, Any], omitted: frozenset[str], extra: Mapping[str, Any]
) -> dict[str, Tensor]:
    """What the model uses in place of ``omitted`` inputs; UsageError unless that is known, and the same with ``extra``
    inputs."""
    kinds = {name: _kind(program, given, value) for name, value in extra.items()}
    for name, kind in kinds.items():
        if kind is None or fills_for(program, frozenset(), {name: kind}) is None:
            raise _unknown(program, name)
    fills = fills_for(program, omitted, {name: kind for name, kind in kinds.items() if kind is not None})
    if fills is None:
        raise _missing(program, min(omitted)) if omitted else _unknown(program, min(extra))
    domain = program.signature.domain
    sizes = domain.sizes(leaves_of(given))
    device = next((value.device for value in given.values() if isinstance(value, Tensor)), None)
    result = {}
    for name, kind in fills.items():
        try:
            shape = domain.shape(name, sizes)
        except KeyError:
            raise _missing(program, name) from None
        result[name] = filled(kind, shape, program.example[name].dtype, device)
    return result


def _unknown(program: Program, name: str) -> UsageError:
    taken = parameters_of(program.source.model)
    if name not in taken and name not in FLAGS:
        return UsageError(f"{program.name} takes no input {name!r}{did_you_mean(name, taken)}; leave it out")
    return UsageError(
        f"{program.name} was captured without {name!r}, so its graph cannot take it; leave it out, or capture it with "
        f"inputs={{…, {name!r}: …}}"
    )


def _missing(program: Program, name: str) -> UsageError:
    return UsageError(f"{program.name}: missing input {name!r}; it was captured with {list(program.example)}")


def _kind(program: Program, given: Mapping[str, Any], value: Any) -> str | None:
    """Which of the fills an input is, one number for each token; None when it is none of them."""
    like = next((given.get(name) for name, example in program.example.items() if is_text(example)), None)
    if not is_text(value) or like is None or value.shape != like.shape:
        return None
    return next((k for k in FILLS if value.equal(filled(k, tuple(value.shape), value.dtype, value.device))), None)


@_disable_dynamo
def fills_for(program: Program, omitted: frozenset[str], given: Mapping[str, str]) -> dict[str, str] | None:
    """What the model uses in place of ``omitted`` inputs, when it is also ``given`` others, by their fills.

    Found by running the eager model on the example, on the example mirrored, in which masks and positions run the other
    way, and on one with padding tokens: an input derived from another is not a constant. None when the model cannot do
    without, or uses something other than one of :data:`FILLS`.
    """
    model = program.source.model
    if program.device.type == "meta" or any(value.is_meta for value in model.parameters()):
        return None
    key = (omitted, frozenset(given.items()))
    known = program.signature.proven
    if key not in known:
        with intact(model):
            model.eval()
            known[key] = proven(model, program.example, sorted(omitted), given)
    return known[key]
