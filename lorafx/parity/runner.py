"""A runner: what computes a model's outputs, whatever it is, behind one call; and the runner of a program.

Other models and folders are opened in :mod:`lorafx.proof.open`. A runner takes a dict of tensors and gives a dict of
tensors. It drops inputs its model does not take, fills masks and token types that were left out, and runs in evaluation
mode without gradients. Verification and timing see nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..deferred.programs import deferring, resident
from ..deferred.running import run_by_block
from ..errors import UsageError
from ..graph.call import flatten
from ..graph.domain import leaves_of, nested
from ..graph.effects import written
from ..graph.evaluation import evaluation_form, own_evaluation_form
from ..graph.precision import coarsest, recast
from ..graph.program import Program
from ..graph.segments import compile_graph
from ..graph.tree import aliases, copy_tree
from ..models.tokenizers import TOKEN_TYPES
from .inputs import InputSpec, specs_of

#: Outputs that are not results of the function compared: a loss needs labels, a cache only saves later work.
_LEFT_OUT = ("loss", "past_key_values")
#: An input that only a loss depends on; it is dropped.
LABELS = "labels"

#: ONNX Runtime's names of the providers.
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class Runner:
    """Computes a model's outputs: ``runner({name: tensor})`` gives ``{name: tensor}``.

    Attributes:
        label: its name in messages and tables
        kind: ``program``, ``module``, ``checkpoint``, ``run``, ``onnx``, …
        provider: what actually runs it: ``torch cpu``, ``torch cuda``, or ONNX Runtime's provider
        threads: CPU threads it uses
        dtype: its lowest precision
        inputs: what it takes; empty when it does not say
        call: what runs it, given tensors by their names
        optional: the names of what else it takes where it is given
        config: the Hugging Face config, if there is one
        folder: where its files (and its tokenizer) are, if anywhere
        fresh: parameters that no file held, so that their values are random
        note: what to know about it, e.g. that another provider runs it than was requested
        decoder: runs it by steps, with its cache, if it has one (:class:`lorafx.proof.decoder.CachedDecoder`,
            :class:`lorafx.proof.encoder_decoder.CachedEncoderDecoder`)
        outside: says which relation between sizes its graph needs and given inputs, each in its range, do not satisfy
    """

    label: str
    kind: str
    provider: str
    threads: int
    dtype: torch.dtype
    inputs: tuple[InputSpec, ...]
    call: Callable[[dict[str, Any]], Any] = field(repr=False)
    config: Any = field(default=None, repr=False)
    folder: Path | None = None
    fresh: frozenset[str] = frozenset()
    note: str = ""
    decoder: Any = field(default=None, repr=False)
    optional: frozenset[str] = frozenset()
    outside: Callable[[Mapping[str, Any]], str] = field(default=lambda _: "", repr=False)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, the loss and the cache left out; UsageError when an input is missing."""
        given = {spec.name: self._input(spec, inputs) for spec in self.inputs} if self.inputs else dict(inputs)
        known = self.optional - given.keys()
        extra = {name: value for name, value in inputs.items() if name in known and isinstance(value, Tensor)}
        given |= {name: self._moved(value, self.dtype) for name, value in extra.items()}
        with torch.no_grad(), _threads(self.threads):
            outputs = self.call(given)
            if self.provider == "torch cuda":
                torch.cuda.synchronize()
        return named_outputs(outputs)

    def _input(self, spec: InputSpec, inputs: Mapping[str, Tensor]) -> Tensor:
        value = inputs.get(spec.name)
        if value is not None:
            return self._moved(value, spec.dtype)
        like = next((other for other in inputs.values() if other.dim() == 2), None)
        if like is None or not (spec.is_mask or spec.name == TOKEN_TYPES):
            raise UsageError(f"{self.label}: missing input {spec.name!r}; it takes {[s.name for s in self.inputs]}")
        fill = torch.ones_like if spec.is_mask else torch.zeros_like
        return self._moved(fill(like, dtype=spec.dtype), spec.dtype)

    def takes(self, name: str) -> bool:
        """Whether it takes an input of that name; any, if it does not say what it takes."""
        named = name in self.optional or any(spec.name == name for spec in self.inputs)
        return named or name == LABELS or not self.inputs

    def _moved(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor where the model is; a floating-point one in ``dtype``."""
        device = "cuda" if self.provider == "torch cuda" else "cpu"
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def named_outputs(value: Any, name: str = "") -> dict[str, Tensor]:
    """A model's result as tensors by name: keys of mappings and positions in tuples, joined by dots."""
    if isinstance(value, Tensor):
        return {name or "output": value}
    if isinstance(value, Mapping):
        items = [(str(key), inner) for key, inner in value.items() if key not in _LEFT_OUT]
    elif isinstance(value, (list, tuple)):
        items = [(str(position), inner) for position, inner in enumerate(value)]
    else:
        return {}
    return {
        key: tensor
        for part, inner in items
        for key, tensor in named_outputs(inner, f"{name}.{part}" if name else part).items()
    }


@dataclass(frozen=True)
class Place:
    """Where and in which precision to run; ``by_block`` to have the tensors of one block at a time in memory."""

    provider: str
    threads: int
    dtype: torch.dtype | None
    by_block: bool = False

    @classmethod
    def beside(cls, program: Program) -> Place:
        """Where the tensors of ``program`` are, in its own dtypes."""
        return cls("cuda" if program.device.type == "cuda" else "cpu", torch.get_num_threads(), None)

    def device(self) -> torch.device:
        """torch's device; UsageError when it is not there."""
        if self.provider == "cuda" and not torch.cuda.is_available():
            raise UsageError("no CUDA device here; run on the CPU (provider cpu)")
        return torch.device(self.provider)


def program_runner(
    program: Program, place: Place, label: str, kind: str = "program", *, seldom: bool = False
) -> Runner:
    """A runner for a program, to be called a few times only if ``seldom``. UsageError: it has no weights, or ``place``
    is not there."""
    if program.device.type == "meta":
        raise UsageError(f"{label}: captured without weights, so it computes nothing; capture it with meta=False")
    evaluation = own_evaluation_form(program) if place.by_block else evaluation_form(resident(program))
    device = place.device()
    if place.by_block and place.dtype is not None:
        evaluation = deferring(evaluation)  # so that it is converted as it is used
    if place.dtype is not None or program.device != device:
        evaluation = recast(evaluation, place.dtype, device)
    graph, root = compile_graph(evaluation.graph, seldom=seldom), _root(evaluation)
    constants = {name: value for name, value in leaves_of(program.example).items() if not isinstance(value, Tensor)}

    def call(inputs: dict[str, Any]) -> Any:
        leaves = flatten(evaluation, nested(program.example, inputs))
        flat = run_by_block(graph, root, leaves) if place.by_block else graph(root, leaves)
        return pytree.tree_unflatten(flat, evaluation.signature.out_spec)

    return Runner(
        label,
        kind,
        f"torch {place.provider}",
        place.threads,
        place.dtype or coarsest(value.dtype for value in root.parameters()),
        _graph_specs(evaluation),
        call,
        program.config,
        Path(program.source.path) if program.source.path is not None else None,
        outside=lambda inputs: evaluation.signature.domain.broken({**constants, **inputs}),
    )


def _root(program: Program) -> nn.Module:
    """The program's tensors; those that its graph writes into are copies, so that the program stays as it was."""
    changed = written(program.root, program.graph)
    names = {str(node.target) for node in changed if node.op == "get_attr"}
    apart = {alias for name in names for alias in aliases(program.root, name)}
    return copy_tree(program.root, apart) if apart else program.root


def _graph_specs(program: Program) -> tuple[InputSpec, ...]:
    """What a program takes: the axes that are free in its graph, and the sizes they may have."""
    domain = program.signature.domain
    specs = []
    for spec in specs_of(program.example, program.config):
        shape = domain.shapes.get(spec.name)
        if shape is not None:
            sizes = tuple(size if isinstance(size, int) else None for size in shape)
            ranges = {axis: domain.bounds(spec.name, axis) for axis, size in enumerate(sizes) if size is None}
            spec = dataclasses.replace(spec, sizes=sizes, ranges=ranges)
        specs.append(spec)
    return tuple(specs)
