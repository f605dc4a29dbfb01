"""Affine regions: what may take over a map, what is left alone, coming to rest, and graphs of any depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lorafx
from lorafx.base import Pass
from lorafx.graph.constants import Constants
from lorafx.passes.finegates import Finegates
from lorafx.passes.fold_affine import FoldAffine
from lorafx.passes.fold_constants import FoldConstants
from lorafx.passes.lora import Lora
from lorafx.passes.tidy import Tidy
from lorafx.passes.to_eval import ToEval
from lorafx.pipeline import run
from lorafx.public import Program

#: Everything that folds, and nothing that removes.
FOLD: tuple[Pass, ...] = (ToEval(), FoldConstants(), FoldAffine(), Tidy())


class Net(nn.Module):
    """A module from a function of itself and its input, and its parts."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64))


def linear(ins: int, outs: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(ins, outs, bias, dtype=torch.float64)


def mask(*shape: int) -> Tensor:
    return (torch.rand(*shape) > 0.4).double()


def program_of(model: nn.Module, x: Tensor, *steps: Pass) -> Program:
    """The rewritten model, its adapters and gates as if trained."""
    program = lorafx.capture(model.double().eval(), inputs={"x": x}, dynamic=False)
    program = lorafx.rewrite(program, list(steps)) if steps else program
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in program.trainable().items():
            if program.roles[name] == "gate":
                value.uniform_(-0.4, 0.5)
            elif program.roles[name] == "adapter":
                value.normal_()
    return program


def folded(program: Program) -> Program:
    """Folded, and still the same function."""
    result = run(program, FOLD)
    with torch.no_grad():
        want, got = (p.module().eval()(**program.example) for p in (program, result))
    # Rounding, of values that chains of operators make large.
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    return result


def inserted(program: Program) -> list[str]:
    """The adapters and gates that are still read."""
    names = (str(node.target) for node in program.graph.find_nodes(op="get_attr"))
    return [name for name in names if program.roles.get(name) in ("adapter", "gate")]


def operators(program: Program) -> int:
    return sum(node.op == "call_function" for node in program.graph.nodes)


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ---- what stands before a weight

BEFORE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a masked weight": (
        lambda: Net(lambda s, x: s.o(functional.linear(x, s.w * s.t)), w=weight(6, 8), t=mask(6, 8), o=linear(6, 4)),
        (2, 5, 8),
    ),
    "a masked weight of one width": (
        lambda: Net(lambda s, x: s.o(functional.linear(x, s.w * s.t)), w=weight(8, 8), t=mask(8, 8), o=linear(8, 8)),
        (2, 5, 8),
    ),
    "a masked weight turned": (
        lambda: Net(lambda s, x: s.o(x @ (s.w * s.t)), w=weight(8, 6), t=mask(8, 6), o=linear(6, 4)),
        (2, 5, 8),
    ),
    "a masked table": (
        lambda: Net(lambda s, x: s.o(functional.embedding(x, s.w * s.t)), w=weight(9, 5), t=mask(9, 1), o=linear(5, 5)),
        (),
    ),
    "a masked convolution": (
        lambda: Net(
            lambda s, x: s.o(functional.conv2d(x, s.w * s.t)),
            w=weight(4, 4, 2, 2),
            t=mask(4, 4, 2, 2),
            o=nn.Conv2d(4, 4, 1),
        ),
        (2, 4, 6, 6),
    ),
    "nothing but itself": (lambda: Net(lambda s, x: s.o(s.a(x) - s.a(x)), a=linear(8, 6), o=linear(6, 4)), (2, 5, 8)),
    "a value minus itself": (
        lambda: Net(lambda s, x: s.o((lambda y: y - y)(s.a(x))), a=linear(8, 8), o=linear(8, 8)),
        (2, 5, 8),
    ),
    "a difference": (
        lambda: Net(lambda s, x: s.o(x * s.g - s.a(x)), g=weight(8), a=linear(8, 8), o=linear(8, 8)),
        (2, 5, 8),
    ),
    "a matrix added": (
        lambda: Net(lambda s, x: s.o(torch.addmm(s.b, x, s.w)), b=weight(5, 6), w=weight(8, 6), o=linear(6, 4)),
        (5, 8),
    ),
    "another product and a sum": (
        lambda: Net(
            lambda s, x: s.o(s.a(x) + s.c(x) * s.g), g=weight(6), a=linear(8, 6), c=linear(8, 6), o=linear(6, 6)
        ),
        (2, 5, 8),
    ),
}


@pytest.mark.parametrize("adapted", [False, True], ids=["alone", "lora"])
@pytest.mark.parametrize("name", BEFORE)
def test_a_weight_takes_over_nothing_that_stays_before_it(name: str, adapted: bool) -> None:
    torch.manual_seed(0)
    build, shape = BEFORE[name]
    x = x_of(*shape) if shape else torch.tensor([[1, 4, 8], [0, 3, 3]])
    program = program_of(build(), x, *([Lora(targets="o", rank=2)] if adapted else []))
    result = folded(program)
    assert not inserted(result)
    assert not FoldAffine().sites(result).taken


def test_a_map_before_a_weight_folds_into_it() -> None:
    """``W (g x + B A x)``: nothing but W is left."""
    parts = {"g": weight(8), "a": linear(8, 2, False), "b": linear(2, 8, False), "o": linear(8, 6)}
    result = folded(program_of(Net(lambda s, x: s.o(x * s.g + s.b(s.a(x))), **parts), x_of(2, 5, 8)))
    assert operators(result) == 1


def test_a_bias_that_is_part_of_a_tensor_stays_one() -> None:
    parts = {"o": linear(8, 6, False), "b": weight(12)}
    model = Net(lambda s, x: functional.linear(x, s.o.weight, s.b.chunk(2)[1]) * torch.relu(s.b[:6]), **parts)
    program = program_of(model, x_of(2, 5, 8), Lora(targets="o", rank=2))
    assert not inserted(folded(program))


def test_a_cast_on_the_way_stays_where_dtypes_need_it() -> None:
    """A scale in fp32 on a half-precision value: who reads the product finds fp32, and may not find anything else."""
    model = Net(lambda s, x: s.o(x.half() * s.g), g=nn.Parameter(torch.randn(8)), o=nn.Linear(8, 6))
    program = lorafx.capture(model.eval(), inputs={"x": torch.randn(2, 5, 8)}, dynamic=False)
    result = run(program, FOLD)
    with torch.no_grad():
        want, got = (p.module().eval()(**program.example) for p in (program, result))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)


# ---- several regions in one round


def test_regions_that_meet_fold_in_one_round() -> None:
    """What one region keeps, another one may have put something else in the place of; results are readers, too."""
    layers = nn.ModuleList([linear(8, 8), linear(8, 8), linear(8, 12)])

    def function(s: Any, x: Tensor) -> Any:
        h = s.layers[0](x)
        return s.layers[1](h), s.layers[2](h), h

    for steps in ([Finegates(couple=False)], [Lora(rank=2), Finegates(couple=False)], [Lora(rank=2)]):
        result = folded(program_of(Net(function, layers=layers), x_of(2, 5, 8), *steps))
        assert not inserted(result)
        assert operators(result) == 3


def test_what_one_region_folds_into_is_not_what_another_reads() -> None:
    """A tied weight, adapted in one module; the other one's map is made of the weight as it was."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.a, self.b = weight(8, 8), weight(2, 8), weight(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight) + functional.linear(functional.linear(x, self.a), self.b)

    class Turned(nn.Module):
        def __init__(self, tied: nn.Parameter) -> None:
            super().__init__()
            self.weight, self.o = tied, weight(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x @ (2 * self.weight), self.o)

    first = Adapted()
    model = Net(lambda s, x: (s.first(x), s.second(x)), first=first, second=Turned(first.weight))
    assert operators(folded(program_of(model, x_of(2, 5, 8)))) == 2


# ---- any depth


def repeat(count: int, step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    for _ in range(count):
        x = step(x)
    return x


def test_many_linears() -> None:
    """More than calls fit on the stack; in a base model they are one."""
    model = Net(lambda s, x: s.layers(x), layers=nn.Sequential(*(linear(4, 4) for _ in range(180))))
    program = program_of(model, x_of(2, 4))
    assert operators(folded(program)) == 1
    adapted = folded(lorafx.rewrite(program, [Lora(rank=1)]))
    assert operators(adapted) == 180
    assert not inserted(adapted)


def test_many_gates_come_to_rest() -> None:
    """A region sees a few operators at a time, so a long way takes many rounds; each leaves fewer operators."""

    def function(s: Any, x: Tensor) -> Tensor:
        for gate in s.gates:
            x = x * gate
        return s.o(x)

    # Of two dimensions: one-dimensional parameters of a base, its norms' say, are no reason to fold.
    gates = nn.ParameterList(nn.Parameter(torch.rand(1, 4, dtype=torch.float64) + 0.5) for _ in range(180))
    assert operators(folded(program_of(Net(function, gates=gates, o=linear(4, 4)), x_of(2, 4)))) == 1


def twice(value: Tensor) -> Tensor:
    return value * 0.5 + value


def test_a_constant_used_twice_again_and_again_is_computed_once() -> None:
    """``c ← c/2 + c``, sixty times: 2⁶⁰ ways through it."""
    c = torch.rand(8, dtype=torch.float64) * 1e-9
    model = Net(lambda s, x: s.o(x * repeat(60, twice, s.c)), c=c, o=linear(8, 8))
    program = program_of(model, x_of(2, 8), Lora(rank=2))
    assert not inserted(folded(program))
    constants = Constants(program.root)
    known = [node for node in program.graph.nodes if node.op == "call_function" and constants.reads(node) == {"c"}]
    torch.testing.assert_close(constants.value(known[-1]), repeat(60, twice, c))
    assert len({constants.key(node) for node in known}) == 120
    assert len(repr(constants.key(known[-1]))) < 100


def test_a_value_used_twice_again_and_again_is_one_map() -> None:
    model = Net(lambda s, x: repeat(40, twice, s.c(x)) * 1e-7, c=nn.Conv2d(4, 4, 1))
    result = folded(program_of(model, x_of(2, 4, 3, 3), Lora(targets="c", rank=2)))
    assert not inserted(result)
