"""What has to hold for every graph: capture, fold, adapters, gates and removal keep the function, in fp64."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import signal
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lorafx
from lorafx.errors import CaptureError
from lorafx.graph.rounding import SAMPLES, jittered, slack
from lorafx.passes.finegates import FineGates
from lorafx.passes.lora import Lora
from lorafx.pipeline import to_eval
from lorafx.public import Program
from tests.judge import layers_attention, layers_convolutions, layers_moves, layers_products  # noqa: F401
from tests.judge.build import Builder, Generated, Plan, Unfit
from tests.judge.layers import LAYERS, activation, layer, linear, width

#: Gaps are relative to the scale of the output. Rounding in fp64 is 2e-16; what graphs of this size amplify it by (a
#: norm of a constant row by 1/sqrt(eps) = 30, some of them in a row) leaves it below 1e-11, while a channel that is
#: read wrongly shows at 1e-3 and more.
TOLERANCE = 1e-9
#: Batch sizes and, for texts, lengths the outputs are compared at; the first is the one captured.
SIZES = ((2, 5), (1, 3), (5, 7))
#: Who warns when a rule about channels raised, or did not hold when a removal was tried.
_ANALYSIS = tuple(f"lorafx.channels.{name}" for name in ("axes", "branches", "constant", "needed", "plan"))
#: A graph that takes longer, in processor time, hangs.
_LIMIT_S = 120
#: Token numbers are below this.
VOCABULARY = 11


@layer(0.5)
def head(g: Builder, x: Any, r: random.Random) -> Any:
    """A head: pooled, then linear."""
    dims = tuple(range(1, x.rank - 1))
    h = g.do(f"{x}.mean({dims})") if dims else x
    return linear(g, activation(g, linear(g, h, width(r), r), r), r.choice((2, 3)), r)


# ---- a graph from a seed


def example(plan: Plan, batch: int, length: int) -> Tensor:
    """The input of a graph: token numbers (batch, length), or numbers of one of a few shapes."""
    made = torch.Generator().manual_seed(plan.seed % 2**31 + 1000 * batch + length)
    if plan.tokens:
        return torch.randint(0, VOCABULARY, (batch, length), generator=made)
    shapes = ((5, 8), (4, 6), (8,), (6, 8), (3, 6, 6), (4, 4, 5), (12,), (4, 12))
    shape = shapes[random.Random(f"{plan.seed} shape").randrange(len(shapes))]
    return torch.randn(batch, *shape, generator=made, dtype=torch.float64)


def draw(seed: int) -> Plan:
    """The plan of a seed."""
    r = random.Random(f"{seed} plan")
    names = sorted(LAYERS)
    weights = [LAYERS[name][0] for name in names]
    drawn = r.choices(names, weights, k=r.choice((3, 4, 5, 6, 8)))
    return Plan(seed, r.random() < 0.3, tuple((name, r.randrange(2**31)) for name in drawn))


def build(plan: Plan) -> tuple[Generated, Plan]:
    """The module of a plan, and the plan without the layers that did not fit and with what was zeroed."""
    g = Builder(plan, lambda batch, length: example(plan, batch, length))
    r = random.Random(f"{plan.seed} ends")
    used = []
    if plan.tokens and not g.add(_embedding, "embedding", r.randrange(2**31)):
        raise Unfit
    for name, seed in plan.layers:
        if g.add(LAYERS[name][1], name, seed):
            used.append((name, seed))
    results = [g.values[-1]]
    if r.random() < 0.75:
        g.add(_end, "end", r.randrange(2**31))
        results = [g.values[-1]]
    if r.random() < 0.25 and len(g.values) > 3:
        results.append(r.choice(g.values[2:-1]))
    closed = g.close(plan)
    model = Generated(g, plan, results).eval()
    return model, dataclasses.replace(plan, layers=tuple(used), closings=frozenset(closed))


def _embedding(g: Builder, x: Any, r: random.Random) -> Any:
    size = r.choice((6, 8))
    h = g.do(f"{g.part(f'nn.Embedding({VOCABULARY}, {size})')}(x)")
    if r.random() < 0.4:
        h = g.do(f"{h} + {g.part(f'nn.Embedding(9, {size})')}(torch.arange(x.shape[1]))")
    return h


def _end(g: Builder, x: Any, r: random.Random) -> Any:
    dims = tuple(range(1, x.rank - 1))
    h = x
    if dims and r.random() < 0.5:
        h = g.do(r.choice((f"{x}.mean({dims})", f"{x}.amax({dims})", f"{x}.flatten(1, -2)[:, 0]")))
    return linear(g, h, r.choice((2, 3)), r)


# ---- judging


@dataclass
class Verdict:
    """What was found about one graph.

    Attributes:
        kind: ``right``, ``refused``, ``mismatch``, ``crash``, or ``warned``: right, but the analysis caught a rule
        stage: where it went wrong
        what: the gap, or the error
        removed: how many numbers removal took out of tensors, in the plain fold and after gates
        parameters: how many there were
        branches: how many branches left the graph, in both folds
        warned: the first warning that asks for a report: a rule that removal caught being wrong
        seconds: of processor time
        outside: how many of the sizes its graph does not hold for
    """

    kind: str
    stage: str = ""
    what: str = ""
    removed: int = 0
    gated: int = 0
    parameters: int = 0
    branches: int = 0
    seconds: float = 0.0
    outside: int = 0
    warned: str = ""


class Mismatch(Exception):  # noqa: N818  (not an error of the judge)
    """Two functions differ."""


def judge(plan: Plan, only: str = "") -> Verdict:
    """Build the graph of a plan and hold everything to it that has to hold, or what one stage holds to it."""
    started = time.process_time()
    verdict, warnings = Verdict("right"), []
    stage = ["build"]
    try:
        with _limit(), torch.random.fork_rng(devices=[]), torch.no_grad(), _heard() as warnings:
            torch.manual_seed(plan.seed % 2**31)
            _stages(plan, verdict, stage, only)
    except Mismatch as found:
        verdict.kind, verdict.what = "mismatch", str(found)
    except CaptureError as found:
        verdict.kind, verdict.what = ("refused" if stage[0] == "capture" else "crash"), _first(found)
    except Exception as found:
        verdict.kind, verdict.what = "crash", _first(found)
    verdict.stage, verdict.seconds = stage[0], round(time.process_time() - started, 3)
    verdict.warned = next(iter(warnings), "")
    if verdict.kind == "right" and verdict.warned:
        verdict.kind, verdict.what = "warned", verdict.warned
    return verdict


def _stages(plan: Plan, verdict: Verdict, stage: list[str], only: str) -> None:
    model, _ = build(plan)
    hold(model, [{"x": example(plan, *sizes)} for sizes in SIZES], plan.seed, verdict, stage, only)


def hold(
    model: nn.Module,
    inputs: list[dict[str, Tensor]],
    seed: int = 0,
    verdict: Verdict | None = None,
    stage: list[str] | None = None,
    only: str = "",
) -> Verdict:
    """Check everything that has to hold of a module.

    Args:
        model: in fp64 and evaluation mode
        inputs: one set for each of ``SIZES``; it is captured on the first
        seed: for adapters and gates
        verdict, stage: where to note what was removed, and how far it got
        only: the one stage to look at; all by default

    Raises:
        Mismatch: two functions differ
    """
    verdict, stage = verdict or Verdict("right"), stage or [""]

    def looks_at(name: str) -> bool:
        if only in ("", name):
            stage[0] = name
        return only in ("", name)

    first = inputs[0]
    inputs = [given for given in inputs if _taken(model, given)]
    eager = _outputs(model, inputs)
    stage[0] = "capture"
    program = lorafx.capture(model, inputs=first)
    verdict.parameters = sum(value.numel() for value in model.parameters())
    if looks_at("eager after capture"):
        _compare(eager, _outputs(model, inputs))
    # Where the model's code branches on a size, the graph holds for one branch and refuses the others.
    within = [place for place, given in enumerate(inputs) if _allowed(program, given)]
    verdict.outside = len(inputs) - len(within)
    inputs, eager = [inputs[place] for place in within], [eager[place] for place in within]
    if looks_at("captured = eager"):
        _compare(eager, _outputs(program.module().eval(), inputs), program, inputs)
    if looks_at("folded = eager"):
        folded = _fold(program)
        verdict.removed = removed(folded)
        verdict.branches += len(folded.facts("Taken out"))
        _compare(eager, _outputs(folded.module().eval(), inputs), program, inputs)
    if looks_at("LoRA = LoRA folded"):
        lora = Lora(targets="*", rank=_rank(program), allow_empty=True)
        _fold_alike(lorafx.rewrite(program, [lora]), seed, inputs)
    couple = random.Random(f"{seed} couple").random() < 0.5
    if looks_at("gates = gates folded" if couple else "free gates = gates folded"):
        gates = FineGates(targets="*", couple=couple, allow_empty=True)
        folded = _fold_alike(lorafx.rewrite(program, [gates]), seed, inputs)
        if folded is not None:
            verdict.gated = removed(folded)
            verdict.branches += len(folded.facts("Taken out"))
    return verdict


def _fold_alike(program: Program, seed: int, inputs: list[dict[str, Tensor]]) -> Program | None:
    """A program with random values in what was inserted, folded and compared; None where nothing was inserted."""
    if not _randomise(program, seed):
        return None
    folded = _fold(program)
    _compare(_outputs(program.module().eval(), inputs), _outputs(folded.module().eval(), inputs), program, inputs)
    return folded


def _taken(model: nn.Module, given: dict[str, Tensor]) -> bool:
    """Whether the module itself takes the input: a group norm refuses one row of one number a channel, say."""
    try:
        model(x=given["x"].clone())
    except (ValueError, RuntimeError):
        return False
    return True


def _allowed(program: Program, given: dict[str, Tensor]) -> bool:
    """Whether the graph takes the input: its free sizes in their ranges, and those that the code fixed as they are."""
    domain = program.signature.domain
    pairs = zip(given["x"].shape, domain.shapes["x"], strict=True)
    return all(size == held for size, held in pairs if isinstance(held, int)) and domain.allows(domain.sizes(given))


def _fold(program: Program) -> Program:
    return lorafx.fold(program)


def _rank(program: Program) -> int:
    """A rank that every weight allows."""
    return min((2, *(min(site.out_features, site.in_features) for site in program.sites())))


def _randomise(program: Program, seed: int) -> bool:
    """Random adapters, and gates of which some are closed and some ajar; whether there are any."""
    found = False
    chance = torch.Generator().manual_seed(seed % 2**31)
    closed = (-0.4, -1.0, -1.0)[seed % 3]
    for name, value in program.root.named_parameters():
        role = program.roles.get(name)
        if role == "adapter":
            value.data.normal_(std=0.5, generator=chance)
        elif role == "gate":
            value.data.uniform_(closed, 0.7, generator=chance)
        found |= role in ("adapter", "gate")
    return found


def removed(program: Program) -> int:
    """How many numbers ``dead-channels`` took out of tensors."""
    total = 0
    for applied in program.history:
        for row in applied.facts.get("Removed", ()):
            before, after = (eval(row[key]) for key in ("before", "after"))
            total += _product(before) - _product(after)
    return total


def _product(sizes: list[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _outputs(module: nn.Module, inputs: list[dict[str, Tensor]]) -> list[list[Tensor]]:
    return [[t.clone() for t in pytree.tree_leaves(module(x=given["x"].clone()))] for given in inputs]


def _compare(
    want: list[list[Tensor]],
    got: list[list[Tensor]],
    program: Program | None = None,
    inputs: list[dict[str, Tensor]] | None = None,
) -> None:
    """Hold outputs to others, element by element; what rounding within ``program`` explains does not count."""
    slacks: list[list[Tensor]] = []
    for place, (expected, found) in enumerate(zip(want, got, strict=True)):
        for number, (a, b) in enumerate(zip(expected, found, strict=True)):
            where = f"output {number}, input {place}"
            if a.shape != b.shape:
                raise Mismatch(f"{where}: shape {tuple(a.shape)} became {tuple(b.shape)}")
            scale = a.abs().max().clamp(min=1e-12)
            gap = (a - b).abs()
            if not bool((gap < TOLERANCE * scale).all()) and program is not None and inputs is not None:
                slacks = slacks or _slacks(program, inputs)
                gap = (gap - slacks[place][number]).clamp(min=0.0)
            if not bool((gap < TOLERANCE * scale).all()):
                raise Mismatch(f"{where}: off by {float(gap.max() / scale):.1e}")


def _slacks(program: Program, inputs: list[dict[str, Tensor]]) -> list[list[Tensor]]:
    """How far rounding within a program moves each element of each output."""
    graph = to_eval(program)
    still = _outputs(graph.module().eval(), inputs)
    moved = [_outputs(jittered(graph, seed).module().eval(), inputs) for seed in range(SAMPLES)]
    return [
        [slack(value, [other[place][number] for other in moved]) for number, value in enumerate(values)]
        for place, values in enumerate(still)
    ]


def _first(error: Exception) -> str:
    """The error and the line of lorafx it came through last."""
    trace = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in trace if "/lorafx/" in frame.filename or "/passes/" in frame.filename]
    where = f" at {frames[-1].filename.rpartition('/lorafx/')[2]}:{frames[-1].name}" if frames else ""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}{where}: {(lines or [''])[0][:300]}"


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """What the analysis of channels warns of, its own mistakes; printed nowhere. torch's tracer is silent."""

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name in _ANALYSIS:
                said.append(record.getMessage())

    said: list[str] = []
    ours, ear = logging.getLogger("lorafx"), Ear(logging.WARNING)
    before = ours.handlers, ours.propagate
    torchs = logging.getLogger("torch")
    quiet, torchs.disabled = torchs.disabled, True
    ours.handlers, ours.propagate = [ear], False
    try:
        yield said
    finally:
        ours.handlers, ours.propagate = before
        torchs.disabled = quiet


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {_LIMIT_S} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, _LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
