"""The laws of the training methods, alone and combined, over models of several families: what training starts from,
what it counts, and what is left when it folds away."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx.base import Pass
from lorafx.passes.finegates import Finegates
from lorafx.passes.lora import Lora
from lorafx.passes.prilora import Prilora
from lorafx.passes.salora import Salora
from lorafx.passes.tied_lora import TiedLora
from lorafx.public import Program
from lorafx.training.module import RewrittenModel
from tests import captures, zoo
from tests.methods import RECIPES, inputs_of, state_of, stirred

#: An encoder, decoders with fused and with grouped projections, an encoder-decoder, and one without a mask.
MODELS = ("bert", "gpt2", "llama", "t5", "vit")
every_model = pytest.mark.parametrize("model", MODELS)
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


@captures.shared
def started(recipe: str, model: str) -> Program:
    """The model under a recipe, as training starts. Never trained: tests that change values rewrite anew."""
    torch.manual_seed(1)
    return lorafx.rewrite(zoo.captured(model), RECIPES[recipe])


def opened(recipe: str, model: str) -> Program:
    """The same with values as training may leave them; what ``started`` was held to is not checked once more."""
    torch.manual_seed(1)
    return stirred(lorafx.rewrite(zoo.captured(model), RECIPES[recipe], check=False))


# ---- 1. what training starts from


@every_model
@every_recipe
def test_nothing_changes_at_the_start(recipe: str, model: str) -> None:
    inputs = zoo.ZOO[model].inputs(3, 9)
    expected, found = zoo.run(zoo.captured(model), inputs), zoo.run(started(recipe, model), inputs)
    assert expected.keys() == found.keys()
    # Bit by bit: the branches are 0 and the gates of evaluation are 1.
    assert all(torch.equal(expected[key], found[key]) for key in expected)


# ---- 2. evaluation, folded, exported


def assert_nothing_is_left(folded: Program, model: str) -> None:
    """Nothing inserted, and no bias where there was none; closed channels may be gone, and a constant say which."""
    assert not folded.names("adapter", "gate", "statistic")
    new = set(folded.roles) - set(zoo.captured(model).roles)
    assert {folded.roles[name] for name in new} <= {"constant"}
    assert not any("bias" in name for name in new)


@every_model
@every_recipe
def test_folded_equals_unfolded(recipe: str, model: str) -> None:
    program = opened(recipe, model)
    wide = zoo.doubled(program)
    folded = lorafx.fold(wide)
    assert_nothing_is_left(folded, model)
    inputs = zoo.widened(zoo.ZOO[model].inputs(3, 9))
    unfolded = zoo.run(wide, inputs)
    assert zoo.distance(unfolded, zoo.run(folded, inputs)) < 1e-12
    assert zoo.distance(unfolded, zoo.run(zoo.doubled(zoo.captured(model)), inputs)) > 1e-3, "else nothing is shown"


EXPORTED = [("prilora", "bert", "separate"), ("salora + finegates", "bert", "separate")]
EXPORTED += [("tied-lora + finegates", "llama", "merged")]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "model", "adapters"), EXPORTED)
@pytest.mark.filterwarnings("default")  # the converter's own
def test_exported_equals_unfolded(
    recipe: str, model: str, adapters: Literal["merged", "separate"], tmp_path: Path
) -> None:
    from transformers.exporters.base import ExportedModel

    program = opened(recipe, model)
    lorafx.export(program, tmp_path / "onnx", adapters=adapters)
    inputs = zoo.ZOO[model].inputs(3, 9)
    exported = zoo.tensors(ExportedModel.from_pretrained(tmp_path / "onnx")(**inputs))
    # fp32 rounding through other kernels, relative to the outputs' scale.
    assert zoo.distance(zoo.run(program, inputs), exported) < 1e-5


# ---- 3. how many numbers train

_ATTENTION = [(32, 32)] * 4
#: The linears of one block as (out, in), by stack; how many query, key and value projections are tied as one.
BLOCKS: dict[str, list[list[tuple[int, int]]]] = {
    "bert": [[*_ATTENTION, (48, 32), (32, 48)]],
    "gpt2": [[(96, 32), (32, 32), (128, 32), (32, 128)]],
    "llama": [[(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]],
    "t5": [[*_ATTENTION, (48, 32), (32, 48)], [*_ATTENTION, *_ATTENTION, (48, 32), (32, 48)]],
    "vit": [[*_ATTENTION, (48, 32), (32, 48)]],
}
#: The places of those that read the A and u of the one before: key and value of a module, but where the query reads
#: another value (T5's cross-attention) the value alone.
SHARING: dict[str, list[set[int]]] = {
    "bert": [{1, 2}],
    "gpt2": [set()],
    "llama": [{1, 2}],
    "t5": [{1, 2}, {1, 2, 6}],
    "vit": [{1, 2}],
}
#: Linears outside the blocks that adapters take, the numbers of a head that trains in full, and biases per block.
OUTSIDE: dict[str, list[tuple[int, int]]] = {"bert": [(32, 32)]}
HEAD = {"bert": 3 * 32 + 3, "vit": 3 * 32 + 3}
BIASES = {"bert": 5 * 32 + 48, "gpt2": 96 + 32 + 128 + 32, "vit": 5 * 32 + 48}
LAYERS = 2


def lora_count(model: str, ranks: tuple[int, int], outside: int) -> int:
    """Σ r (in + out), with a rank for each of the two blocks and one for what lies outside."""
    blocks = sum(rank * (rows + columns) for rank in ranks for stack in BLOCKS[model] for rows, columns in stack)
    return blocks + sum(outside * (rows + columns) for rows, columns in OUTSIDE.get(model, []))


def tied_count(model: str, rank: int) -> int:
    """A r·in and B r·out once for all blocks, u r and v out a block; projections of one value share A and u."""
    total = 0
    for stack, shared in zip(BLOCKS[model], SHARING[model], strict=True):
        for place, (rows, columns) in enumerate(stack):
            total += rank * rows + LAYERS * rows
            total += 0 if place in shared else rank * columns + LAYERS * rank
    return total


def gate_count(model: str) -> int:
    """One gate a row and one a column."""
    return LAYERS * sum(rows + columns for stack in BLOCKS[model] for rows, columns in stack)


def unit_count(model: str) -> int:
    """One gate an FFN neuron and one an attention head (or key-value group), if heads can be removed.

    All blocks of T5 read one table of position biases, head by head.
    """
    heads = {"llama": 2, "t5": 0}.get(model, 4)
    neurons = {"gpt2": 128, "t5": 2 * 48}.get(model, 48)
    return LAYERS * (heads + neurons)


def weights_outside(model: str) -> int:
    return sum(1 for _ in OUTSIDE.get(model, []))


def expected_count(recipe: str, model: str) -> int:
    """The closed formula."""
    linears = LAYERS * sum(map(len, BLOCKS[model])) + weights_outside(model)
    salora = lora_count(model, (6, 6), 6) + 6 * linears
    biases = LAYERS * BIASES.get(model, 0)
    gates, units = gate_count(model) + biases, unit_count(model) + biases
    parts = {
        "prilora": lora_count(model, (2, 4), 4),
        "salora": salora,
        "tied-lora": tied_count(model, 3),
        "finegates": units,
        "finegates, apart": gates,
        "rose-lora": lora_count(model, (3, 3), 3),
        "tied-lora + finegates": tied_count(model, 3) + gates,
        "salora + finegates": salora + units,
        "prilora + rose-lora": lora_count(model, (2, 4), 4),
    }
    return parts[recipe] + HEAD.get(model, 0)


@every_model
@every_recipe
def test_what_trains_is_the_closed_formula(recipe: str, model: str) -> None:
    trained = started(recipe, model).trainable().values()
    assert sum(value.numel() for value in trained) == expected_count(recipe, model)


# ---- 5. activation checkpointing


def gradients(model: RewrittenModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Of every trained tensor, and the statistics, after one forward; noise drawn from one seed."""
    model.zero_grad(set_to_none=True)
    for name in model.program.names("statistic"):
        model.program.tensor(name).zero_()
    torch.manual_seed(3)
    outputs = zoo.tensors(model(**inputs))
    # Any fixed weighting of all outputs will do for a loss.
    losses = [(value * torch.linspace(-1, 1, value.numel()).view(value.shape)).sum() for value in outputs.values()]
    torch.stack(losses).sum().backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return {**found, **{name: model.program.tensor(name).clone() for name in model.program.names("statistic")}}


@pytest.mark.parametrize("model", ["bert", "llama", "t5"])
@every_recipe
def test_recomputing_activations_changes_no_gradient_and_no_statistic(recipe: str, model: str) -> None:
    rewritten = opened(recipe, model).module().train()
    inputs = zoo.ZOO[model].inputs(2, 7)
    plain = gradients(rewritten, inputs)
    rewritten.gradient_checkpointing_enable()
    recomputed = gradients(rewritten, inputs)
    assert plain.keys() == recomputed.keys()
    # Bit by bit: the same operators run, and the recomputation draws the same noise and dropout.
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    moved = {rewritten.program.roles[name] for name, value in plain.items() if value.any()}
    assert {"adapter", "gate"} & moved
    assert ("statistic" in moved) == (recipe == "prilora")


# ---- 6. composition

PAIRS: dict[str, tuple[Pass, Pass]] = {
    "lora": (Lora(rank=3), Finegates(couple=False)),
    "tied-lora": (TiedLora(rank=3), Finegates()),
    "salora": (Salora(rank=6, alpha=3.0), Finegates()),
    "prilora": (Prilora(rank_first=2, rank_last=4), Finegates(couple=False)),
}


@pytest.mark.parametrize("model", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("pair", PAIRS)
def test_gates_stand_around_the_adapters_in_either_order(pair: str, model: str) -> None:
    adapter, gates = PAIRS[pair]
    programs = [lorafx.rewrite(zoo.captured(model), passes) for passes in ((adapter, gates), (gates, adapter))]
    first, second = programs
    stirred(first)
    assert set(first.learned()) == set(second.learned())
    second.load({name: first.tensor(name) for name in first.names("adapter", "gate")})
    wide, other = (zoo.doubled(program) for program in programs)
    inputs = zoo.widened(zoo.ZOO[model].inputs(3, 9))
    assert zoo.distance(zoo.run(wide, inputs), zoo.run(other, inputs)) < 1e-12
    for program in (wide, other):
        folded = lorafx.fold(program)
        assert_nothing_is_left(folded, model)
        assert zoo.distance(zoo.run(wide, inputs), zoo.run(folded, inputs)) < 1e-12


def test_the_statistic_is_of_what_enters_a_wherever_the_gates_stand() -> None:
    for passes in (PAIRS["prilora"], PAIRS["prilora"][::-1]):
        program = lorafx.rewrite(zoo.captured("bert"), passes)
        for name in program.names("gate"):
            if name.endswith("gate_in"):
                program.load({name: torch.full_like(program.tensor(name), -40.0)})
        program.module().train()(**zoo.ZOO["bert"].inputs(2, 7))
        sums = {n: program.tensor(n) for n in program.names("statistic") if n.endswith("square_sum")}
        # Shut columns let nothing through; the pooler stands outside the blocks and has no gates.
        assert {name for name, value in sums.items() if value.any()} == {"bert.pooler.dense.square_sum"}


# ---- what the statistics are of


def mask_of(module: str, model: str, inputs: dict[str, Any]) -> Tensor | None:
    """The mask of the tokens that enter a module, by what the model is."""
    encoded = (".EncDecAttention.k", ".EncDecAttention.v")
    unmasked = module.startswith("decoder.") and not module.endswith(encoded)  # no mask of that length is given
    return None if model == "vit" or unmasked or "pooler" in module else inputs["attention_mask"].bool()


@every_model
def test_statistics_are_of_real_tokens(model: str) -> None:
    program = lorafx.rewrite(zoo.captured(model), [Prilora(rank_first=2, rank_last=2)])
    inputs = zoo.ZOO[model].inputs(3, 9)

    def in_training(network: nn.Module) -> None:
        torch.manual_seed(3)  # both draw the same dropout
        network.train()(**inputs)
        network.eval()

    seen = inputs_of(program, in_training)
    rewritten = program.module()
    in_training(rewritten)
    sites = state_of(rewritten).sites
    assert len(sites) == LAYERS * sum(map(len, BLOCKS[model])) + weights_outside(model)
    for site in sites:
        x, mask = seen[site.module], mask_of(site.module, model, inputs)
        real = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
        assert float(site["token_count"]) == len(real)
        # fp32 sums in another order.
        torch.testing.assert_close(site["square_sum"], real.square().sum(0), rtol=1e-5, atol=1e-6)


# ---- RoseLoRA's promise about the weights


@pytest.mark.parametrize("model", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("recipe", ["rose-lora", "prilora + rose-lora"])
def test_merging_touches_the_union_of_supports_alone(recipe: str, model: str) -> None:
    program = opened(recipe, model)
    rewritten = program.module()
    rewritten.total_steps = 10
    rewritten.clock.fill_(8)
    for site in state_of(rewritten).sites:
        for short in ("importance_A", "importance_B"):
            site[short].uniform_(generator=torch.Generator().manual_seed(1))
    rewritten.after_step()
    folded = lorafx.fold(program)
    for site in state_of(rewritten).sites:
        name = f"{site.module}.weight"
        base, merged = zoo.captured(model).tensor(name), folded.tensor(name)
        union = ((site["lora_B"] != 0).float() @ (site["lora_A"] != 0).float()) > 0
        union = union.T if model == "gpt2" else union  # Conv1D stores (in, out)
        assert torch.equal(base[~union], merged[~union])
        share = math.ceil(0.3 * site["lora_A"].shape[1]) * math.ceil(0.3 * site["lora_B"].shape[0])
        assert 0 < int(union.sum()) <= site["lora_A"].shape[0] * share
        assert not torch.equal(base[union], merged[union])
