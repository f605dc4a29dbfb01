"""Checkpoints whose layers have other widths each: written by their config, opened by it, and what it cannot say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from click.testing import CliRunner
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

import lorafx
from lorafx.cli import main
from lorafx.errors import ArtifactError, UsageError
from lorafx.graph.tree import named_tensors
from lorafx.models.checkpoint import open_model
from lorafx.models.layered import own_configs
from lorafx.passes.lora import Lora
from lorafx.passes.magnitude import Magnitude
from lorafx.public import Program
from tests import zoo
from tests.small import words

SHARES = {0: 0.5, 1: 0.75}
FEED_FORWARD = "*.mlp.*"


def narrowed(program: Program, targets: str = "all-linear", shares: dict[int, float] = SHARES) -> Program:
    """Folded, with other shares of each layer closed."""
    closed = [Magnitude(targets=targets, blocks=block, keep=keep) for block, keep in shares.items()]
    return lorafx.fold(lorafx.rewrite(program, closed), gather="never")


def clip() -> Any:
    """An image classifier whose config is one of two models, of texts and of images."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    rest: dict[str, Any] = {"projection_dim": 8, "num_labels": 2}
    return hf.CLIPForImageClassification(hf.CLIPConfig(vision_config=vision, **rest))


def said(folder: Path) -> dict[str, dict[str, int]]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("per_layer_config", {})


def say(folder: Path, layer: str, **sizes: int) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["per_layer_config"].setdefault(layer, {}).update(sizes)
    file.write_text(json.dumps(config), encoding="utf-8")
    (folder / "lorafx.json").unlink(missing_ok=True)  # as other tools write folders


def distance(program: Program, folder: Path) -> float:
    """Between a program and what a folder holds, both in fp64."""
    inputs = zoo.text(2, 9)
    again = zoo.doubled(lorafx.load(folder))
    return zoo.distance(zoo.run(zoo.doubled(program), inputs), zoo.run(again, inputs))


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(named_tensors(open_model(folder, None, {})[0]))


def decoder(kind: Any, config: Any) -> Program:
    torch.manual_seed(0)
    return lorafx.capture(kind(config).eval(), inputs=zoo.text(2, 7))


def qwen2() -> Program:
    """Its config says no width of a head."""
    sizes = {key: value for key, value in zoo.DECODER.items() if key != "head_dim"}
    return decoder(hf.Qwen2ForCausalLM, hf.Qwen2Config(**sizes))


def phi3() -> Program:
    """Queries, keys and values are one tensor, and its attention asks its config again when it runs."""
    return decoder(hf.Phi3ForCausalLM, hf.Phi3Config(**zoo.DECODER))


FAMILIES: dict[str, Any] = {
    "llama": (lambda: zoo.captured("llama"), "all-linear"),
    "gpt2": (lambda: zoo.captured("gpt2"), FEED_FORWARD),
    "mixtral": (lambda: zoo.captured("mixtral"), "all-linear"),
    "qwen2": (qwen2, "all-linear"),
    "phi3": (phi3, "all-linear"),
}


@pytest.mark.parametrize(
    "name", [name if name == "llama" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_other_widths_in_every_layer_are_opened_again(name: str, tmp_path: Path) -> None:
    build, targets = FAMILIES[name]
    folded = narrowed(build(), targets)
    result = lorafx.export(folded, tmp_path / "folded", "layered")
    assert result is not None
    assert result.ok
    assert said(tmp_path / "folded")
    assert not list((tmp_path / "folded").glob("*.pt2"))
    written = weights(tmp_path / "folded")
    for key, tensor in named_tensors(folded.root):
        if key in written:
            assert torch.equal(written[key], tensor), key
    assert distance(folded, tmp_path / "folded") < 1e-12


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that the command line folded: its layers have other heads and neurons each."""
    top = tmp_path_factory.mktemp("layered")
    model: Any = zoo.build("llama")
    model.save_pretrained(top / "base")
    words().save_pretrained(top / "base")
    closed = [Magnitude(targets="all-linear", blocks=block, keep=keep) for block, keep in SHARES.items()]
    lorafx.rewrite(lorafx.capture(top / "base"), closed).save(top / "run")
    result = CliRunner().invoke(main, ["fold", str(top / "run"), "-o", str(top / "folded")])
    assert result.exit_code == 0, result.output
    return top / "folded"


def test_fold_writes_tensors_and_what_the_config_says(folded: Path) -> None:
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {file.name for file in folded.iterdir()}
    assert said(folded) == {
        "0": {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1},
        "1": {"intermediate_size": 36},
    }
    assert CliRunner().invoke(main, ["check", str(folded)]).exit_code == 0


def test_transformers_knows_that_no_size_is_that_of_all_layers(folded: Path) -> None:
    """Its Llama asks the whole config for a size that differs, and says so; nothing is built with wrong widths."""
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        hf.AutoModelForCausalLM.from_pretrained(folded)


def test_what_transformers_would_not_open_is_no_checkpoint_of_its_own(folded: Path, tmp_path: Path) -> None:
    program = lorafx.capture(folded)
    why = r"the layers of this LlamaForCausalLM have widths of their own, which its class .* does not read .*--uniform"
    with pytest.raises(UsageError, match=why) as raised:
        lorafx.export(program, tmp_path / "plain", "hf")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "plain").exists()
    arguments = ["export", str(folded), "-o", str(tmp_path / "layered"), "--format", "layered"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert said(tmp_path / "layered") == said(folded)
    assert distance(program, tmp_path / "layered") < 1e-12


def test_what_was_folded_can_be_folded_again(folded: Path, tmp_path: Path) -> None:
    program = lorafx.capture(folded)
    again = narrowed(program, FEED_FORWARD, {1: 0.5})
    lorafx.export(again, tmp_path / "again", "layered")
    assert said(tmp_path / "again")["0"] == said(folded)["0"]
    assert said(tmp_path / "again")["1"] == {"intermediate_size": 18}
    assert distance(again, tmp_path / "again") < 1e-12


def test_layers_that_became_alike_are_said_once(folded: Path) -> None:
    from lorafx.formats.hf import hf_model

    alike = narrowed(lorafx.capture(folded), FEED_FORWARD, {1: 24 / 36})
    config: Any = hf_model(alike).config
    assert config.intermediate_size == 24
    assert config.to_dict()["per_layer_config"] == {"0": {"num_attention_heads": 2, "num_key_value_heads": 1}}


@pytest.mark.slow
def test_every_command_takes_such_a_folder(folded: Path, tmp_path: Path) -> None:
    decoder, graph, run = (str(tmp_path / name) for name in ("decoder", "graph", "run"))
    base = str(folded)
    for arguments in (
        ["export", base, "-o", decoder, "--generate"],
        ["export", base, "-o", graph],
        ["verify", base, graph],
        ["verify", base, decoder],
        ["rewrite", base, "--pass", "lora", "-o", run],
        ["inspect", run],
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, f"{arguments}: {result.output}"
    prompt = ["--prompt", "w3 w7 w1", "--json", "--max-new-tokens", "6"]
    first, second = (CliRunner().invoke(main, ["generate", one, *prompt]) for one in (base, decoder))
    assert json.loads(first.stdout)["tokens"] == json.loads(second.stdout)["tokens"]
    genai = json.loads((tmp_path / "decoder" / "genai_config.json").read_text(encoding="utf-8"))
    assert genai["model"]["decoder"]["num_attention_heads"] == 2


def test_a_config_that_the_tensors_contradict_is_refused_in_one_line(folded: Path, tmp_path: Path) -> None:
    import shutil

    def refused(name: str, words: str, layer: str = "1", **sizes: int) -> None:
        copy = Path(shutil.copytree(folded, tmp_path / name))
        say(copy, layer, **sizes)
        with pytest.raises(ArtifactError, match=words) as raised:
            lorafx.load(copy)
        assert "\n" not in str(raised.value)

    refused(
        "wide", r"layers.1.mlp.\w+.weight as \(.*36.*\), where .* of this config .* has \(.*37", intermediate_size=37
    )
    refused("few", r"layers.0.self_attn.\w+.weight as", "0", num_attention_heads=3)
    refused(
        "far", r"cannot open it: .*keys must be integer layer indices in the range \[0, 2\)", "2", intermediate_size=4
    )
    refused("odd", r"cannot open it: 'hidden_size' is a per-layer attribute", hidden_size=16)


def test_transformers_opens_what_its_classes_read_by_layers(tmp_path: Path) -> None:
    """Step 3.7 has other heads in its sliding layers: folded with an adapter, and opened without lorafx."""
    torch.manual_seed(0)
    kinds: dict[str, Any] = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}
    config = Step3p7TextConfig(
        **zoo.DECODER, **kinds, num_sliding_attention_heads=2, mlp_layer_types=["dense", "dense"]
    )
    program = lorafx.capture(Step3p7TextModel(config).eval(), inputs=zoo.text(2, 7))
    adapted = lorafx.rewrite(program, [Lora(rank=2, targets="*.self_attn.*,*.mlp.*")])
    lorafx.export(zoo.randomised(adapted), tmp_path / "folded", "hf")
    assert said(tmp_path / "folded") == {"1": {"num_attention_heads": 2}}
    plain: Any = Step3p7TextModel.from_pretrained(tmp_path / "folded").eval()
    inputs = zoo.text(2, 9)
    assert zoo.distance(zoo.run(adapted, inputs), zoo.eager(plain, inputs)) < 1e-5  # fp32: merged weights round


def test_classes_are_put_back() -> None:
    config: Any = hf.LlamaConfig(**zoo.DECODER)
    places = (hf.PreTrainedModel, hf.PreTrainedConfig, hf.LlamaConfig)
    before = [dict(vars(place)) for place in places]
    config.per_layer_config = {0: {"intermediate_size": 7}}

    def build_and_fail() -> None:
        with own_configs(config):
            model: Any = hf.LlamaForCausalLM(config)
            assert [layer.mlp.intermediate_size for layer in model.model.layers] == [7, 48]
            hf.LlamaConfig(**{**zoo.DECODER, "num_attention_heads": 5})

    # A config whose layers are alike is checked as ever.
    with pytest.raises(StrictDataclassClassValidationError, match="not a multiple"):
        build_and_fail()
    for place, names in zip(places, before, strict=True):
        assert {name: vars(place)[name] for name in names} == names
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        hf.LlamaForCausalLM(config)


def test_a_config_of_two_models_says_no_widths_of_layers(tmp_path: Path) -> None:
    folded = narrowed(lorafx.capture(clip()), "*.mlp.*")
    with pytest.raises(UsageError, match="a CLIPForImageClassification checkpoint cannot hold this program"):
        lorafx.export(folded, tmp_path / "out", format="hf")
