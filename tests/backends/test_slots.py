"""One base in ONNX with slots, and adapters of several methods and ranks in and out of them."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import peft
import pytest
import torch
import transformers as hf
from click.testing import CliRunner
from torch import Tensor

import lorafx
from lorafx.backends.slots import slot_values
from lorafx.cli import main
from lorafx.errors import ArtifactError, UsageError
from lorafx.files.folder import read_manifest
from lorafx.formats.slots import ADAPTER, SLOTS, fingerprint, model_file, read_slots
from lorafx.passes.finegates import Finegates
from lorafx.passes.lora import Lora
from lorafx.passes.prilora import Prilora
from lorafx.passes.tied_lora import TiedLora
from lorafx.proof.exported import session_options
from lorafx.proof.slots import Filled, load_adapter, open_filled
from lorafx.public import Program
from tests import zoo
from tests.captures import of_folder
from tests.small import own

#: Three methods of several ranks at different weights; heads train with all of them.
METHODS: dict[str, Any] = {
    "lora": Lora(rank=3, alpha=5.0, rslora=True, targets=("query", "value")),
    "tied-lora": TiedLora(rank=2, targets="all-linear"),
    "prilora": Prilora(rank_first=2, rank_last=4, targets="all-linear"),
}


def trained(base: Program, step: Any, seed: int) -> Program:
    """With values as if trained, the head's too."""
    program = zoo.randomised(lorafx.rewrite(base, [step]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in (name for name, value in program.learned().items() if value.is_floating_point()):
            value = own(program.root, name)
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return program


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path) -> Program:
    """An encoder whose head no file holds."""
    return of_folder(tiny_checkpoint, task="text-classification", num_labels=3)


@pytest.fixture(scope="module")
def programs(base: Program) -> dict[str, Program]:
    return {name: trained(base, step, seed) for seed, (name, step) in enumerate(METHODS.items())}


@pytest.fixture(scope="module")
def place(base: Program, programs: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with slots and an adapter of each method, all compared as they were written."""
    folder = tmp_path_factory.mktemp("slots")
    result = lorafx.export(base, folder / "base", adapters="slots")
    assert result is not None
    assert result.ok
    for name, program in programs.items():
        result = lorafx.export(program, folder / name, "onnx-adapter", slots=folder / "base")
        assert result is not None
        assert result.ok
    return folder


def text(length: int) -> dict[str, Tensor]:
    ids = torch.randint(5, 20, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[1, length // 2 + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def answer(program: Program, inputs: dict[str, Any]) -> Tensor:
    (logits,) = zoo.run(program, inputs).values()
    return logits


def test_adapters_swapped_at_random(place: Path, programs: dict[str, Program]) -> None:
    options = session_options(1)
    session: Any = onnxruntime.InferenceSession(model_file(place / "base"), options, providers=["CPUExecutionProvider"])
    filled = {name: Filled(session, load_adapter(place / name, place / "base")) for name in programs}
    inputs = {length: text(length) for length in (1, 4, 9)}
    names = {entry.name for entry in session.get_inputs()}
    expected = {
        (name, length): answer(folded, given)
        for name, program in programs.items()
        for folded in [lorafx.fold(program)]
        for length, given in inputs.items()
    }
    drawn = random.Random(0)
    for _ in range(1000):
        name, length = drawn.choice(sorted(programs)), drawn.choice(sorted(inputs))
        feed = {key: value.numpy() for key, value in inputs[length].items() if key in names}
        (logits,) = filled[name].run(["logits"], feed)
        # fp32 through other kernels; values of the order of one.
        np.testing.assert_allclose(logits, expected[name, length], rtol=1e-4, atol=1e-5)
    apart = [float((expected["lora", 4] - expected[name, 4]).abs().max()) for name in ("tied-lora", "prilora")]
    assert min(apart) > 1e-2, "the adapters do different things"


def test_without_an_adapter_a_head_that_no_file_holds_has_no_values(place: Path, base: Program) -> None:
    slots = read_slots(place / "base")
    assert set(slots.tensors) == {"classifier.weight", "classifier.bias"}
    runner = open_filled(place / "base")
    assert torch.isnan(runner(text(4))["logits"]).all()
    values = slot_values(base, slots, place)
    assert set(values) == set(slots.tensors)
    expected = answer(base, text(4))
    assert (open_filled(place / "base", values=values)(text(4))["logits"] - expected).abs().max() < 1e-5


def test_an_adapter_s_file_is_its_numbers(place: Path, programs: dict[str, Program]) -> None:
    slots = read_slots(place / "base")
    for name, program in programs.items():
        values = slot_values(program, slots, place)
        size = (place / name / ADAPTER).stat().st_size
        # A name and a shape beside each tensor.
        assert size < sum(value.nbytes for value in values.values()) + 256 * len(values) + 256
        formats: Any = onnxruntime.AdapterFormat
        found = formats.read_adapter(str(place / name / ADAPTER))
        assert found.get_model_version() == slots.number
        meta = read_manifest(place / name).meta
        assert meta["base"]["hashes"], "the base that it is for"


def test_an_adapter_of_another_base(place: Path, base: Program, programs: dict[str, Program], tmp_path: Path) -> None:
    assert {fingerprint(program) for program in programs.values()} == {fingerprint(base)}, "whatever was trained"
    other: Any = copy.deepcopy(base.source.model)
    with torch.no_grad():
        other.get_parameter("bert.encoder.layer.0.output.dense.weight")[0, 0] += 1.0
    (tmp_path / "base").mkdir()
    model = onnx.load(model_file(place / "base"))
    (entry,) = (entry for entry in model.metadata_props if entry.key == SLOTS)
    entry.value = entry.value.replace(fingerprint(base), fingerprint(lorafx.capture(other, check=False)))
    onnx.save(model, tmp_path / "base" / "model.onnx")
    with pytest.raises(ArtifactError, match=r"an adapter of another base"):
        load_adapter(place / "lora", tmp_path / "base")
    with pytest.raises(UsageError, match="its base is another"):
        lorafx.export(programs["lora"], tmp_path / "adapter", "onnx-adapter", slots=tmp_path / "base")
    assert not (tmp_path / "adapter").exists()


def test_what_no_slot_takes(place: Path, base: Program, programs: dict[str, Program], tmp_path: Path) -> None:
    def refused(program: Program, match: str, **options: Any) -> None:
        with pytest.raises((UsageError, ArtifactError), match=match):
            lorafx.export(program, tmp_path / "out", **{"format": "onnx-adapter", "slots": place / "base", **options})
        assert not (tmp_path / "out").exists()

    gated = lorafx.rewrite(base, [Finegates()])
    refused(gated, "belongs to no low-rank update", check=False)
    refused(programs["lora"], "targets query are those of slots", format="onnx", targets="query", slots=None)
    refused(lorafx.fold(programs["lora"]), "folded program")
    refused(programs["lora"], "give its folder with slots", slots=None)
    refused(programs["lora"], "nothing else takes one", format="hf")
    refused(programs["lora"], "no ONNX model", slots=tmp_path)
    refused(programs["lora"], "slots are for the base", format="onnx", adapters="slots", slots=None)
    refused(base, "slots are inputs of an ONNX model", format="hf", adapters="slots", slots=None)
    normed = trained(base, Lora(rank=2, trainable=("LayerNorm",)), 0)
    refused(normed, "which was trained in full")
    decomposed: Any = peft.get_peft_model(
        copy.deepcopy(base.source.model),  # type: ignore[arg-type]
        peft.OFTConfig(oft_block_size=4, target_modules=["query"], init_weights=False),
    )
    refused(lorafx.capture(decomposed.eval()), "came inside the model")


@pytest.mark.slow
def test_two_weights_of_the_same_numbers_have_no_slots(tmp_path: Path) -> None:
    model: Any = zoo.build("bert")
    with torch.no_grad():
        layer = model.bert.encoder.layer[0].attention.self
        layer.key.weight.copy_(layer.query.weight)
    program = lorafx.capture(model)
    with pytest.raises(UsageError, match="has the numbers of"):
        lorafx.export(program, tmp_path / "base", adapters="slots", check=False)
    lorafx.export(program, tmp_path / "base", adapters="slots", targets=["value"], check=False)
    assert all(module.endswith("value") for module in read_slots(tmp_path / "base").pairs)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_decoders(model: str, tmp_path: Path) -> None:
    """With the cache, token by token, as the folded program generates."""
    base = zoo.captured(model)
    lorafx.export(base, tmp_path / "base", adapters="slots", generate=True)
    slots = read_slots(tmp_path / "base")
    if model == "llama":  # as onnxruntime-genai's builder calls them
        assert slots.pairs["model.layers.0.self_attn.q_proj"].a == "model.layers.0.attn.q_proj.lora_A.MatMul.weight"
        assert slots.pairs["model.layers.1.mlp.up_proj"].b == "model.layers.1.mlp.up_proj.lora_B.MatMul.weight"
    ids = torch.randint(5, 100, (1, 6), generator=torch.Generator().manual_seed(0))
    for seed, step in enumerate((Lora(rank=2, alpha=3.0), TiedLora(rank=3))):
        program = trained(base, step, seed)
        # What it generates is compared, too, from the file that was written.
        result = lorafx.export(program, tmp_path / f"adapter{seed}", "onnx-adapter", slots=tmp_path / "base")
        assert result is not None
        assert result.ok
        decoder = open_filled(tmp_path / "base", load_adapter(tmp_path / f"adapter{seed}", tmp_path / "base")).decoder
        past, texts = decoder.empty(1), ids
        for new in (ids, ids[:, :1], ids[:, 1:2]):
            texts = new if new is ids else torch.cat([texts, new], 1)
            logits, past = decoder.step(new, torch.ones_like(texts), past)
        given = {**program.example, "input_ids": texts, "attention_mask": torch.ones_like(texts)}
        whole = answer(lorafx.fold(program), given)[:, -1:]
        assert (logits - whole).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.slow
def test_half_precision(base: Program, programs: dict[str, Program], tmp_path: Path) -> None:
    lorafx.export(base, tmp_path / "base", adapters="slots", dtype=torch.float16)
    assert read_slots(tmp_path / "base").dtype == "float16"
    result = lorafx.export(programs["lora"], tmp_path / "adapter", "onnx-adapter", slots=tmp_path / "base")
    assert result is not None
    assert result.ok


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    hf.BertForSequenceClassification(zoo.build("bert").config).save_pretrained(tmp_path / "base")  # type: ignore[attr-defined]

    def call(*arguments: object) -> Any:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result

    targets = ("--targets", "query", "--targets", "value")
    call("export", tmp_path / "base", "--adapters", "slots", *targets, "-o", tmp_path / "slots")
    assert len(read_slots(tmp_path / "slots").pairs) == 4
    assert not torch.isnan(open_filled(tmp_path / "slots")(text(4))["logits"]).any(), "a head that a file holds"
    model: Any = hf.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    options = {"r": 3, "target_modules": ["query"], "init_lora_weights": False}
    peft.get_peft_model(model, peft.LoraConfig(**options)).save_pretrained(str(tmp_path / "adapter"))
    call(
        *("export", tmp_path / "base", "--adapter", tmp_path / "adapter", "--format", "onnx-adapter"),
        *("--slots", tmp_path / "slots", "-o", tmp_path / "filled"),
    )
    assert (tmp_path / "filled" / ADAPTER).is_file()
