"""What is asked of a family: captured, trained, adapted, gated, closed and exported, each compared with what it was."""

from __future__ import annotations

import inspect
import logging
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorafx
from lorafx.errors import LorafxError, NoSitesError
from lorafx.graph.precision import recast
from lorafx.passes.finegates import FineGates
from lorafx.passes.lora import Lora
from lorafx.public import Program
from lorafx.testing.models import tensors

from .family_models import Family, build

#: batch × length: not the example's, one row, one token; the last row of the others is padded.
SHAPES = ((1, 1), (3, 12), (2, 5))
#: Captured against eager: the same operators on the same numbers; a backward pass may sum in another order.
SAME = 1e-6
#: Two forms of one function in fp64: 1e-16 a rounding, through a few hundred random (hence badly scaled) operators.
EXACT = 1e-10
#: fp32 through other kernels.
CLOSE = 1e-5


@dataclass
class Verdict:
    """What came of one family.

    Attributes:
        verdict: ``exact``, ``refused``, ``crash`` or ``differs``
        stage: where it was decided; empty when exact
        reason: the error's line, or what differs by how much
        where: of a crash: the innermost frames
        differences: the largest one of each stage, relative to the largest value of each output
        notes: what was left out, and why
    """

    family: str
    model: str = ""
    parameters: int = 0
    verdict: str = "exact"
    stage: str = ""
    reason: str = ""
    where: str = ""
    seconds: float = 0.0
    differences: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class DiffersError(Exception):
    """Two things that should be equal are not."""


#: What is checked, in this order.
STAGES = ("evaluation", "training", "lora", "gates", "closing", "onnx")


def examine(name: str, family: Family, stages: Sequence[str] = STAGES) -> Verdict:
    """Run the checks of some stages on one family, up to the first that fails."""
    found = Verdict(name)
    try:
        model = build(family)
        found.model, found.parameters = type(model).__name__, sum(p.numel() for p in model.parameters())
        found.stage = "capture"
        checks = _Checks(family, model, found)
        for stage in stages:
            found.stage = stage
            getattr(checks, stage)()
        found.stage = ""
    except DiffersError as error:
        found.verdict, found.reason = "differs", str(error)
    except LorafxError as error:
        found.verdict, found.reason = "refused", str(error)
        if not _tells(found.reason):
            found.verdict = "crash"
    except Exception as error:  # whatever it is, it is the finding
        found.verdict, found.reason = "crash", f"{type(error).__name__}: {str(error)[:300]}"
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/lorafx/" in frame.filename]
        found.where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-3:]))
    return found


def _tells(line: str) -> bool:
    """Whether an error's text is one line that says more than a class name."""
    return "\n" not in line.strip() and len(line) > 30


class _Checks:
    def __init__(self, family: Family, model: nn.Module, found: Verdict):
        self.family, self.model, self.found = family, model, found
        with _warnings() as said:
            self.program = lorafx.capture(model, inputs=self._inputs(2, 7) if family.own_inputs else None)
        self.quiet = [path for record in said for path in _left_out(record)]
        self.found.notes += [record.getMessage() for record in said]

    # ---- stages

    def evaluation(self) -> None:
        graph, ran = self.program.module().eval(), 0
        for batch, length in self._shapes():
            inputs = self._inputs(batch, length)
            try:
                expected = _outputs(self.model.eval(), inputs)
            except Exception as error:  # what the eager model cannot run need not run
                self.found.notes.append(f"eager fails at {batch}x{length}: {type(error).__name__}")
                continue
            self._compare(f"at {batch}x{length}", expected, _outputs(graph, inputs), SAME)
            ran += 1
        assert ran, "the eager model runs on none of the inputs"

    def training(self) -> None:
        model, graph = self.model.train("" not in self.quiet), self.program.module().train()
        for path in self.quiet:
            model.get_submodule(path).train(False)
        inputs = self._inputs(2, 7)
        expected, expected_gradients = _backward(model, inputs)
        actual, gradients = _backward(graph, inputs)
        self._compare("in outputs", expected, actual, SAME)
        # Up to the order of sums: gradients of a shared weight add up in the order of its uses.
        self._compare("in gradients", expected_gradients, gradients, 10 * CLOSE)
        model.eval()

    def lora(self) -> None:
        program = self._rewritten(
            Lora(rank=2, alpha=4.0), Lora(targets=".*", exclude=("role:head",), rank=2, alpha=4.0)
        )
        if program is None:
            return
        generator = torch.Generator().manual_seed(1)
        values = {name: program.tensor(name) for name in program.names("adapter")}
        program.load({n: 0.3 * torch.randn(v.shape, generator=generator) for n, v in values.items()})
        self._fold(program)

    def gates(self) -> None:
        program = self._rewritten(FineGates(mode="target"))
        if program is None:
            return
        generator = torch.Generator().manual_seed(2)
        values = {name: program.tensor(name) for name in program.names("gate")}
        program.load({n: 1.5 * torch.rand(v.shape, generator=generator) - 1.0 for n, v in values.items()})
        self._fold(program)

    def closing(self) -> None:
        program = recast(self.program, torch.float64)
        close_at_random(program)
        self._fold(program)

    def onnx(self) -> None:
        program = lorafx.fold(self.program)
        with tempfile.TemporaryDirectory() as folder:
            lorafx.export(program, Path(folder) / "onnx", format="onnx")
            exported = _onnx_model(Path(folder) / "onnx")
            for batch, length in self._shapes():
                inputs = self._inputs(batch, length)
                if f"eager fails at {batch}x{length}" in " ".join(self.found.notes):
                    continue
                self._compare(f"at {batch}x{length}", _outputs(self.model, inputs), tensors(exported(**inputs)), CLOSE)

    # ---- what they share

    def _inputs(self, batch: int, length: int) -> dict[str, Any]:
        """Inputs of the family, without those that this model does not take (a mask, say)."""
        known = inspect.signature(self.model.forward).parameters
        return {name: value for name, value in self.family.inputs(batch, length).items() if name in known}

    def _shapes(self) -> tuple[tuple[int, int], ...]:
        return SHAPES if self.family.free_length else tuple((batch, 7) for batch, _ in SHAPES[:2])

    def _rewritten(self, *methods: Any) -> Program | None:
        """Rewritten by the first method that finds a site."""
        for method in methods:
            try:
                return lorafx.rewrite(self.program, [method])
            except NoSitesError as error:
                self.found.notes.append(f"{method.pass_name()}: {error}")
        return None

    def _fold(self, program: Program) -> None:
        """Folded equals unfolded, in fp64."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # what the graph makes without naming a dtype
        try:
            wide = recast(program, torch.float64)
            folded = lorafx.fold(wide)
            before, after = wide.module().eval(), folded.module().eval()
            for batch, length in self._shapes()[1:]:
                inputs = {k: v.double() if v.is_floating_point() else v for k, v in self._inputs(batch, length).items()}
                self._compare(f"at {batch}x{length}", _outputs(before, inputs), _outputs(after, inputs), EXACT)
        finally:
            torch.set_default_dtype(default)

    def _compare(self, where: str, expected: dict[str, Tensor], actual: dict[str, Tensor], tolerance: float) -> None:
        missing = expected.keys() ^ actual.keys()
        if missing:
            raise DiffersError(f"{where}: {sorted(missing)[0]} is on one side only")
        largest = max((_difference(expected[key], actual[key]), key) for key in expected)
        known = self.found.differences.get(self.found.stage, 0.0)
        self.found.differences[self.found.stage] = max(known, largest[0])
        if not largest[0] <= tolerance:
            raise DiffersError(f"{where}: {largest[1]} by {largest[0]:.1e}")


def close_at_random(program: Program, share: float = 0.3, seed: int = 3) -> None:
    """Zero rows, columns and biases of weights at random, in place. Routers keep their rows: equal scores are ties,
    and how those are broken is rounding."""
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> Tensor:
        return (torch.rand(count, generator=generator) < share).nonzero().flatten()

    for site in {site.parameter: site for site in program.sites()}.values():
        value = program.tensor(site.parameter).data
        rows = int(site.kind == "addmm")
        if site.role != "router":
            chosen = some(value.shape[rows])
            value.index_fill_(rows, chosen, 0.0)
            if site.bias is not None and torch.rand(1, generator=generator) < 0.7:
                program.tensor(str(site.bias.target)).data.index_fill_(0, chosen, 0.0)
        value.index_fill_(1 - rows, some(value.shape[1 - rows]), 0.0)


def _onnx_model(folder: Path) -> Callable[..., Any]:
    from transformers.exporters.base import ExportedModel

    return ExportedModel.from_pretrained(folder)


class _Kept(logging.Handler):
    """Keeps warnings in a list."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def _warnings() -> Iterator[list[logging.LogRecord]]:
    """What lorafx's capture warns of."""
    handler = _Kept()
    logger = logging.getLogger("lorafx")
    logger.addHandler(handler)
    try:
        yield handler.records
    finally:
        logger.removeHandler(handler)


def _left_out(record: logging.LogRecord) -> list[str]:
    """Paths of the modules whose training mode was left out of the capture; the empty path for the whole model."""
    said = record.getMessage()
    if "evaluation mode only" in said:
        return [""]
    _, found, paths = said.partition("captured without them: ")
    return ["" if path == "(the model itself)" else path for path in paths.split(", ")] if found else []


def _outputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # a model may be random in evaluation, too
        return tensors(model(**inputs, **_cacheless(model)))


def _cacheless(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _backward(model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of a training forward, noise drawn from one seed."""
    model.zero_grad(set_to_none=True)
    kept = {name: value.clone() for name, value in model.named_buffers()}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(3)
        outputs = {k: v for k, v in tensors(model(**inputs, **_cacheless(model))).items() if v.is_floating_point()}
    # Any fixed weighting of all outputs will do for a loss.
    losses = [
        (value * torch.linspace(-1, 1, value.numel()).view(value.shape)).sum()
        for value in outputs.values()
        if value.requires_grad
    ]
    torch.stack(losses).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():  # running statistics are shared by both sides
        for name, value in model.named_buffers():
            value.copy_(kept[name])
    return {key: value.detach() for key, value in outputs.items()}, gradients


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest difference relative to the largest value; infinite where shapes or non-finite values differ."""
    if a.shape != b.shape:
        return float("inf")
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].isnan(), b[~finite].isnan()):
        return float("inf")
    if not finite.any():
        return 0.0
    largest = float(a[finite].abs().max())
    apart = float((a[finite].double() - b[finite].double()).abs().max())
    return apart / largest if largest else (0.0 if apart == 0 else float("inf"))
