"""A fold that streams writes what a fold in memory writes, and a single wrong number in it is found."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import lorafx
from lorafx.backends import export, writing
from lorafx.base import Pass
from lorafx.channels import plan
from lorafx.deferred import programs, running, slices, tensor, tiles
from lorafx.deferred.programs import is_deferring
from lorafx.errors import ParityError
from lorafx.passes.finegates import Finegates
from lorafx.passes.lora import Lora
from lorafx.passes.prilora import Prilora
from lorafx.passes.rose_lora import RoseLora
from lorafx.passes.salora import Salora
from lorafx.passes.tied_lora import TiedLora
from lorafx.public import Program

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 48,
}
METHODS: dict[str, list[Pass]] = {
    "lora": [Lora(rank=4, targets="all-linear")],
    "lora on the table": [Lora(rank=4, targets=("embed_tokens", "v_proj"))],
    "prilora": [Prilora()],
    "salora": [Salora(rank=4)],
    "tied-lora": [TiedLora(rank=4)],
    "rose-lora": [RoseLora(rank=4)],
    "finegates": [Finegates()],
    "gates and lora": [Finegates(), Lora(rank=4, targets="all-linear")],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Path]:
    """Folders of a tiny decoder with tied embeddings, by dtype."""

    def make(dtype: torch.dtype) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"llama-{dtype}"
        if not folder.exists():
            torch.manual_seed(0)
            config = hf.LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True)
            model: Any = hf.LlamaForCausalLM(config)
            model.to(dtype).save_pretrained(folder)
        return folder

    return make


def stirred(program: Program, closed: bool) -> Program:
    """Random values in everything that was inserted; some gates closed."""
    chance = torch.Generator().manual_seed(0)
    for name in program.names("adapter"):
        program.tensor(name).data.normal_(std=0.1, generator=chance)
    for name in program.names("gate"):
        program.tensor(name).data.uniform_(-1.5 if closed else 0.2, 0.9, generator=chance)
    return program


def written(program: Program, folder: Path, *, stream: bool, check: bool = True) -> tuple[dict[str, torch.Tensor], Any]:
    folded = lorafx.fold(program, stream=stream, gather="never", check=check)
    assert is_deferring(folded) is stream
    result = lorafx.export(folded, folder, "hf", check=check)
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}, result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_fold_that_streams_is_the_fold_in_memory(
    method: str, dtype: torch.dtype, base: Callable[[torch.dtype], Path], tmp_path: Path
) -> None:
    program = stirred(lorafx.rewrite(lorafx.capture(base(dtype)), METHODS[method]), closed=False)
    memory, _ = written(program, tmp_path / "memory", stream=False)
    streamed, result = written(program, tmp_path / "stream", stream=True)
    assert memory.keys() == streamed.keys()
    assert [key for key in memory if not torch.equal(memory[key], streamed[key])] == []
    assert result.ok
    (note,) = (note for note in result.notes if "of the last place" in note)
    assert "compared in their blocks" not in note
    assert any(note.startswith("2 blocks, each on the inputs it has in the program: equal") for note in result.notes)
    origin = load_file(base(dtype) / "model.safetensors")
    assert any(not torch.equal(origin[key], streamed[key]) for key in origin), "nothing was folded"


def spoil(name: str, change: Callable[[torch.Tensor], None]) -> Callable[[Path], None]:
    def spoiled(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held[name])
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return spoiled


def _one_number(value: torch.Tensor) -> None:
    value[5, 0] *= 1.02


def _a_row(value: torch.Tensor) -> None:
    value[5] = 0.0


def _two_rows(value: torch.Tensor) -> None:
    value[[3, 4]] = value[[4, 3]]


def gated(folder: Path, *passes: Pass) -> Program:
    """Gates of which some are closed, alike in both layers, so that a config can say the widths."""
    program = stirred(lorafx.rewrite(lorafx.capture(folder), [Finegates(), *passes]), closed=True)
    for name in program.names("gate"):
        if "layers.1" in name:
            program.tensor(name).data.copy_(program.tensor(name.replace("layers.1", "layers.0")).data)
    return program


@pytest.mark.parametrize("passes", [(), (Lora(rank=2, targets=("up_proj", "down_proj")),)], ids=["gates", "and lora"])
def test_what_gates_closed_is_removed_from_weights_that_stream(
    passes: tuple[Pass, ...], base: Callable[[torch.dtype], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = gated(base(torch.float32), *passes)
    memory, _ = written(program, tmp_path / "memory", stream=False)
    monkeypatch.setattr(tiles, "TILE", 200)  # weights of several tiles
    monkeypatch.setattr(slices, "TILE", 200)
    for module in (programs, running):  # nothing has all of a weight in memory but what runs a block
        monkeypatch.setattr(module, "resident", lambda _: pytest.fail("all weights were in memory"), raising=False)
    folded = lorafx.fold(program, stream=True, gather="never")
    result = lorafx.export(folded, tmp_path / "stream", "hf", check="tensors")
    streamed = load_file(tmp_path / "stream" / "model.safetensors")
    assert memory["model.layers.0.mlp.up_proj.weight"].shape[0] < 48
    assert {key: value.shape for key, value in memory.items()} == {key: v.shape for key, v in streamed.items()}
    assert all(torch.equal(memory[key], streamed[key]) for key in memory)
    assert result is not None
    assert (result.ok, result.checked) == (True, "tensors"), "what was cut is compared by itself"
    assert len(result.cases) == len(streamed)


@pytest.mark.parametrize(("name", "change"), [("down", _one_number), ("up", _two_rows)])
def test_a_wrong_number_in_a_weight_that_was_cut_is_found(
    name: str,
    change: Callable[[torch.Tensor], None],
    base: Callable[[torch.dtype], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = gated(base(torch.float32), Lora(rank=2, targets=("up_proj", "down_proj")))
    plain = writing.write_checkpoint

    def spoiled(model: Any, folder: Path) -> dict[str, Any]:
        plain(model, folder)
        spoil(f"model.layers.0.mlp.{name}_proj.weight", change)(folder)
        return {}

    monkeypatch.setattr(writing, "write_checkpoint", spoiled)
    with pytest.raises(ParityError, match=rf"{name}_proj.weight: a folded weight is \S+ units of the last place"):
        lorafx.export(lorafx.fold(program, stream=True, gather="never"), tmp_path / "out", "hf", check="tensors")


def test_what_does_not_hold_block_by_block_is_not_removed(
    base: Callable[[torch.dtype], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule that is wrong: an operator becomes another one once channels are cut."""
    program = gated(base(torch.float32))
    plain = plan.resize

    def wrong(edit: Any, *rest: Any) -> None:
        plain(edit, *rest)
        node = next(node for node in edit.program.graph.nodes if node.target is torch.ops.aten.silu.default)
        node.target = torch.ops.aten.relu.default

    monkeypatch.setattr(plan, "resize", wrong)
    folded = lorafx.fold(program, stream=True, gather="never")
    assert folded.tensor("model.layers.0.mlp.up_proj.weight").shape[0] == 48
    (step,) = (step for step in folded.report.passes if step.name == "dead-channels")
    (reason,) = step.missed
    held = r"model.layers.0: \w+ is another on the example inputs; nothing is removed"
    assert re.fullmatch(f"the removal of channels does not hold: {held}", reason)
    assert {f"model.layers.{n}.mlp.{m}_proj.weight" for n in (0, 1) for m in ("gate", "up", "down")} <= {
        *step.missed[reason]
    }
    assert f"not taken: {reason}" in " ".join(folded.report.text(400).split())


def test_a_removal_that_cannot_be_carried_out_is_a_miss(
    base: Callable[[torch.dtype], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = gated(base(torch.float32))

    def fails(*_: Any) -> None:
        raise KeyError("mine")

    monkeypatch.setattr(plan, "resize", fails)
    for stream in (False, True):
        folded = lorafx.fold(program, stream=stream, gather="never")
        reasons = [reason for step in folded.report.passes if step.name == "dead-channels" for reason in step.missed]
        assert len(reasons) == 1
        assert "it cannot be carried out (KeyError: 'mine'); nothing is removed" in reasons[0]


def test_the_trial_of_a_removal_computes_each_weight_once(
    base: Callable[[torch.dtype], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = gated(base(torch.float32), Lora(rank=2, targets=("up_proj", "down_proj")))
    computed: list[torch.Size] = []
    plain = tensor.value

    def counted(one: torch.Tensor) -> torch.Tensor:
        computed.append(one.shape)
        return plain(one)

    def trial(*given: Any) -> str | None:
        with monkeypatch.context() as patch:
            patch.setattr(tensor, "value", counted)
            return running.difference_by_block(*given)

    monkeypatch.setattr(plan, "difference_by_block", trial)
    folded = lorafx.fold(program, stream=True, gather="never", check=False)
    width = folded.tensor("model.layers.0.mlp.up_proj.weight").shape[0]
    assert width < 48
    assert width not in SIZES.values()
    assert computed.count(torch.Size([48, 32])) == 4, "gate and up of two layers"
    assert computed.count(torch.Size([32, 48])) == 2
    assert not any(width in shape for shape in computed), "what was cut is taken from them"


def test_a_program_that_streams_computes_when_it_is_called(base: Callable[[torch.dtype], Path]) -> None:
    program = stirred(lorafx.rewrite(lorafx.capture(base(torch.float32)), METHODS["lora"]), closed=False)
    later, now = lorafx.fold(program, stream=True), lorafx.fold(program)
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (p.module().eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for p in (later, now))
    assert type(a) is torch.Tensor
    assert torch.equal(a, b)
    assert all("compared as a whole" in a.proof for a in later.history[len(program.history) :] if a.proof)


@pytest.mark.parametrize("change", [_one_number, _a_row, _two_rows])
def test_a_wrong_number_in_a_folded_weight_is_found(
    change: Callable[[torch.Tensor], None],
    base: Callable[[torch.dtype], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = stirred(lorafx.rewrite(lorafx.capture(base(torch.bfloat16)), METHODS["lora"]), closed=False)
    plain = writing.write_checkpoint
    ruin = spoil("model.layers.1.mlp.down_proj.weight", change)

    def spoiled(model: Any, folder: Path, *rest: Any) -> Any:
        plain(model, folder, *rest)
        ruin(folder)
        return {}

    monkeypatch.setattr(writing, "write_checkpoint", spoiled)
    # What the comparison of whole models allows in bf16 would let one number pass.
    monkeypatch.setattr(export, "held_against", lambda *_, **__: _Equal())
    with pytest.raises(ParityError, match=r"down_proj.weight: a folded weight is \S+ units of the last place"):
        lorafx.export(lorafx.fold(program, stream=True), tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


class _Equal:
    ok = True
    notes = ()
