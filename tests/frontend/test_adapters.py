"""Adapters that PEFT made, put on a base without PEFT: the function PEFT computes, unfolded and folded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafx
from lorafx.errors import ArtifactError, UsageError
from lorafx.formats.adapter import read_adapter
from lorafx.frontend.adapters import adapted, read_adapters, weighted
from tests import foreign, zoo

#: Grouped products of experts exist in fp32 at most.
_SINGLE = ("mixtral", "qwen3-moe")


#: One of each option on the smallest models; the whole table takes a minute.
_QUICK = ("plain", "dora", "bias-all", "lora-bias", "patterns", "tokens", "dora-embedding", "large-rank", "head-untied")
_QUICK += ("tokens-tied", "embedding", "table-untied", "parameters")
NAMES = [
    name
    if (name.partition("-")[0] in ("bert", "gpt2") and name.partition("-")[2] in _QUICK) or name == "qwen3-moe-patterns"
    else pytest.param(name, marks=pytest.mark.slow)
    for name in foreign.CASES
]


@pytest.mark.parametrize("name", NAMES)
def test_what_peft_computes(name: str, tmp_path: Path) -> None:
    case = foreign.CASES[name]
    dtype = torch.float32 if case.model in _SINGLE else torch.float64
    theirs = foreign.adapted(zoo.build(case.model, dtype=dtype), case.options())
    inputs = zoo.entry(case.model).inputs(3, 6)
    inputs = zoo.widened(inputs) if dtype == torch.float64 else inputs
    expected = foreign.answers(theirs, inputs)
    adapter = read_adapter(foreign.save(theirs, tmp_path / "adapter"))
    base = zoo.captured(case.model, dtype=dtype)
    assert zoo.distance(expected, zoo.run(base, inputs)) > 1e-3, "the adapter does something"
    changes = adapter.changes(base.source.model)
    assert sorted(key for change in changes for key in change.keys) == sorted(adapter.tensors)
    program = adapted(base, [(adapter, 1.0)])
    bound = 1e-5 if dtype == torch.float32 else 1e-10
    assert zoo.distance(expected, zoo.run(program, inputs)) < bound
    folded = lorafx.fold(program)
    assert zoo.distance(expected, zoo.run(folded, inputs)) < bound
    assert not folded.names("adapter")


# ---- several adapters, and adapters of other kinds


def test_several_adapters_are_summed(tmp_path: Path) -> None:
    """As PEFT's ``add_weighted_adapter`` with ``combination_type="cat"``, which is the sum of the updates."""
    model: Any = foreign.adapted(zoo.build("llama", dtype=torch.float64), {**foreign.R, "target_modules": ["q_proj"]})
    more = {"r": 2, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}
    other: Any = foreign.adapted(zoo.build("llama", dtype=torch.float64), more)
    folders = [foreign.save(one, tmp_path / name) for name, one in (("a", model), ("b", other))]
    model.load_adapter(folders[1], "b")
    model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    inputs = zoo.ZOO["llama"].inputs(3, 6)
    expected = foreign.answers(model, inputs)
    base = zoo.captured("llama", dtype=torch.float64)
    program = adapted(base, read_adapters(weighted({str(folders[0]): 1.0, str(folders[1]): 0.5})))
    assert zoo.distance(expected, zoo.run(lorafx.fold(program), inputs)) < 1e-10
    back = adapted(program, read_adapters(weighted({str(folders[0]): -1.0, str(folders[1]): -0.5})))
    assert zoo.distance(zoo.run(base, inputs), zoo.run(lorafx.fold(back), inputs)) < 1e-10


def test_what_cannot_be_summed(tmp_path: Path) -> None:
    options = {**foreign.R, "target_modules": ["query"]}
    plain, saved, dora = (
        foreign.save(foreign.adapted(zoo.build("bert"), {**options, **more}), tmp_path / str(number))
        for number, more in enumerate(({}, {"modules_to_save": ["classifier"]}, {"use_dora": True}))
    )
    base = zoo.captured("bert", dtype=torch.float64)

    def summed(**weights: float) -> None:
        folders = {"plain": plain, "saved": saved, "dora": dora}
        adapted(base, read_adapters({folders[name]: weight for name, weight in weights.items()}))

    summed(plain=0.5, saved=1.0)
    with pytest.raises(UsageError, match=r"classifier\.\w+ is replaced, which a weight of 0\.5 cannot scale"):
        summed(plain=1.0, saved=0.5)
    with pytest.raises(UsageError, match="another adapter updates; they cannot be summed"):
        summed(plain=1.0, dora=1.0)
    for bad in (0.0, float("nan")):
        with pytest.raises(UsageError, match="leaves nothing"):
            weighted({str(plain): bad})
    (tmp_path / "linked").symlink_to(plain)
    for twice in ([plain, plain], {str(plain): 1.0, f"{plain}/": 2.0}, [plain, tmp_path / "linked"]):
        with pytest.raises(UsageError, match="given twice"):
            weighted(twice)


def test_an_adapter_of_another_kind_is_put_on_by_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = zoo.build("llama")
    model.save_pretrained(tmp_path / "base")
    layers: Any = {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    theirs: Any = peft.get_peft_model(model, peft.IA3Config(**layers, modules_to_save=["lm_head"]))
    with torch.no_grad():
        for parameter in (one for one in theirs.parameters() if one.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = foreign.save(theirs.eval(), tmp_path / "adapter")
    inputs = zoo.ZOO["llama"].inputs(3, 6)
    program = lorafx.capture(tmp_path / "base", adapter=folder, check=False)
    lorafx.export(lorafx.fold(program, check=False), tmp_path / "out", format="hf", check=False)
    merged: Any = type(model).from_pretrained(tmp_path / "out").eval()
    assert zoo.distance(foreign.answers(theirs, inputs), zoo.eager(merged, inputs)) < 1e-5
    with pytest.raises(UsageError, match="a run cannot train on"):
        program.save(tmp_path / "run")
    with pytest.raises(UsageError, match="stands alone"):
        lorafx.capture(tmp_path / "base", adapter={str(folder): 0.5})
    monkeypatch.setattr("lorafx.frontend.adapters.find_spec", lambda name: None)
    with pytest.raises(
        ArtifactError, match=r"IA3 adapter is read by PEFT, which is not installed \(pip install peft\)"
    ):
        lorafx.capture(tmp_path / "base", adapter=folder)


def test_prompts_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING"}))
    with pytest.raises(UsageError, match="adds inputs, not weights"):
        lorafx.capture(zoo.build("llama"), adapter=tmp_path)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("llama", {"target_modules": ["q_proj"]}),
        ("gpt2", {"target_modules": ["c_attn", "wte"]}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [121, 5]}),
    ],
    ids=["untied", "tied-and-adapted", "rows"],
)
def test_a_vocabulary_of_another_size(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    base: Any = zoo.build(model)
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(zoo.VOCABULARY + 5, mean_resizing=False)
    theirs = foreign.adapted(base, {**foreign.R, **options})
    folder = foreign.save(theirs, tmp_path / "adapter")
    inputs = zoo.entry(model).inputs(3, 6)
    inputs["input_ids"][0, 0] = zoo.VOCABULARY + 1
    program = lorafx.capture(tmp_path / "base", adapter=folder, check=False)
    assert zoo.distance(foreign.answers(theirs, inputs), zoo.run(program, inputs)) < 1e-5
    lorafx.export(program, tmp_path / "out", format="hf", check=False)
    merged = type(base).from_pretrained(tmp_path / "out").eval()
    assert merged.config.vocab_size == zoo.VOCABULARY + 5
    assert zoo.distance(foreign.answers(theirs, inputs), zoo.eager(merged, inputs)) < 1e-5


# ---- what is refused, by name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {**foreign.R, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    return foreign.save(foreign.adapted(zoo.build("bert"), options), tmp_path_factory.mktemp("bert") / "adapter")


QUERY = "base_model.model.bert.encoder.layer.1.attention.self.query"


def damaged(folder: Path, target: Path, config: dict[str, Any], change: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(folder, target)
    file = target / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    tensors = load_file(target / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    return target


def _rename(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def _drop(*names: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def _nothing(tensors: dict[str, Tensor]) -> None:
    """Leave them."""


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            {},
            _rename(f"{QUERY}.lora_A.weight", f"{QUERY}x.lora_A.weight"),
            r"base has no module .*queryx \(did you mean",
        ),
        ({}, _rename(f"{QUERY}.lora_A.weight", "query.lora_A.weight"), "has no name that PEFT gives"),
        (
            {},
            _rename(f"{QUERY}.lora_A.weight", f"{QUERY}.lora_C.weight"),
            r"lora_C\.weight cannot be used: the base has no",
        ),
        ({}, _drop(f"{QUERY}.lora_A.weight"), r"layer\.1\.attention\.self\.query has no lora_A here"),
        (
            {},
            _drop(f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"),
            r"names .*1\.attention\.self\.query, and lora_A, lora_B",
        ),
        ({}, _drop("base_model.model.classifier.bias"), "names classifier, and bias of it is not in the file"),
        (
            {},
            lambda t: t.update({f"{QUERY}.lora_A.weight": torch.ones(4, 64)}),
            r"\(4, 64\) where this base takes \(4, 32\)",
        ),
        ({}, lambda t: t.update({f"{QUERY}.lora_magnitude_vector": torch.ones(32)}), "says nothing of such a tensor"),
        ({"r": 5}, _nothing, r"it has rank 4, where adapter_config\.json says 5"),
        ({"use_dora": True}, _nothing, "has no lora_magnitude_vector here"),
        ({"use_dors": True}, _nothing, r"unknown option use_dors = True \(did you mean 'use_dora'\?\)"),
        ({"layer_replication": [[0, 2]]}, _nothing, r"layer_replication = \[\[0, 2\]\] is not handled"),
        ({"init_lora_weights": "pissa"}, _nothing, "init_lora_weights = 'pissa' changes the base's weights"),
        ({"r": "many"}, _nothing, "a value of the wrong kind"),
        ({"trainable_token_indices": [3]}, _nothing, "word_embeddings, and token_adapter of it is not in the file"),
    ],
)
def test_refused_by_name(
    folder: Path, tmp_path: Path, config: dict[str, Any], change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    bad = damaged(folder, tmp_path / "bad", config, change)
    with pytest.raises(ArtifactError, match=message) as found:
        read_adapter(bad).changes(zoo.build("bert"))
    assert str(bad) in str(found.value)
    assert "\n" not in str(found.value)


def test_an_adapter_of_another_base(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"the base has no \w+ \S+; is it another base\?"):
        read_adapter(folder).changes(zoo.build("llama"))


def test_files_that_are_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path)
    shutil.copytree(folder, tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="truncated"):
        read_adapter(tmp_path / "a")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ArtifactError, match=r"only pickled weights \(adapter_model\.bin\)"):
        read_adapter(tmp_path / "a")


def test_a_module_that_never_runs(tmp_path: Path) -> None:
    theirs = foreign.adapted(zoo.build("t5"), {**foreign.R, "target_modules": ["q", "shared"]})
    adapter = read_adapter(foreign.save(theirs, tmp_path / "adapter"))
    with pytest.raises(ArtifactError, match="it adapts shared, which the model does not run"):
        adapted(zoo.captured("t5", dtype=torch.float64), [(adapter, 1.0)])
