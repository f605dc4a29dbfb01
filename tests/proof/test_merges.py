"""Merges checked: those that PEFT makes are never accused, and each mistake is found and called by its name."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from lorafx.cli import main
from lorafx.formats.adapter import Adapter, read_adapter
from lorafx.proof.merges import MergeCheck, check_models
from tests import foreign, zoo


class Merge:
    """A base, an adapter of it that PEFT trained, and PEFT's merge of the two in some dtype."""

    def __init__(self, case: str, dtype: torch.dtype, folder: Path, size: float = 1.0, **options: bool):
        model, made = foreign.CASES[case].model, foreign.CASES[case].options()
        self.base: Any = zoo.build(model, dtype=dtype)
        theirs = foreign.adapted(copy.deepcopy(self.base), made)
        with torch.no_grad():
            for name, value in theirs.named_parameters():
                if "lora_B" in name or "embedding_B" in name:
                    value.mul_(size)
        self.adapter: Adapter = read_adapter(foreign.save(theirs, folder))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says which ties it broke
            self.merged: Any = theirs.merge_and_unload(**options)

    def checked(self) -> MergeCheck:
        return check_models(self.base, self.merged, [(self.adapter, 1.0)])


RIGHT = ("llama-plain", "gpt2-plain", "bert-dora", "bert-embedding", "gpt2-tokens-tied", "gpt2-head-untied")
RIGHT += ("bert-saved", "bert-lora-bias", "qwen3-moe-patterns", "bert-bias-all", "llama-parameters")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", RIGHT)
def test_a_right_merge_is_not_accused(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    for number, size in enumerate(
        (1.0, 0.01, torch.finfo(dtype).eps / 4)
    ):  # updates larger than the weights' last places, and smaller ones
        merge = Merge(case, dtype, tmp_path / str(number), size, safe_merge=bool(number))
        result = merge.checked()
        assert result.ok, result.text()
        changed = {key for one in result.tensors for key in one.keys}
        assert changed == set(merge.adapter.tensors) or case in ("gpt2-tokens-tied",)


Q = "model.layers.1.self_attn.q_proj.weight"
STACK = "model.layers.0.mlp.experts.gate_up_proj"
#: The update of a tensor, whatever its merge was.
Plant = Callable[[Merge, str], object]


def _put(model: Any, name: str, value: Tensor) -> None:
    with torch.no_grad():
        model.get_parameter(name).copy_(value)


def _update(merge: Merge, name: str) -> Tensor:
    old = merge.base.get_parameter(name)
    change = next(one for one in merge.adapter.changes(merge.base) if one.name == name)
    return (change.updated(old) - old.double()).detach()


def _times(factor: float) -> Plant:
    return lambda merge, name: _put(
        merge.merged, name, merge.base.get_parameter(name).double() + factor * _update(merge, name)
    )


def _turned(merge: Merge, name: str) -> None:
    _put(merge.merged, name, merge.base.get_parameter(name).double() + _update(merge, name).mT)


def _experts_read_wrong(merge: Merge, name: str) -> None:
    change: Any = next(one for one in merge.adapter.changes(merge.base) if one.name == name)
    old, experts = merge.base.get_parameter(name).double(), change.experts
    a = change.a.double().reshape(experts, -1, change.a.shape[1])
    b = change.b.double().reshape(change.b.shape[0], experts, -1).permute(1, 0, 2)
    _put(merge.merged, name, old + change.scale * b @ a)


def _through_bf16(merge: Merge, name: str) -> None:
    _put(merge.merged, name, merge.merged.get_parameter(name).bfloat16())


def _nan(merge: Merge, name: str) -> None:
    merge.merged.get_parameter(name).data[3, 5] = float("nan")


def _one_number(merge: Merge, name: str) -> None:
    value = merge.merged.get_parameter(name).data
    value[3, 5] = value[3, 5] * 1.001


def _of_another(merge: Merge, name: str) -> None:
    other = name.replace("layers.1", "layers.0")
    _put(merge.merged, name, merge.base.get_parameter(name).double() + _update(merge, other))


def _without_lengths(merge: Merge, name: str) -> None:
    change: Any = next(one for one in merge.adapter.changes(merge.base) if one.name == name)
    _put(merge.merged, name, merge.base.get_parameter(name) + change.scale * change.b @ change.a)


def _add(merge: Merge, name: str) -> None:
    _put(merge.merged, name, merge.merged.get_parameter(name) + 1e-4)


def _untied(merge: Merge, name: str) -> None:
    merge.merged.lm_head.weight = nn.Parameter(merge.base.lm_head.weight.detach().clone())


def _cut(merge: Merge, name: str) -> None:
    layer = merge.merged.get_submodule(name.removesuffix(".weight"))
    layer.weight = nn.Parameter(layer.weight.detach()[:-1])


FAULTS: dict[str, tuple[str, str, Plant, str]] = {
    "skipped": ("llama-plain", Q, _times(0.0), "skipped: it is the base's"),
    "skipped stack": ("qwen3-moe-experts", STACK, _times(0.0), "skipped: it is the base's"),
    "skipped head": (
        "bert-saved",
        "classifier.weight",
        lambda m, n: _put(m.merged, n, m.base.get_parameter(n)),
        "skipped",
    ),
    "twice": ("llama-plain", Q, _times(2.0), "merged twice"),
    "twice stack": ("qwen3-moe-experts", STACK, _times(2.0), "merged twice"),
    "subtracted": ("llama-plain", Q, _times(-1.0), "subtracted"),
    "scale": ("llama-rslora", Q, _times(0.5), r"wrong scale: 0\.5 times the update"),
    "scale of a stack": ("qwen3-moe-experts", STACK, _times(4.0), r"wrong scale: 4 times the update"),
    "experts": ("qwen3-moe-experts", STACK, _experts_read_wrong, "transposed expert layout: B's experts"),
    "turned": ("llama-plain", Q, _turned, "transposed: the update was added the other way round"),
    "rounded": ("llama-plain", Q, _through_bf16, "rounded twice: its numbers are those of bfloat16"),
    "rounded stack": ("qwen3-moe-experts", STACK, _through_bf16, "rounded twice: its numbers are those of bfloat16"),
    "untied": ("gpt2-tokens-tied", "lm_head.weight", _untied, "tie broken: it is the base's, where .*wte.weight"),
    "magnitudes": ("llama-dora", Q, _without_lengths, r"its magnitudes \(DoRA\) were left out"),
    "changed": ("llama-plain", "model.norm.weight", _add, "changed, though the adapter does not change it"),
    "nan": ("llama-plain", Q, _nan, "numbers that are none"),
    "one number": ("llama-plain", Q, _one_number, "made in no way that is known here; 1 times"),
    "another's": ("llama-plain", Q, _of_another, "made in no way that is known here"),
    "shape": ("llama-plain", Q, _cut, "another shape"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str, tmp_path: Path) -> None:
    case, name, plant, cause = FAULTS[fault]
    merge = Merge(case, torch.float32, tmp_path / "adapter")
    assert merge.checked().ok
    plant(merge, name)
    result = merge.checked()
    assert [one.name for one in result.faults] == [name], result.text()
    assert re.search(cause, result.faults[0].cause), result.text()


def test_a_tied_table_that_peft_merges(tmp_path: Path) -> None:
    """The adapter is at the table alone, and PEFT's merge changes the output layer with it, which it did not adapt."""
    result = Merge("gpt2-embedding", torch.float32, tmp_path / "adapter").checked()
    assert [one.name for one in result.faults] == ["lm_head.weight"]
    assert result.faults[0].cause == "tie not kept apart: it has what the adapter makes of transformer.wte.weight"


@pytest.mark.parametrize(("fault", "cause"), [("skipped", "skipped"), ("twice", "merged twice")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_an_update_smaller_than_the_last_place_of_most_numbers(
    fault: str, cause: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    _, name, plant, _ = FAULTS[fault]
    merge = Merge("llama-plain", dtype, tmp_path / "adapter", size=torch.finfo(dtype).eps / 4)
    update, last_place = _update(merge, name).abs(), merge.base.get_parameter(name).abs() * torch.finfo(dtype).eps
    assert (update < last_place / 2).double().mean() > 0.5
    plant(merge, name)
    assert [one.cause.startswith(cause) for one in merge.checked().faults] == [True]


def test_on_the_command_line(tmp_path: Path) -> None:
    merge = Merge("llama-plain", torch.float32, tmp_path / "adapter")
    for name in ("base", "merged"):
        getattr(merge, name).save_pretrained(tmp_path / name)
    given = ["check-merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "merged")]
    right = CliRunner().invoke(main, given)
    assert right.exit_code == 0, right.output
    assert "4 merged tensors and 17 others are what base and adapter make" in right.stdout
    _times(0.0)(merge, Q)
    merge.merged.save_pretrained(tmp_path / "merged")
    wrong = CliRunner().invoke(main, given)
    assert wrong.exit_code == 4
    assert f"{Q}: skipped: it is the base's" in wrong.stdout
    half = CliRunner().invoke(main, [*given[:2], f"{given[2]}=0.5", given[3], "--json"])
    assert half.exit_code == 4
    faults = {fault["name"]: fault["cause"] for fault in json.loads(half.stdout)["faults"]}
    assert len(faults) == 4
    assert faults[Q.replace("layers.1", "layers.0")] == "merged twice"
