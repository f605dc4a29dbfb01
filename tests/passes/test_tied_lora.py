"""Tied-LoRA: who shares what, the published parameter counts, gradients and storage of shared tensors."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lorafx
from lorafx.errors import NoSitesError, UsageError
from lorafx.passes.lora import Lora
from lorafx.passes.tied_lora import TiedLora
from lorafx.public import Program
from lorafx.training.module import RewrittenModel
from tests.captures import shared
from tests.methods import batch, fit, refused, rewritten, square, state_of, tower, training


def tied_count(train: tuple[str, ...], width: int, rank: int, blocks: int) -> int:
    """Trained numbers on fused query, key and value of ``blocks`` blocks, as in the paper."""
    own = {"A": width * rank, "B": 3 * width * rank, "u": blocks * rank, "v": blocks * 3 * width}
    return sum(own[name] for name in train)


def untied_count(width: int, rank: int, blocks: int) -> int:
    return 4 * blocks * width * rank


ALL = ("A", "B", "u", "v")
SUBSETS = [subset for size in range(1, 5) for subset in itertools.combinations(ALL, size)]


@pytest.mark.parametrize(("width", "blocks", "share"), [(2048, 24, 13.55), (4096, 32, 12.51)])
def test_the_published_shares_of_lora(width: int, blocks: int, share: float) -> None:
    trained = tied_count(ALL, width, 8, blocks)
    assert trained == 4 * width * 8 + blocks * (8 + 3 * width)
    assert round(100 * trained / untied_count(width, 8, blocks), 2) == share
    program = fused(width, blocks)
    counted = lorafx.rewrite(program, [TiedLora(rank=8, targets="Wqkv")])
    assert sum(value.numel() for value in counted.trainable().values()) == trained
    untied = lorafx.rewrite(program, [Lora(rank=8, targets="Wqkv")])
    assert sum(value.numel() for value in untied.trainable().values()) == untied_count(width, 8, blocks)


class Fused(nn.Module):
    """Blocks with one linear for query, key and value."""

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"Wqkv": nn.Linear(width, 3 * width)}) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            query, key, value = layer["Wqkv"](x).chunk(3, -1)  # type: ignore[index]
            x = x + query.tanh() * key.sigmoid() + value
        return x


@shared
def fused(width: int, blocks: int) -> Program:
    """Captured without weights."""
    with torch.device("meta"):
        return lorafx.capture(Fused(width, blocks), inputs={"x": torch.empty(2, width)}, meta=True)


@pytest.mark.parametrize("train", [ALL, ("A", "B", "u"), ("A", "B"), ("u", "v")])
def test_separate_projections_train_as_many_numbers_as_a_fused_one(train: tuple[str, ...]) -> None:
    step = TiedLora(rank=3, train=train, targets=("query", "key", "value"))
    program = rewritten(step, base=tower(4))
    assert sum(value.numel() for value in program.trainable().values()) == tied_count(train, 12, 3, 4)
    groups = program.report.sections["tied-lora: Tie groups"]
    assert [row["modules that share A"] for row in groups] == [12]
    (shown,) = program.report.sections["tied-lora: Tied parameters"]
    assert shown["trained"] == tied_count(train, 12, 3, 4)
    assert shown["untied LoRA of this rank"] == 4 * 3 * (3 * 12 + 12 * 3)


def factors(model: RewrittenModel) -> dict[str, list[Tensor]]:
    return {name: [site[f"lora_{name}"] for site in state_of(model).sites] for name in ALL}


@pytest.mark.parametrize("train", SUBSETS, ids="".join)
def test_it_starts_at_zero_and_learns(train: tuple[str, ...]) -> None:
    model = training(TiedLora(rank=3, train=train))
    inputs = batch(4, 5)
    found = factors(model)
    zero = [name for name, values in found.items() if not any(value.any() for value in values)]
    partly = [name for name, values in found.items() if any(not value.any() for value in values)]
    assert len(zero) == 1, "exactly one factor is zero, or no gradient would pass"
    assert zero == partly
    assert zero[0] in train
    assert zero[0] == next(name for name in ("B", "v", "A", "u") if name in train)
    assert torch.equal(model.eval()(**inputs), tower().module().eval()(**inputs))
    square(model.train()(**inputs)).backward()
    assert all(value.grad is not None and value.grad.any() for value in found[zero[0]])
    trained = {id(value) for name in train for value in found[name]}
    assert {id(value) for value in model.program.trainable().values()} == trained


def test_the_gradient_of_a_shared_tensor_is_the_sum_over_an_untied_clones() -> None:
    base = tower(3, dtype=torch.float64)
    model = training(TiedLora(rank=3, scale=0.7), base=base)
    generator = torch.Generator().manual_seed(2)
    for name in model.program.names("adapter"):
        value = model.program.tensor(name)
        model.program.load({name: torch.randn(value.shape, generator=generator, dtype=torch.float64)})
    inputs = batch(4, 5)
    square(model.train()(**inputs)).backward()

    clone = copy.deepcopy(base.source.model).train()
    own: dict[str, list[Tensor]] = {"A": [], "B": []}
    for site in state_of(model).sites:
        a, b = (site[f"lora_{name}"].detach().clone().requires_grad_() for name in ("A", "B"))
        u, v = (site[f"lora_{name}"].detach() for name in ("u", "v"))
        own["A"].append(a)
        own["B"].append(b)

        def add(
            _: nn.Module, args: tuple[Tensor], out: Tensor, a: Any = a, b: Any = b, u: Any = u, v: Any = v
        ) -> Tensor:
            return out + v * (args[0] @ a.T * u * 0.7 @ b.T)

        clone.get_submodule(site.module).register_forward_hook(add)
    square(clone(**inputs)).backward()
    sites = state_of(model).sites
    for name, clones in own.items():
        for site in sites:
            shared = site[f"lora_{name}"]
            users = [other for other, s in zip(clones, sites, strict=True) if s[f"lora_{name}"] is shared]
            assert len(users) == {"A": {"query": 9, "key": 9, "value": 9}}.get(name, {}).get(site.module[9:], 3)
            total = torch.stack([user.grad for user in users]).sum(0)  # type: ignore[misc]
            torch.testing.assert_close(shared.grad, total, rtol=1e-12, atol=1e-14)  # fp64, sums in another order


def storage(model: RewrittenModel) -> list[int]:
    return [value.data_ptr() for values in factors(model).values() for value in values]


def sharing(pointers: list[int]) -> list[int]:
    """For each pointer the place of the first equal one: the pattern of sharing."""
    return [pointers.index(pointer) for pointer in pointers]


def test_ties_survive_moving_and_copying() -> None:
    model = training(TiedLora(rank=3))
    before = sharing(storage(model))
    assert len(set(before)) == 3 + 5 + 6 + 10  # A: fused, up, down; B: five places; u: three a block; v: each its own
    twin = copy.deepcopy(model)
    assert sharing(storage(twin)) == before
    assert not set(storage(twin)) & set(storage(model))
    fit(twin, [batch(4, 5, seed) for seed in range(2)])
    assert not any(value.any() for value in factors(model)["B"]), "the copy trains its own"
    assert all(value.any() for value in factors(twin)["B"])
    assert {id(value) for value in factors(twin)["A"]} <= {id(value) for value in twin.parameters()}
    wide = copy.deepcopy(twin).to(torch.float64)
    assert sharing(storage(wide)) == before
    assert wide.eval()(**batch(4, 5)).dtype == torch.float64
    loaded = training(TiedLora(rank=3), seed=2)
    loaded.load_state_dict(twin.state_dict())
    assert sharing(storage(loaded)) == before
    assert torch.equal(loaded.eval()(**batch(4, 5)), twin.eval()(**batch(4, 5)))


class Uneven(nn.Module):
    """Three blocks; the last is wider inside, and only the first has a side branch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, inner)}) for inner in (6, 6, 10))
        self.layers[0]["side"] = nn.Linear(8, 6)  # type: ignore[operator, index]

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.layers
        return first["up"](x).sum() + first["side"](x).sum() + second["up"](x).sum() + third["up"](x).sum(-1)  # type: ignore[index]


def test_a_weight_without_a_partner_is_a_miss() -> None:
    base = lorafx.capture(Uneven(), inputs={"x": torch.randn(3, 8)})
    program = rewritten(TiedLora(rank=2), base=base)
    assert [entry.module for entry in program.history[-1].inserted] == ["layers.0.up", "layers.1.up"]
    missed = {miss.site.module: miss.reason for miss in program.history[-1].missed}
    assert missed == dict.fromkeys(
        ("layers.0.side", "layers.2.up"), "no other block has a weight of its place and shape"
    )
    assert "none of 1 weights has a partner" in refused(NoSitesError, (TiedLora(rank=2, targets="side"),), base)


def test_unknown_factors_are_refused() -> None:
    assert "name one or more of A, B, u, v" in refused(UsageError, (TiedLora(train=("A", "w")),))
    assert "name one or more of A, B, u, v" in refused(UsageError, (TiedLora(train=()),))


def test_cross_attention_ties_what_reads_one_value() -> None:
    """Key and value read the encoder, the query the decoder: other inputs have other A and u, in every block."""
    sizes: dict[str, Any] = {"d_model": 16, "d_ff": 16, "d_kv": 4, "num_layers": 2, "num_heads": 4, "vocab_size": 20}
    model = hf.T5ForConditionalGeneration(hf.T5Config(**{**sizes, "decoder_start_token_id": 0}))
    program = lorafx.rewrite(lorafx.capture(model), [TiedLora(targets=("q", "k", "v"), rank=2)])
    found = {entry.module: entry.tensors for entry in program.history[-1].inserted if entry.module}
    for block in (0, 1):
        self_, cross = (f"decoder.block.{block}.layer.{number}" for number in (0, 1))
        own = [found[f"{self_}.SelfAttention.{name}"] for name in "qkv"]
        query, key, value = (found[f"{cross}.EncDecAttention.{name}"] for name in "qkv")
        for short in ("lora_A", "lora_u"):
            assert len({id(program.tensor(tensors[short])) for tensors in own}) == 1
            assert program.tensor(key[short]) is program.tensor(value[short])
            assert program.tensor(query[short]) is not program.tensor(key[short])
    first, second = (found[f"decoder.block.{block}.layer.1.EncDecAttention.k"] for block in (0, 1))
    assert program.tensor(first["lora_A"]) is program.tensor(second["lora_A"]), "all blocks share A still"
    assert program.tensor(first["lora_u"]) is not program.tensor(second["lora_u"])
