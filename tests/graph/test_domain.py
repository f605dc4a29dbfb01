"""The sizes a graph is right for: what a trace concluded is held in every call, in training and in what is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import transformers as hf
from torch import Tensor, nn

import lorafx
from lorafx.errors import CaptureError, UsageError
from lorafx.graph.domain import Domain, Range, _always, domain_of
from lorafx.parity.inputs import Generator, InputSpec
from lorafx.passes.lora import Lora
from lorafx.proof.open import open_runner
from lorafx.training.data import positions
from tests import small


class Model(nn.Module):
    """Two layers and a function of them: ``f(self, **inputs)``."""

    def __init__(self, f: Any):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.f = nn.Linear(8, 8), nn.Linear(8, 8), f

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.f(self, x, y)


def branch(wanted: Any) -> Model:
    return Model(lambda s, x, y: s.a(x) if wanted(x, y) else s.b(x)).eval()


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def agrees(model: nn.Module, program: lorafx.Program, *shapes: tuple[int, ...]) -> None:
    """The program gives what the eager model gives; a rewritten one with adapters that are still zero, too."""
    inputs = dict(zip(("x", "y"), (rows(*shape) for shape in shapes), strict=False))
    for candidate in (program, lorafx.rewrite(program, [Lora(targets="all-linear", rank=2)])):
        torch.testing.assert_close(candidate.module().eval()(**inputs), model(**inputs))


# ---- ranges


@pytest.mark.parametrize(
    ("wanted", "example", "inside", "outside", "said"),
    [
        (lambda x, y: x.shape[0] <= 4, (2, 8), [(1, 8), (4, 8)], (6, 8), "dimension 0 of input 'x' is 6.* 1 to 4"),
        (lambda x, y: x.shape[0] > 4, (6, 8), [(5, 8), (9, 8)], (4, 8), "dimension 0 of input 'x' is 4.* 5 or more"),
        (lambda x, y: x.shape[0] == 1, (2, 8), [(2, 8), (9, 8)], (1, 8), "dimension 0 of input 'x' is 1.* 2 or more"),
    ],
)
def test_a_branch_on_a_size_holds_the_range_that_was_traced(
    wanted: Any, example: tuple[int, ...], inside: list[tuple[int, ...]], outside: tuple[int, ...], said: str
):
    model = branch(wanted)
    program = lorafx.capture(model, inputs={"x": rows(*example)})
    for shape in inside:
        agrees(model, program, shape)
    for module in (program.module(), program.module().eval(), lorafx.fold(program).module()):
        with pytest.raises(UsageError, match=said):
            module(x=rows(*outside))


@pytest.mark.parametrize(
    ("relation", "always"),
    [
        ("Min(4, n) <= n", True),
        ("n >= Min(2048, n)", True),
        ("Min(4, n) < n + 1", True),
        ("2 * Min(4, n) <= 2 * n", True),
        ("n <= Max(4, n)", True),
        ("Max(1, n - 4) <= n", True),
        ("-Max(m, n) < 0", True),
        ("Min(4, n) < n", False),
        ("n <= Min(4, n)", False),
        ("Max(4, n) <= n", False),
        ("-Min(4, n) <= -n", False),
        ("Min(m, n) <= 4", False),
        ("n <= m", False),
        ("Ne(n, 4)", False),
    ],
)
def test_relations_that_hold_for_all_sizes_are_known(relation: str, always: bool):
    m, n = sympy.symbols("m n", integer=True, positive=True)
    known: dict[str, Any] = {"m": m, "n": n}
    found: Any = sympy.parse_expr(relation, known, evaluate=False)
    assert _always(found) == always
    sizes = [{m: a, n: b} for a in range(1, 9) for b in range(1, 9)]
    assert all(bool(found.subs(given)) for given in sizes) == always


def test_what_always_holds_is_no_relation():
    class Best(nn.Module):
        """As indexers do that attend to the few tokens that matter most: of a short text to all."""

        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids.float().topk(min(4, input_ids.shape[1]), dim=1).values.sum(1)

    model = Best().eval()
    program = lorafx.capture(model, inputs={"input_ids": torch.arange(14).view(2, 7)})
    assert program.signature.domain.relations == ()
    for length in (1, 3, 4, 9):
        ids = torch.arange(3 * length).view(3, length)
        assert torch.equal(program.module().eval()(input_ids=ids), model(ids))


def test_relations_between_sizes_are_held():
    model = branch(lambda x, y: y.shape[0] > x.shape[0])
    program = lorafx.capture(model, inputs={"x": rows(2, 8), "y": rows(2, 8)}, dynamic=False)
    assert not program.signature.dynamic_shapes

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, ids: Tensor, other: Tensor) -> Tensor:
            value = self.layer(nn.functional.one_hot(ids, 8).float()).sum((1, 2))
            wide = other.shape[1] > ids.shape[1]
            return value * 2 if wide else value

    eager = Both().eval()

    def inputs(batch: int, length: int, target: int) -> dict[str, Tensor]:
        return {name: torch.ones(batch, size, dtype=torch.long) for name, size in (("ids", length), ("other", target))}

    shapes = {"ids": torch.ones(2, 4, dtype=torch.long), "decoder_other": torch.ones(2, 6, dtype=torch.long)}

    class Named(Both):
        def forward(self, ids: Tensor, decoder_other: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(ids, decoder_other)

    named = Named().eval()
    named.load_state_dict(eager.state_dict())
    program = lorafx.capture(named, inputs=shapes)
    module = program.module().eval()
    for batch, length, target in ((2, 4, 6), (3, 5, 6), (1, 2, 9)):
        given = inputs(batch, length, target)
        assert torch.equal(module(ids=given["ids"], decoder_other=given["other"]), eager(**given))
    with pytest.raises(UsageError, match=r"holds where decoder_other.shape\[1\] > ids.shape\[1\]"):
        module(ids=torch.ones(2, 6, dtype=torch.long), decoder_other=torch.ones(2, 6, dtype=torch.long))


def test_a_size_that_has_to_be_even():
    model = branch(lambda x, y: x.shape[0] % 2 == 0)
    program = lorafx.capture(model, inputs={"x": rows(2, 8)})
    agrees(model, program, (8, 8))
    with pytest.raises(UsageError, match=r"the graph holds where .*x.shape\[0\] % 2"):
        program.module()(x=rows(3, 8))
    with pytest.raises(UsageError, match="ONNX model cannot check"):
        lorafx.export(program, Path("unused"), format="onnx")


def test_sizes_that_are_one_stay_one():
    model = Model(lambda s, x, y: s.a(x) + y[:, :8] + y.shape[1]).eval()
    program = lorafx.capture(model, inputs={"x": rows(2, 8), "y": rows(2, 9)})
    with pytest.raises(UsageError, match=r"dimension 0 of input 'y' is 1, and has to be x.shape\[0\], that is 3"):
        program.module()(x=rows(3, 8), y=rows(1, 9))
    with pytest.raises(UsageError, match="dimension 1 of input 'y' is 10, and the graph holds for 9"):
        program.module()(x=rows(3, 8), y=rows(3, 10))
    with pytest.raises(UsageError, match="input 'y' is a tensor of 2 axes in its graph, not 3 axes"):
        program.module()(x=rows(3, 8), y=rows(3, 9, 1))


class PastTheTracer(nn.Module):
    """Reads the example's size where the tracer does not see it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        size: Any = x.shape[0]
        return self.layer(x) * (size.node.hint if isinstance(size, torch.SymInt) else size)


def test_a_graph_that_is_wrong_at_other_sizes_is_no_capture():
    with pytest.raises(CaptureError, match=r"computes something else as a graph \(x.shape\[0\] = 5\)"):
        lorafx.capture(PastTheTracer(), inputs={"x": rows(2, 8)})
    program = lorafx.capture(PastTheTracer(), inputs={"x": rows(2, 8)}, dynamic=False)
    with pytest.raises(UsageError, match="dimension 0 of input 'x' is 3, and the graph holds for 2"):
        program.module()(x=rows(3, 8))


# ---- where else ranges are held


class ShortTexts(hf.BertForSequenceClassification):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:  # type: ignore[override]
        result: Any = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        if input_ids.shape[1] > 12:
            result.logits = -result.logits
        return result


def test_training_keeps_to_the_lengths_of_the_graph():
    program = lorafx.capture(ShortTexts(small.bert_config()).eval())
    assert program.signature.domain.bounds("input_ids", 1) == Range(1, 12)
    assert positions(program) == 12


@pytest.mark.parametrize(("kind", "said"), [("onnx", "dimension 0 of input x has to be 1 to 4"), ("pt2", "<= 4")])
def test_an_exported_model_refuses_the_sizes_that_its_program_refuses(tmp_path: Path, kind: Any, said: str):
    program = lorafx.capture(branch(lambda x, y: x.shape[0] <= 4), inputs={"x": rows(2, 8)})
    result = lorafx.export(program, tmp_path / "out", format=kind)
    assert result is not None
    assert result.ok
    assert {case.inputs for case in result.cases} >= {"batch 1", "batch 4"}, "the ends are compared"
    run = open_runner(tmp_path / "out", trust_remote_code=True)
    with pytest.raises(Exception, match=said):
        run({"x": rows(6, 8)})


def test_an_export_of_one_size_is_of_one_size(tmp_path: Path):
    program = lorafx.capture(branch(lambda x, y: x.shape[0] <= 4), inputs={"x": rows(2, 8)}, dynamic=False)
    lorafx.export(program, tmp_path / "out", format="onnx")
    with pytest.raises(Exception, match="Got: 6 Expected: 2"):
        open_runner(tmp_path / "out")({"x": rows(6, 8)})


def test_made_up_inputs_keep_to_the_ranges_and_reach_their_ends():
    ids = InputSpec("input_ids", torch.long, (None, None), 0, 50, {0: Range(2, 4), 1: Range(3, 9)})
    shapes = [tuple(batch.values["input_ids"].shape) for batch in Generator((ids,)).batches([(1, 5), (8, 20)])]
    assert shapes == [(2, 5), (4, 9), (4, 5), (2, 3), (2, 9)]


def test_a_relation_that_divides_by_nothing_does_not_hold() -> None:
    domain = Domain({"x": ("s", "t")}, {"s": Range(1), "t": Range(1)}, ("s % (t // 2) == 0",))
    assert domain.allows({"s": 4, "t": 4})
    assert not domain.allows({"s": 4, "t": 1})
    with pytest.raises(UsageError, match="the graph holds where"):
        domain.check({"x": torch.zeros(4, 1)}, "a model")


@pytest.mark.parametrize(
    ("relation", "end", "holds"),
    [
        ("(((-1) + 2*s) % s) != 0", 511, True),  # of XLNet's shift, but for one token
        ("s != 80", 511, False),
        ("s != 80", 79, True),
        ("s != 80", None, False),
        ("s != 80", 1 << 20, False),
        ("s != t + 80", 60, False),
    ],
)
def test_a_relation_that_all_sizes_satisfy_is_none(relation: str, end: int | None, holds: bool) -> None:
    domain = Domain({"x": ("s", "t")}, {"s": Range(2, end), "t": Range(2, 60)}, (relation,))
    assert domain.implied(relation) is holds


class Shifted(nn.Module):
    """Whether twice a length less one is a multiple of the length decides: of one token alone it is."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[1] <= 60 and (2 * x.shape[1] - 1) % x.shape[1] else x


def test_a_graph_keeps_no_relation_that_holds_anyway() -> None:
    x, shapes = torch.ones(2, 7), {"x": {1: torch.export.Dim.AUTO}}
    exported = torch.export.export(Shifted(), (), {"x": x}, dynamic_shapes=shapes)
    domain = domain_of(exported, {"x": x}, ("x",), None)
    assert [*domain.ranges.values()] == [Range(2, 60)]
    assert domain.relations == ()
