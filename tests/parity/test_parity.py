"""Verification says yes to equal functions at odd shapes, in every kind of folder, and no to anything else."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lorafx
from lorafx.errors import ArtifactError, UsageError
from lorafx.graph.precision import TOLERANCES, recast
from lorafx.models.examples import dynamic_shapes, example_inputs
from lorafx.parity.answers import Comparison, compare
from lorafx.parity.inputs import SHAPES, Batch, Generator, InputSpec, merged, specs_of, tokenised
from lorafx.parity.runner import Runner, named_outputs
from lorafx.passes.lora import Lora
from lorafx.proof.open import open_runner
from lorafx.proof.verify import compare_programs, verify
from lorafx.public import Program
from tests.captures import shared
from tests.small import POSITIONS, adapted, bert, llama, words


def vit() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=8, intermediate_size=48, **sizes))


FAMILIES = {"bert": bert, "llama": llama, "vit": vit}


@shared
def eager(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for value in model.parameters():
        # Random biases: zeros would hide a term that went missing.
        nn.init.normal_(value, std=0.05) if value.dim() == 1 else None
    return model


@shared
def program_of(family: str) -> Program:
    return lorafx.capture(eager(family))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The ONNX folder that transformers' own exporter writes for a family, made once."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            model: Any = eager(family)
            inputs = example_inputs(model)
            config = OnnxConfig(dynamic=True, dynamic_shapes=dynamic_shapes(model, inputs), ort_fusions="cpu")
            target = tmp_path_factory.mktemp("onnx") / family
            model.config.use_cache = False
            with redirect_stdout(StringIO()):
                OnnxExporter().export(model, inputs, config).save_pretrained(target)
            made[family] = target
        return made[family]

    return folder


def changed(family: str, change: Callable[[Any], None]) -> nn.Module:
    """A copy of a family's model with something changed."""
    model = copy.deepcopy(eager(family))
    with torch.no_grad():
        change(model)
    return model


def answering(answer: Callable[[Mapping[str, Tensor], dict[str, Tensor]], Any], family: str = "bert") -> Runner:
    """A runner of a family's model whose outputs go through ``answer(inputs, outputs)``."""
    runner = open_runner(eager(family))

    def call(inputs: dict[str, Any]) -> Any:
        return answer(inputs, named_outputs(runner.call(inputs)))

    return dataclasses.replace(runner, call=call, label="changed")


# ---- equal


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_function_is_equal_in_every_form(family: str, exported: Callable[[str], Path], tmp_path: Path) -> None:
    model: Any = eager(family)
    model.save_pretrained(tmp_path / "checkpoint")
    for other in (tmp_path / "checkpoint", program_of(family), program_of(family).module(), exported(family)):
        result = verify(model, other)
        assert result.ok, result.text()
        assert result.max_rel <= TOLERANCES[torch.float32]
        assert str(result).startswith("equal: ")


def test_shapes_are_odd_and_padded(exported: Callable[[str], Path]) -> None:
    shapes = [case.inputs for case in verify(exported("bert"), program_of("bert")).cases]
    # 33 is longer than this model's positions.
    longest = f"5x{POSITIONS}, padded right"
    assert len(shapes) == len(SHAPES) + 1
    assert {"1x1", "1x2", "2x1", longest, f"1x{POSITIONS}", f"1x{POSITIONS}, padded right"} <= set(shapes)
    assert [case.inputs for case in verify(eager("vit"), exported("vit")).cases] == ["batch 1", "batch 2", "batch 5"]


def test_fp64_leaves_rounding_no_room() -> None:
    program = recast(adapted(method=Lora(rank=2)), torch.float64)
    result = compare_programs(program, lorafx.fold(program))
    assert result.ok, result.text()
    assert result.dtype is torch.float64
    assert result.max_rel < 1e-12
    assert verify(eager("llama"), program_of("llama"), dtype=torch.float64).max_abs < 1e-12


def test_norms_computed_in_fp32_are_computed_in_fp64() -> None:
    """Llama's norms cast to fp32; left so, they would round away what a comparison in fp64 is to find."""
    program = program_of("llama")
    wide, plain = open_runner(program, dtype=torch.float64), open_runner(program)
    inputs = {name: value for name, value in program.example.items() if isinstance(value, Tensor)}
    a, b = wide(inputs)["logits"], plain(inputs)["logits"]
    assert a.dtype is torch.float64
    assert 1e-9 < float((a - b).abs().max()) < 1e-5
    again = open_runner(recast(program, torch.float64))(inputs)["logits"]
    assert torch.equal(a, again)


def test_the_lower_precision_decides() -> None:
    half = copy.deepcopy(eager("bert")).bfloat16()
    result = verify(eager("bert"), half)
    assert result.dtype is torch.bfloat16
    assert result.tolerance == TOLERANCES[torch.bfloat16]
    assert result.ok, result.text()
    assert result.max_rel > TOLERANCES[torch.float32]


def test_equal_infinities_are_equal() -> None:
    def ruled_out(inputs: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> Any:
        return {"logits": outputs["logits"].index_fill(-1, torch.tensor([0]), -math.inf)}

    assert verify(answering(ruled_out), answering(ruled_out)).ok
    assert verify(eager("bert"), answering(ruled_out)).max_rel == math.inf


def test_real_texts_are_tokenised_in_batches(tmp_path: Path) -> None:
    model: Any = eager("bert")
    model.save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    texts = ["w1 w2 w3", "", "w4", "w5 " * 50, *(f"w{n}" for n in range(6, 12))]
    result = verify(tmp_path, program_of("bert"), texts=texts)
    assert result.ok, result.text()
    labels = [case.inputs for case in result.cases]
    assert labels == ["text 1 (1x5)", f"texts 2 to 3 (2x{POSITIONS})", "texts 4 to 8 (5x3)", "text 9 (1x3)"]


# ---- different


def test_a_small_perturbation_is_found(exported: Callable[[str], Path]) -> None:
    def perturb(model: Any) -> None:
        model.classifier.weight[1] *= 1 + 1e-3

    result = verify(exported("bert"), changed("bert", perturb))
    assert not result.ok
    assert 1e-5 < result.max_rel < 1e-2
    assert result.worst is not None
    assert result.worst.output == "logits"
    assert result.worst.index[1] == 1
    assert "logits[" in str(result)


def test_nan_is_found_wherever_it_is() -> None:
    def broken(inputs: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> Any:
        if len(outputs["logits"]) == 5:
            outputs["logits"][3, 1] = math.nan
        return outputs

    for pair in ((eager("bert"), answering(broken)), (answering(broken), eager("bert"))):
        result = verify(*pair)
        assert not result.ok
        assert result.max_abs == math.inf
        assert "NaN in the" in str(result)
        assert "[3, 1]" in str(result)
        assert "5x" in str(result)


def test_swapped_labels_are_found() -> None:
    def swap_rows(model: Any) -> None:
        model.classifier.weight.copy_(model.classifier.weight.flip(0))
        model.classifier.bias.copy_(model.classifier.bias.flip(0))

    def name(model: Any, *names: str) -> None:
        model.config.id2label = dict(enumerate(names))

    assert not verify(eager("bert"), changed("bert", swap_rows)).ok
    good = changed("bert", lambda model: name(model, "bad", "good"))
    bad = changed("bert", lambda model: name(model, "good", "bad"))
    result = verify(good, bad)
    assert not result.ok
    assert str(result).startswith("labels differ: class 0 is 'bad'")
    # Names that nobody gave say nothing.
    assert verify(good, eager("bert")).ok


def test_a_missing_and_an_additional_output_are_found() -> None:
    more = answering(lambda inputs, outputs: {**outputs, "extra": outputs["logits"]})
    for pair in ((more, eager("bert")), (eager("bert"), more)):
        result = verify(*pair)
        assert not result.ok
        assert not result.same_shapes
        assert "has no such output" in str(result)


def test_another_shape_is_found() -> None:
    flat = answering(lambda inputs, outputs: {"logits": outputs["logits"].flatten()})
    result = verify(eager("bert"), flat)
    assert "shape (1, 2) against (2,)" in str(result)
    assert not result.same_shapes


def test_a_mask_that_is_ignored_is_found() -> None:
    def deaf(inputs: dict[str, Any]) -> Any:
        return eager("bert")(input_ids=inputs["input_ids"])

    runner = open_runner(eager("bert"))
    specs = tuple(spec for spec in runner.inputs if not spec.is_mask)
    result = verify(runner, dataclasses.replace(runner, call=deaf, inputs=specs))
    assert not result.ok
    assert result.worst is not None
    assert "padded" in result.worst.inputs


def test_padding_is_left_out_and_nothing_else() -> None:
    def garbage(where: int) -> Runner:
        def answer(inputs: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> Any:
            logits, mask = outputs["logits"].clone(), inputs["attention_mask"]
            logits[mask == where] += 1
            return {"logits": logits}

        return answering(answer, "llama")

    assert verify(eager("llama"), garbage(0)).ok
    assert not verify(eager("llama"), garbage(1)).ok


def test_classes_are_not_taken_for_tokens() -> None:
    """Two classes of two-token texts have the shape of the mask; the second is no padding."""

    def answer(inputs: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> Any:
        padded = inputs["attention_mask"] == 0
        return {"logits": outputs["logits"] + (padded if padded.shape == outputs["logits"].shape else 0)}

    assert not verify(eager("bert"), answering(answer), shapes=[(2, 2)]).ok


def test_refusals() -> None:
    def refuse(inputs: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> Any:
        if len(outputs["logits"]) == 5:
            raise RuntimeError("five is too many\nand more")
        return outputs

    result = verify(eager("bert"), answering(refuse))
    assert not result.ok
    assert "refused by changed: five is too many" in str(result)
    both = verify(answering(refuse), answering(refuse))
    assert both.ok
    assert any("both refuse inputs 5x" in note for note in both.notes)
    nothing = verify(answering(refuse), answering(refuse), shapes=[(5, 2)])
    assert not nothing.ok
    assert str(nothing).startswith("nothing could be compared: both refuse inputs 5x2")


def test_made_up_inputs_that_a_graph_does_not_claim_are_left_out_and_named() -> None:
    class Pairs(nn.Module):
        """Treats texts of two tokens in a way of their own, as MobileBERT's embeddings do."""

        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(8, 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            summed = self.tokens(input_ids).sum(1)
            return 2 * summed if input_ids.shape[1] == 2 else summed

    model = Pairs().eval()
    program = lorafx.capture(model, inputs={"input_ids": torch.randint(0, 8, (2, 5))})
    result = verify(program, model)
    assert result.ok
    assert "not compared on inputs 5x2: the graph holds where input_ids.shape[1] != 2" in result.notes
    assert {case.inputs for case in result.cases} == {f"{rows}x{length}" for rows in (1, 2, 5) for length in (1, 33)}
    # What was asked for is compared, whatever the graph says of it.
    assert "refused by" in str(verify(program, model, shapes=[(1, 2)]))


@pytest.mark.parametrize("given", ["token_type_ids", "position_ids"])
def test_inputs_of_ones_own_are_not_dropped(given: str, tmp_path: Path) -> None:
    """Neither folder has a tokenizer that would make them, but both models compute with them."""
    first: Any = bert(num_labels=2)
    second: Any = bert(num_labels=2)
    second.load_state_dict(first.state_dict())
    table = {"token_type_ids": "token_type_embeddings", "position_ids": "position_embeddings"}[given]
    with torch.no_grad():
        for model in (first, second):
            model.classifier.weight.mul_(100)
        getattr(second.bert.embeddings, table).weight[1].add_(torch.linspace(-1, 1, 32))
    first.save_pretrained(tmp_path / "a")
    second.save_pretrained(tmp_path / "b")
    ids = torch.randint(5, 40, (2, 1))
    for a, b in ((first, second), (tmp_path / "a", tmp_path / "b")):
        assert verify(a, b, inputs=[{"input_ids": ids, given: torch.zeros(2, 1, dtype=torch.long)}]).ok
        assert not verify(a, b, inputs=[{"input_ids": ids, given: torch.ones(2, 1, dtype=torch.long)}]).ok


def test_a_model_whose_inputs_cannot_be_made_up_is_compared_on_those_of_its_program(tmp_path: Path) -> None:
    """As speech models are whose config does not say how many bins their features have."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rest: dict[str, Any] = {"intermediate_size": 24, "feature_projection_input_dim": 8, "classifier_proj_size": 8}
    noise = {"apply_spec_augment": False, "layerdrop": 0.0, "conv_depthwise_kernel_size": 5, "num_labels": 2}
    model: Any = hf.Wav2Vec2BertForSequenceClassification(hf.Wav2Vec2BertConfig(**sizes, **rest, **noise)).eval()
    program = lorafx.capture(model, inputs={"input_features": torch.randn(2, 12, 8)})
    lorafx.export(lorafx.fold(program), tmp_path / "out", format="hf")
    assert verify(program, tmp_path / "out").ok
    with pytest.raises(UsageError, match="neither model says what inputs it takes"):
        verify(model, tmp_path / "out")


def test_an_input_that_neither_model_takes_is_an_error() -> None:
    given = {"input_ids": torch.tensor([[5, 6]]), "attention_msk": torch.tensor([[1, 0]])}
    with pytest.raises(
        UsageError, match=r"neither model takes an input 'attention_msk' \(did you mean 'attention_mask'"
    ):
        verify(eager("bert"), eager("bert"), inputs=[given])
    # Labels often come with a batch, and what is compared does not depend on them.
    labelled = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([1])}
    assert verify(eager("bert"), eager("bert"), inputs=[labelled]).ok


def test_the_scale_is_the_largest_reference_value_of_all_inputs() -> None:
    small, large = {"x": torch.full((1, 3), 1e-4)}, {"x": torch.full((1, 3), 10.0)}
    one = Runner("one", "module", "torch cpu", 1, torch.float32, (), lambda inputs: inputs["x"])
    other = dataclasses.replace(one, call=lambda inputs: inputs["x"] + 5e-5)
    assert not verify(one, other, inputs=[small]).ok
    result = verify(one, other, inputs=[small, large])
    assert result.ok
    assert result.scales == {"output": 10.0}


def test_results_are_json_even_when_they_are_no_numbers() -> None:
    result = verify(eager("bert"), answering(lambda inputs, outputs: {"logits": outputs["logits"] * math.nan}))
    value = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert value["ok"] is False
    assert value["max_abs"] is None
    assert value["cases"][0]["problem"].startswith("NaN in the second model")
    good = verify(eager("bert"), program_of("bert")).to_json()
    assert good["ok"] is True
    assert good["tolerance"] == TOLERANCES[torch.float32]
    assert {case["output"] for case in good["cases"]} == {"logits"}


# ---- runners


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, a run with adapters that changed, and that run folded and exported."""
    root = tmp_path_factory.mktemp("path")
    model: Any = eager("bert")
    model.save_pretrained(root / "checkpoint")
    words().save_pretrained(root / "checkpoint")
    program = adapted(lorafx.capture(root / "checkpoint"), Lora(rank=2))
    program.save(root / "run")
    folded = lorafx.fold(program)
    lorafx.export(folded, root / "folded", format="hf")
    lorafx.export(folded, root / "onnx", format="onnx")
    return {name: root / name for name in ("checkpoint", "run", "folded", "onnx")}


def test_any_two_folders_compare(folders: dict[str, Path]) -> None:
    runners = {name: open_runner(folder) for name, folder in folders.items()}
    assert {name: runner.kind for name, runner in runners.items()} == {
        "checkpoint": "checkpoint",
        "run": "run",
        "folded": "folded",
        "onnx": "onnx",
    }
    for a, b in (("run", "folded"), ("folded", "onnx"), ("onnx", "run")):
        result = verify(runners[a], runners[b])
        assert result.ok, result.text()
        assert verify(runners[a], runners[b], texts=["w1 w2", "w3 w4 w5", "w6"]).ok
    for name in ("run", "folded", "onnx"):
        assert not verify(runners["checkpoint"], runners[name]).ok


def test_code_in_a_folder_runs_only_when_trusted(folders: dict[str, Path], tmp_path: Path) -> None:
    lorafx.export(lorafx.load(folders["run"]), tmp_path / "pt2", format="pt2")
    with pytest.raises(UsageError, match="trust_remote_code"):
        open_runner(tmp_path / "pt2")
    opened = open_runner(tmp_path / "pt2", trust_remote_code=True)
    assert (opened.kind, opened.dtype) == ("dynamo", torch.float32)
    assert verify(folders["onnx"], opened).ok
    assert verify(folders["run"], tmp_path / "pt2", trust_remote_code=True).ok


def test_token_types_count_when_both_take_them(folders: dict[str, Path]) -> None:
    specs = merged(open_runner(folders["folded"]).inputs, open_runner(folders["onnx"]).inputs)
    assert [spec.name for spec in specs if spec.high == 2 and not spec.is_mask] == ["token_type_ids"]
    without = tuple(spec for spec in specs if spec.name != "token_type_ids")
    assert [spec.name for spec in merged(specs, without)] == ["input_ids", "attention_mask"]


def test_unusable_folders_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such"):
        open_runner(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text("")
    with pytest.raises(ArtifactError, match=r"lorafx\.json"):
        open_runner(tmp_path / "run")
    (tmp_path / "onnx").mkdir()
    for file in ("export.json", "config.json"):
        (tmp_path / "onnx" / file).write_bytes((folders["onnx"] / file).read_bytes())
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(ArtifactError, match="onnx model cannot be opened"):
        open_runner(tmp_path / "onnx")
    (tmp_path / "onnx" / "export.json").write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        open_runner(tmp_path / "onnx")


def test_what_has_no_fixed_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="without weights"):
        open_runner(lorafx.capture(_config_folder(tmp_path / "meta"), meta=True))
    with torch.device("meta"):
        empty = bert()
    with pytest.raises(UsageError, match="meta device"):
        open_runner(empty)
    backbone: Any = hf.BertModel(eager("bert").config)  # type: ignore[arg-type]
    backbone.save_pretrained(tmp_path / "fresh")
    config = json.loads((tmp_path / "fresh" / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "fresh" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"no weights for classifier\.bias"):
        verify(tmp_path / "fresh", eager("bert"))


def _config_folder(folder: Path) -> Path:
    model: Any = bert()
    model.config.architectures = ["BertForSequenceClassification"]
    model.config.save_pretrained(folder)
    return folder


def test_the_provider_is_the_one_that_runs(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runner = open_runner(folders["onnx"], provider="cuda", threads=1)
    assert runner.provider == "CPUExecutionProvider"
    assert runner.note == "CUDAExecutionProvider was asked for but cannot be loaded here; CPUExecutionProvider ran it"
    notes = compare(open_runner(eager("bert")), runner, []).notes
    assert notes[0].endswith("CPUExecutionProvider ran it")
    with pytest.raises(UsageError, match="no CUDA device"):
        open_runner(eager("bert"), provider="cuda")
    with pytest.raises(UsageError, match="unknown provider 'tpu'"):
        open_runner(eager("bert"), provider="tpu")
    with pytest.raises(UsageError, match="another dtype"):
        open_runner(folders["onnx"], dtype=torch.float64)


def test_running_changes_nothing() -> None:
    model = changed("bert", lambda model: model.train())
    model.get_submodule("bert.pooler").eval()
    modes = [module.training for module in model.modules()]
    threads = torch.get_num_threads()
    runner = open_runner(model, threads=threads + 1)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "unheard_of": torch.ones(1)}
    outputs = runner(inputs)
    assert set(outputs) == {"logits"}
    assert not outputs["logits"].requires_grad
    assert torch.equal(outputs["logits"], open_runner(eager("bert"))(inputs)["logits"])
    assert [module.training for module in model.modules()] == modes
    assert torch.get_num_threads() == threads
    with pytest.raises(UsageError, match="missing input 'input_ids'"):
        runner({"attention_mask": torch.ones(1, 3)})


def test_wrapped_models_take_what_the_model_inside_takes() -> None:
    from peft import LoraConfig, get_peft_model

    compiled: Any = torch.compile(eager("bert"), backend="eager")
    assert verify(eager("bert"), compiled, shapes=[(2, 3)]).ok
    tuned: Any = get_peft_model(copy.deepcopy(eager("llama")), LoraConfig(target_modules="all-linear"))  # type: ignore[arg-type]
    assert verify(eager("llama"), tuned).ok


def test_plain_modules_are_compared_on_inputs_of_ones_own() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).eval()
    program = lorafx.capture(plain, inputs={"input": torch.randn(2, 4)})
    assert verify(plain, program).ok  # the program knows what it was captured with
    assert verify(plain, plain, inputs=[{"input": torch.randn(7, 4)}]).ok
    with pytest.raises(UsageError, match="neither model says what inputs it takes"):
        verify(plain, plain)
    with pytest.raises(UsageError, match="no tokenizer"):
        verify(plain, program, texts=["w1"])
    with pytest.raises(UsageError, match="cannot run int"):
        open_runner(3)


def test_named_outputs() -> None:
    one = torch.ones(1)
    found = named_outputs({"logits": one, "loss": one, "states": (one, None, {"a": one}), "past_key_values": [one]})
    assert list(found) == ["logits", "states.0", "states.2.a"]
    assert list(named_outputs(one)) == ["output"]


# ---- inputs


def _specs() -> tuple[InputSpec, ...]:
    text = (None, None)
    return (
        InputSpec("input_ids", torch.int64, text, 0, 50),
        InputSpec("attention_mask", torch.int64, text),
        InputSpec("decoder_input_ids", torch.int64, text, 0, 50),
        InputSpec("pixel_values", torch.float16, (None, 3, 4)),
    )


@settings(deadline=None, max_examples=60)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 40)), min_size=1, max_size=5),
    pad=st.sampled_from([None, 0, 3, 49]),
    left=st.booleans(),
    limit=st.sampled_from([None, 1, 7, 24]),
    seed=st.integers(0, 3),
)
def test_generated_inputs_are_what_a_model_may_see(
    shapes: list[tuple[int, int]], pad: int | None, left: bool, limit: int | None, seed: int
) -> None:
    generator = Generator(_specs(), seed, pad, left, limit)
    batches = list(generator.batches(shapes))
    again = list(generator.batches(shapes))
    assert len({batch.label for batch in batches}) == len(batches)
    for batch, same in zip(batches, again, strict=True):
        values = batch.values
        assert all(torch.equal(value, same.values[name]) for name, value in values.items())
        ids, mask = values["input_ids"], values["attention_mask"]
        assert ids.shape == mask.shape
        assert ids.shape[1] <= (limit or 40)
        assert values["decoder_input_ids"].shape[1] <= (limit or 41)
        assert values["pixel_values"].shape == (len(ids), 3, 4)
        assert values["pixel_values"].dtype is torch.float16
        assert int(ids.min()) >= 0
        assert int(ids.max()) < 50
        assert bool((mask.sum(1) >= 1).all())
        order = mask.flip(1) if left else mask
        assert bool((order.diff(dim=1) <= 0).all())  # text, then padding
        assert ("padded" in batch.label) == (not bool(mask.all()))
        if pad is not None:
            assert torch.equal(ids == pad, mask == 0)


def test_a_fixed_axis_stays_fixed() -> None:
    fixed = (InputSpec("input_ids", torch.int64, (3, 8), 0, 50),)
    free = (InputSpec("input_ids", torch.int64, (None, None), 0, 20),)
    (spec,) = merged(free, fixed)
    assert spec.sizes == (3, 8)
    assert spec.high == 20
    assert [batch.label for batch in Generator((spec,)).batches(SHAPES)] == ["3x8"]


def test_inputs_are_read_off_an_example() -> None:
    example = {"x": torch.tensor([3, 9]), "flag": True, "image": torch.zeros(2, 3, 4, 4)}
    ids, image = specs_of(example)
    assert (ids.low, ids.high, ids.sizes) == (3, 10, (None,))
    assert image.sizes == (None, 3, 4, 4)


def test_a_tokenizer_says_where_to_pad() -> None:
    tokenizer = words()
    tokenizer.padding_side = "left"
    generator = Generator(_specs()[:2])
    one, two = tokenised(["w1", "w2", "w3 w4 w5"], tokenizer, generator)
    assert one.values["attention_mask"].tolist() == [[1, 1, 1]]
    assert two.values["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    tokenizer.pad_token = None
    tokenizer.eos_token = "[SEP]"
    *_, padded = tokenised(["w1", "w2", "w3 w4 w5"], tokenizer, generator)
    assert padded.values["input_ids"][0, :2].tolist() == [3, 3]
    assert tokenizer.pad_token is None
    with pytest.raises(UsageError, match="no texts"):
        list(tokenised([" ", ""], tokenizer, generator))
    program = program_of("llama")
    result = verify(program, program, tokenizer=words())
    assert any("padded right" in case.inputs for case in result.cases)


def test_left_padding_comes_from_the_tokenizer() -> None:
    tokenizer = words()
    tokenizer.padding_side = "left"
    result = verify(eager("llama"), program_of("llama"), tokenizer=tokenizer)
    assert result.ok, result.text()
    assert any("padded left" in case.inputs for case in result.cases)


def test_an_empty_comparison_is_not_ok() -> None:
    empty = Comparison("a", "b", torch.float32, 1e-5, ())
    assert not empty.ok
    assert not empty.same_shapes
    assert empty.max_abs == math.inf
    one = open_runner(eager("bert"))
    unknown = dataclasses.replace(one, dtype=torch.float8_e5m2)
    with pytest.raises(UsageError, match="no tolerance is known for float8_e5m2"):
        compare(one, unknown, [Batch("x", {})])
