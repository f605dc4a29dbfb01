"""Observers: a pass that does not keep its promise is caught, and graphs are dumped pass by pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import lorafx
from lorafx.apply import Dump
from lorafx.base import Pass, Promise
from lorafx.errors import ParityError, UsageError
from lorafx.graph.edit import Edit
from lorafx.graph.precision import recast
from lorafx.graph.program import Program
from lorafx.graph.selection import Selection
from lorafx.parity.promises import VerifyEach
from lorafx.passes.lora import Lora
from lorafx.pipeline import run
from tests.small import adapted, bert, captured, own

aten = torch.ops.aten


@dataclass(frozen=True)
class Nudge(Pass):
    """Multiply the classifier's bias, whatever the promise says."""

    promise: ClassVar[Promise] = Promise.EXACT
    factor: float = 1.0

    def sites(self, program: Program) -> Selection:
        return Selection(("classifier.bias",))  # type: ignore[arg-type]

    def rewrite(self, edit: Edit, site: Any) -> None:
        with torch.no_grad():
            own(edit.program.root, site).mul_(self.factor)


@dataclass(frozen=True)
class Close(Nudge):
    promise: ClassVar[Promise] = Promise.CLOSE


@dataclass(frozen=True)
class Shapes(Nudge):
    promise: ClassVar[Promise] = Promise.SHAPES


@dataclass(frozen=True)
class Nothing(Nudge):
    promise: ClassVar[Promise] = Promise.NOTHING


@dataclass(frozen=True)
class Cut(Pass):
    """Return the first class only."""

    promise: ClassVar[Promise] = Promise.SHAPES

    def sites(self, program: Program) -> Selection:
        return Selection(tuple(program.graph.output_node().all_input_nodes))  # type: ignore[arg-type]

    def rewrite(self, edit: Edit, site: Any) -> None:
        with edit.after(site):
            edit.replace(site, edit.call(aten.slice.Tensor, site, 1, 0, 1))


@pytest.fixture(scope="module")
def program() -> Program:
    result = captured(bert).copy()
    with torch.no_grad():
        own(result.root, "classifier.bias").fill_(1.0)
    return result


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("honest", "lying"),
    [(Nudge(), Nudge(factor=1 + 1e-6)), (Close(factor=1 + 1e-14), Close(factor=1 + 1e-3)), (Shapes(factor=3.0), Cut())],
)
def test_a_pass_is_held_to_its_promise(program: Program, honest: Pass, lying: Pass, double: bool) -> None:
    observers = [VerifyEach(double=double)]
    assert run(program, [honest], observers).history[-1].step is honest
    with pytest.raises(ParityError, match=f"'test-observe' promised {lying.promise.value} outputs, but logits"):
        run(program, [honest, lying], observers)


def test_the_last_bit_is_a_kernels_choice_and_no_more(program: Program) -> None:
    double = recast(program, torch.float64)
    assert run(double, [Nudge(factor=1 + 2.3e-16)], [VerifyEach()]).history[-1].proof
    for factor in (1 + 1e-11, 1 + 1.2e-7):
        with pytest.raises(ParityError, match="promised exact"):
            run(double, [Nudge(factor=factor)], [VerifyEach()])
    with pytest.raises(ParityError, match="promised exact"):  # one bit of fp32 is many of fp64
        run(program, [Nudge(factor=1 + 1.2e-7)], [VerifyEach()])


def test_a_promise_of_nothing_is_not_checked(program: Program) -> None:
    run(program, [Nothing(factor=100.0)], [VerifyEach(), VerifyEach(double=True)])


def test_fp64_finds_what_rounding_hides(program: Program) -> None:
    small = Close(factor=1 + 1e-8)
    run(program, [small], [VerifyEach()])
    with pytest.raises(ParityError):
        run(program, [small], [VerifyEach(double=True)])


def test_real_passes_keep_their_promises_in_fp64() -> None:
    """Fold rounds the merged weight to fp32, which is no mistake: in fp64 its algebra is exact."""
    observer = VerifyEach(double=True)
    torch.manual_seed(3)
    lorafx.rewrite(captured(bert), [Lora(rank=2)])
    plain = torch.rand(1)
    torch.manual_seed(3)
    lorafx.rewrite(captured(bert), [Lora(rank=2)], [observer])
    assert torch.equal(torch.rand(1), plain)  # verifying draws no random numbers of the caller's
    folded = lorafx.fold(adapted(captured(bert), Lora(rank=2)), [observer])
    assert not folded.names("adapter")


def test_a_program_without_weights_cannot_be_verified(tmp_path: Path) -> None:
    model: Any = bert()
    model.config.architectures = ["BertForSequenceClassification"]
    model.config.save_pretrained(tmp_path)
    program = lorafx.capture(tmp_path, meta=True)
    with pytest.raises(UsageError, match="without weights"):
        lorafx.rewrite(program, [Lora(rank=2)], [VerifyEach()])


def test_dump_writes_the_graph_after_each_pass(program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "graphs" / "here"
    result = lorafx.rewrite(program, [Lora(rank=2), Nudge()], [Dump(folder)])
    assert sorted(file.name for file in folder.iterdir()) == ["01-lora.txt", "02-test-observe.txt"]
    text = (folder / "01-lora.txt").read_text(encoding="utf-8")
    assert "lora_A" in text
    assert (folder / "02-test-observe.txt").read_text(encoding="utf-8") == str(result.graph)
