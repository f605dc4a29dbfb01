"""FineGates: the gates, what drives them to close, and what they leave alone, against plain arithmetic."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

import lorafx
from lorafx.errors import NoSitesError, RecipeError, UsageError
from lorafx.graph import program as data
from lorafx.graph.precision import recast
from lorafx.methods.gates import ClampedGaussian, is_open, kept_share
from lorafx.passes.finegates import Finegates
from lorafx.passes.fold_affine import FoldAffine
from lorafx.passes.fold_constants import FoldConstants
from lorafx.passes.to_eval import ToEval
from lorafx.pipeline import run
from lorafx.public import Program
from lorafx.reporting.report import report_of
from lorafx.training.module import RewrittenModel
from tests.methods import EVERY, batch, fit, layer, refused, rewritten, state_of, stirred, tower, training
from tests.small import captured, llama

SIDES = ("gate_in", "gate_out")


def apart(**options: Any) -> Finegates:
    """With rows and columns gated one by one, as in the paper."""
    return Finegates(couple=False, **options)


def masked(program: data.P) -> data.P:
    """Gates folded into the weights, closed channels still there as zeros."""
    return run(program, (ToEval(), FoldConstants(), FoldAffine()))


def test_roberta_base_has_165_888_gates(tmp_path: Path) -> None:
    config = hf.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    config.save_pretrained(tmp_path)
    program = lorafx.capture(tmp_path, task="text-classification", meta=True)
    base = sum(value.numel() for value in program.source.model.parameters())
    program = lorafx.rewrite(program, [apart(train_biases=False, trainable=())])
    gates = sum(program.tensor(name).numel() for name in program.names("gate"))
    assert gates == 165_888
    assert sum(value.numel() for value in program.trainable().values()) == gates
    assert round(100 * gates / base, 2) == 0.13


class _Reads(TorchDispatchMode):
    """Notes the operators that read what parameters hold."""

    def __init__(self, program: data.Program):
        super().__init__()
        self.own = {value.data_ptr() for value in program.root.parameters()}
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [value for value in args if isinstance(value, Tensor) and not isinstance(value, FakeTensor)]
        if func is not torch.ops.aten.detach.default and any(value.data_ptr() in self.own for value in given):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_gates_are_put_in_without_reading_a_weight() -> None:
    """A decoder larger than memory is mapped, and gates cost what their weights' shapes say."""
    program = captured(llama)
    with _Reads(program) as reads:
        gated = lorafx.rewrite(program, [Finegates(trainable=())], check=False)
    assert gated.names("gate")
    assert reads.seen == []


def test_the_surrogate_leaves_less_than_it_says() -> None:
    ends = ClampedGaussian.open_probability(torch.tensor([-40.0, 40.0], dtype=torch.float64), 0.5)
    assert [round(float(end), 3) for end in ends] == [0.159, 0.999]
    assert round(float(ends[1] - ends[0]), 3) == 0.840
    left = (0.6 - float(ends[0])) / float(ends[1] - ends[0])
    assert round(left, 3) == 0.525
    assert round(100 * left**2, 1) == 27.6
    # Where the surrogate's mean is k = 0.6 with gates all open or all shut, its loss is 0 and that share is open.
    model = training(apart(mode="target", target=0.4, strength=50.0, trainable=()), base=wide_tower())
    state = state_of(model)
    with torch.no_grad():
        for site in state.sites:
            for side in ("gate_in", "gate_out"):
                site[side].fill_(-40.0)[: round(left * site[side].numel())] = 40.0
    penalty = model.penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.0, abs=50 * 0.84 / 400)  # half a gate of 200
    (shown,) = report_of(model.program).sections["finegates: Gates"]
    assert shown["weights kept"] == pytest.approx(0.276, abs=0.003)


def wide_tower() -> Program:
    return tower(1, 200, 200)


HALF = apart(trainable=(), train_biases=False)


def gated() -> tuple[RewrittenModel, dict[str, Tensor]]:
    """A linear with the identity for weight, and its gates."""
    model = layer(1.0, HALF)
    return model, state_of(model).sites[0].tensors


def test_gates_differ_per_forward_in_training_and_are_constant_in_evaluation() -> None:
    model, tensors = gated()
    with torch.no_grad():
        tensors["gate_in"].fill_(5.0)
        tensors["gate_out"].fill_(0.0)
        torch.manual_seed(0)
        draws = [model.train()(x=torch.ones(3, 5, 16)) for _ in range(400)]
        evaluated = [model.eval()(x=torch.ones(3, 5, 16)) for _ in range(2)]
    assert all(torch.equal(draw, draw[0, 0].expand(3, 5, 16)) for draw in draws), "all tokens share one draw"
    assert not torch.equal(draws[0], draws[1])
    seen = torch.stack([draw[0, 0] for draw in draws])
    # tanh 0 + ½ + 0.1 ε; 6,400 draws: mean and deviation within five of their own deviations.
    assert float(seen.mean()) == pytest.approx(0.5, abs=5 * 0.1 / 80)
    assert float(seen.std()) == pytest.approx(0.1, abs=5 * 0.1 / math.sqrt(2 * 6400))
    assert torch.equal(evaluated[0], torch.full((3, 5, 16), 0.5))
    assert torch.equal(evaluated[0], evaluated[1])


def test_gates_multiply_columns_before_and_rows_and_bias_after() -> None:
    base = tower(1, dtype=torch.float64)
    model = training(apart(targets=("key", "down_proj"), trainable=()), base=base)
    stirred(model.program)
    eager = copy.deepcopy(base.source.model)
    with torch.no_grad():
        for site in state_of(model).sites:
            rows, columns = (((site[s].tanh() + 0.5).clamp(0, 1)) for s in ("gate_out", "gate_in"))
            layer: Any = eager.get_submodule(site.module)
            layer.weight.copy_(torch.diag(rows) @ layer.weight @ torch.diag(columns))
            if layer.bias is not None:
                layer.bias.mul_(rows)
        expected = eager.eval()(**batch(4, 5))
        torch.testing.assert_close(model.eval()(**batch(4, 5)), expected, rtol=1e-12, atol=1e-12)  # fp64


def test_no_side_is_ever_empty() -> None:
    model = training(apart(mode="penalty"), total_steps=10)
    best = {}
    for number, site in enumerate(state_of(model).sites):
        for side in ("gate_in", "gate_out"):
            with torch.no_grad():
                site[side].copy_(torch.linspace(-6.0, -3.0, site[side].numel()).roll(number))
            best[site.module, side] = int(site[side].argmax())
    model.after_step()
    for site in state_of(model).sites:
        for side in ("gate_in", "gate_out"):
            still_open = (ClampedGaussian.median(site[side]) > 0).nonzero().flatten().tolist()
            assert still_open == [best[site.module, side]]
    folded = masked(model.program)
    assert all(bool(folded.tensor(f"{site.module}.weight").any()) for site in state_of(model).sites)


def test_biases_of_gated_layers_train_and_none_is_made() -> None:
    program = rewritten(apart())
    biases = {name for name in program.trainable() if name.endswith("bias")}
    assert biases == {f"layers.{n}.{name}.bias" for n in (0, 1) for name in ("query", "key", "value", "up_proj")}
    folded = masked(stirred(program))
    assert "layers.0.down_proj.bias" not in folded.roles
    frozen = rewritten(apart(train_biases=False))
    assert {frozen.roles[name] for name in frozen.trainable()} == {"gate"}


class Shared(nn.Module):
    """Two blocks that share one weight, an own weight each, and an output outside the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(8, 8) for n in ("key", "value")}) for _ in range(2))
        self.layers[1]["key"].weight = self.layers[0]["key"].weight  # type: ignore[index, assignment]
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block["value"](block["key"](x).tanh())  # type: ignore[index]
        return self.out(x)


def test_tied_weights_and_outputs_are_never_gated() -> None:
    base = lorafx.capture(Shared(), inputs={"x": torch.randn(3, 8)})
    program = rewritten(apart(targets=("key", "value", "out")), base=base)
    missed = {miss.site.module: miss.reason for miss in program.history[-1].missed}
    assert missed == {"layers.0.key": "tied weight", "layers.1.key": "tied weight", "out": "outside the blocks"}
    assert "took 0 of 5 weight uses" in refused(NoSitesError, (apart(targets="out"),), base)


def probability(theta: Tensor, deviation: float) -> Tensor:
    moved = (theta.detach().double().tanh() + 0.5) / deviation
    return 0.5 * (1 + torch.erf(moved / math.sqrt(2)))


def penalty_of(model: RewrittenModel) -> float:
    stirred(model.program)
    penalty = model.penalty()
    assert penalty is not None
    return penalty.item()


def test_the_target_mode_is_the_formula() -> None:
    model = training(apart(mode="target", target=0.3, strength=20.0))
    found = penalty_of(model)
    terms = []
    for site in state_of(model).sites:
        columns, rows = (abs(float(probability(site[side], 0.5).mean()) - 0.7) for side in SIDES)
        terms.append(0.5 * (rows + columns))
    assert found == pytest.approx(20 * sum(terms) / len(terms), rel=1e-5)  # fp32


def test_the_penalty_mode_is_the_formula() -> None:
    model = training(apart(mode="penalty", strength=3.0, noise=0.2))
    found = penalty_of(model)
    every = torch.cat([site[side] for site in state_of(model).sites for side in SIDES])
    assert found == pytest.approx(3 * float(probability(every, 0.2).mean()), rel=1e-5)  # fp32


def test_the_achieved_mode_steers_with_what_is_really_kept() -> None:
    model = training(apart(budget=0.01, ramp=0.5, multiplier_rate=2.0), total_steps=8)
    state = state_of(model)
    state.shared["multiplier"].fill_(0.4)
    found = penalty_of(model)
    soft = hard = total = 0.0
    for site in state.sites:
        soft += float(probability(site["gate_in"], 0.5).sum() * probability(site["gate_out"], 0.5).sum())
        shut = [int((site[side].detach().tanh() > -0.5).sum()) for side in SIDES]
        hard += shut[0] * shut[1]
        total += site["gate_in"].numel() * site["gate_out"].numel()
    assert found == pytest.approx(0.4 * soft / total, rel=1e-5)  # fp32
    multiplier = 0.4
    with torch.no_grad():
        model.clock.fill_(4)  # the budget is down
    for _ in range(3):
        model.after_step()
        multiplier += 2.0 * (hard / total - 0.01)
        assert float(state.shared["multiplier"]) == pytest.approx(multiplier, rel=1e-5)
    (shown,) = report_of(model.program).sections["finegates: Gates"]
    assert shown["weights kept"] == pytest.approx(hard / total, rel=1e-6)
    assert 0.05 < hard / total < 0.95


def test_the_gates_that_closed_last_stay_open_when_too_many_did() -> None:
    model = training(apart(budget=0.5, ramp=0.5), total_steps=8)
    state, generator = state_of(model), torch.Generator().manual_seed(0)
    thetas = [site[side] for site in state.sites for side in SIDES]
    with torch.no_grad():
        for theta in thetas:
            theta.copy_(-1 - 2 * torch.rand(theta.shape, generator=generator))  # all closed
        state.shared["multiplier"].fill_(0.4)
    before = torch.cat([theta.detach().clone() for theta in thetas])
    model.after_step()  # of eight steps the first, which is to keep 0.875
    assert float(state.shared["multiplier"]) == 0.0, "nothing closes more of them"
    after = torch.cat([theta.detach() for theta in thetas])
    opened = is_open(after)
    assert after[opened].unique().tolist() == [-0.5]
    assert before[opened].min() >= before[~opened].max(), "those of highest θ"
    one = 20 * 12 / sum(site["gate_in"].numel() * site["gate_out"].numel() for site in state.sites)
    assert 0.875 <= float(kept_share(state)) < 0.875 + one, "no more than it takes"


@pytest.mark.parametrize("budget", [0.5, 0.95])
def test_a_sublayer_that_closed_comes_back_only_where_finer_gates_are_too_few(budget: float) -> None:
    """It closed last of all and takes more than is allowed; closed neurons elsewhere make up for it, or not."""
    model = training(Finegates(targets=EVERY, sublayers=True, budget=budget, ramp=0.0), total_steps=8)
    state = state_of(model)
    sublayer = state.sites[1]
    with torch.no_grad():
        for site in state.sites:
            site["gate"].fill_(1.0)[: 2 * len(site["gate"]) // 3] = -0.7
        sublayer["gate"].fill_(1.0)
        sublayer["gate_sublayer"].fill_(-0.56)
    finest = 1 - float(sublayer["cost"].sum() / state.shared["total"])  # with every other gate open
    suffices = budget < finest
    assert float(kept_share(state)) < budget
    model.after_step()
    assert float(kept_share(state)) >= budget
    assert bool(is_open(sublayer["gate_sublayer"])) is not suffices
    others = torch.cat([site["gate"].detach() for site in state.sites])
    assert bool((others == ClampedGaussian.AJAR).any()), "neurons came back"


def test_a_gate_more_multiplies_all_of_a_sublayer() -> None:
    model = training(Finegates(targets=EVERY, sublayers=True, noise=0.0))
    twin = training(Finegates(targets=EVERY, noise=0.0))
    sites, others = state_of(model).sites, state_of(twin).sites
    with torch.no_grad():
        for number, (site, other) in enumerate(zip(sites, others, strict=True)):
            theta = torch.linspace(-0.8, 0.8, len(site["gate"]))
            site["gate"].copy_(theta)
            site["gate_sublayer"].fill_(0.1 * number)
            product = (theta.tanh() + 0.5).clamp(0, 1) * (math.tanh(0.1 * number) + 0.5)
            other["gate"].copy_((product - 0.5).atanh())
    inputs = batch(4, 6)
    torch.testing.assert_close(model(**inputs), twin(**inputs), rtol=1e-5, atol=1e-6)  # fp32 through atanh and back


def test_the_achieved_mode_counts_a_closed_sublayer_as_gone() -> None:
    model = training(Finegates(targets=EVERY, sublayers=True))
    state = state_of(model)
    found = penalty_of(model)
    assert found == 0.0, "the multiplier starts at 0"
    lost = soft = 0.0
    for site in state.sites:
        fine, whole = (probability(site[name], 0.5) for name in ("gate", "gate_sublayer"))
        soft += float(((1 - fine * whole) * site["cost"]).sum())
        shut = ~(is_open(site["gate"]) & is_open(site["gate_sublayer"]))
        lost += float(site["cost"][shut].sum())
    total = float(state.shared["total"])
    assert float(kept_share(state)) == pytest.approx(1 - lost / total, rel=1e-6)
    state.shared["multiplier"].fill_(0.4)
    penalty = model.penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.4 * (1 - soft / total), rel=1e-5)  # fp32
    assert 0.05 < lost / total < 0.95


def test_sublayers_close_and_leave_the_graph() -> None:
    model = training(Finegates(targets=EVERY, sublayers=True, sublayer_rate=2e-2, budget=0.3), total_steps=200, seed=0)
    fit(model, (batch(8, 6, seed) for seed in range(200)))
    shut = [site.module for site in state_of(model).sites if not bool(is_open(site["gate_sublayer"]))]
    assert shut
    assert float(kept_share(state_of(model))) == pytest.approx(0.3, abs=0.031)  # a neuron is 0.031 of the weights
    program = recast(model.program, torch.float64)
    folded = lorafx.fold(program)
    before, after = ([*map(str, one.sites())] for one in (program, folded))
    assert len(after) < len(before)
    assert not {site.module for site in folded.sites()} & set(shut)
    assert lorafx.verify(program, folded, dtype=torch.float64).max_rel < 1e-12
    assert "gate_sublayer" in report_of(program).sections["finegates: Open gates by module"][0]


@pytest.mark.parametrize("options", [{"couple": False}, {"mode": "target"}])
def test_gates_of_sublayers_are_for_coupled_gates_that_are_steered(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="sublayers = true is about couple = true and mode = 'achieved'"):
        Finegates(sublayers=True, **options)


def test_the_achieved_mode_needs_the_number_of_steps() -> None:
    model = training(apart(), total_steps=None)
    with pytest.raises(UsageError, match=r"set model\.total_steps"):
        fit(model, [batch(4, 5)])


@pytest.mark.parametrize("options", [{}, {"multiplier_rate": 0.01, "restart": False}])
def test_the_budget_is_reached(options: dict[str, Any]) -> None:
    # Without restarts the multiplier comes down slowly, so its rate has to suit the loss, which is of size 0.1.
    model = training(apart(targets=EVERY, budget=0.6, **options), total_steps=400, seed=0)
    fit(model, (batch(8, 6, seed) for seed in range(400)))
    (shown,) = report_of(model.program).sections["finegates: Gates"]
    assert shown["weights kept"] == pytest.approx(0.6, abs=0.02)
    folded = masked(model.program)
    kept_weights = sum(int(folded.tensor(f"{s.module}.weight").count_nonzero()) for s in state_of(model).sites)
    total = sum(folded.tensor(f"{s.module}.weight").numel() for s in state_of(model).sites)
    assert kept_weights / total == pytest.approx(shown["weights kept"])
