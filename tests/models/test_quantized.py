"""Quantised checkpoints: opened as the numbers their weights stand for, or refused in one line; never as bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import lorafx
from lorafx.cli import main
from lorafx.editing.patch_folder import slots
from lorafx.errors import ArtifactError, UsageError
from lorafx.models.checkpoint import open_model
from lorafx.models.quantized import Quantization
from lorafx.passes.lora import Lora
from lorafx.proof.merges import check_merge
from lorafx.proof.requantised import requantised
from tests import foreign, zoo

#: What opens on any machine, without further packages.
ANYWHERE = ("fp8", "mxfp8", "mxfp4", "gptq", "awq")
#: What transformers calls by another name where it has several classes for one method.
METHODS = {name.partition("_4bit")[0].partition("_8bit")[0] for name in AUTO_QUANTIZATION_CONFIG_MAPPING}


def say(folder: Path, quantization: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantization}))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "base"
    zoo.build("llama").save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    return folder


def copy(base: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def in_fp8(base: Path, folder: Path) -> dict[str, Tensor]:
    """The checkpoint with its projections in blocks of 16 × 16 numbers of 8 bits; what they stand for, in fp64."""
    copy(base, folder)
    stored, exact = {}, {}
    for name, value in load_file(base / "model.safetensors").items():
        stored[name] = value
        if "_proj" in name:
            blocks = value.reshape(value.shape[0] // 16, 16, value.shape[1] // 16, 16)
            scale = blocks.abs().amax((1, 3)) / 448
            numbers = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            stored |= {name: numbers.reshape(value.shape), f"{name}_scale_inv": scale}
            exact[name] = (numbers.double() * scale.double()[:, None, :, None]).reshape(value.shape)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    say(folder, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]})
    return exact


# ---- refused


@pytest.mark.parametrize("method", [*sorted(METHODS - set(ANYWHERE)), "of-tomorrow", ""])
def test_what_cannot_be_read_is_one_line(
    method: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafx.models.quantized.find_spec", lambda name: None)
    say(copy(base, tmp_path / "base"), {"quant_method": method, "bits": 4})
    for meta in (False, True):
        with pytest.raises(ArtifactError) as error:
            open_model(tmp_path / "base", None, {}, meta=meta)
        text = str(error.value)
        assert text.startswith(f"{tmp_path / 'base'}: its weights are quantised")
        assert "\n" not in text
        installable = method in ("bitsandbytes", "torchao", "compressed-tensors")
        assert (f"(pip install {method})" if installable else "is not dequantised here (known: bits") in text
        assert (method or "a method without a name") in text


def test_a_command_says_so_too(base: Path, tmp_path: Path) -> None:
    say(copy(base, tmp_path / "base"), {"quant_method": "hqq", "bits": 4})
    for command in (["inspect"], ["rewrite", "--pass", "lora", "-o", str(tmp_path / "run")]):
        result = CliRunner().invoke(main, [*command, str(tmp_path / "base")])
        assert result.exit_code == 5
        assert "its weights are quantised (hqq)" in result.output
    assert not (tmp_path / "run").exists()


def test_where_a_config_says_it() -> None:
    assert Quantization.of({"hidden_size": 3, "quantization_config": None}) is None
    assert Quantization.of({"text_config": {"hidden_size": 3}}) is None
    for config in (
        {"quantization_config": {"load_in_4bit": True}},
        {"text_config": {"quantization_config": {"load_in_8bit": True}}},
    ):
        found = Quantization.of(config)
        assert found is not None
        assert found.method == "bitsandbytes"
    old = Quantization.of({"compression_config": {"quant_method": "compressed-tensors"}})
    assert old is not None
    assert old.method == "compressed-tensors"


def test_what_is_left_quantised_is_refused(base: Path) -> None:
    """A layer that transformers did not dequantise would be folded as whole numbers."""
    model: Any = open_model(base, None, {})[0]
    model.lm_head.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ArtifactError, match=r"transformers leaves lm_head\.weight so"):
        Quantization("fp8", {}).dequantized(base, model)
    model.lm_head.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ArtifactError, match=r"transformers leaves lm_head\.weight so"):
        Quantization("fp8", {}).dequantized(base, model)


def test_whole_numbers_that_nothing_takes_are_refused(base: Path, tmp_path: Path) -> None:
    """In a checkpoint in full they are the masks of older classes."""
    in_fp8(base, tmp_path / "fp8")
    file = tmp_path / "fp8" / "model.safetensors"
    more = {"model.layers.0.self_attn.q_proj.codes": torch.ones(4, 4, dtype=torch.int32)}
    save_file({**load_file(file), **more}, file, {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"hold model\.layers\.0\.self_attn\.q_proj\.codes, for which"):
        open_model(tmp_path / "fp8", None, {})


def test_patches_and_merges_are_of_weights_in_full(base: Path, tmp_path: Path) -> None:
    in_fp8(base, tmp_path / "fp8")
    with pytest.raises(ArtifactError, match=r"quantised \(fp8\), and a patch needs them in full"):
        slots(tmp_path / "fp8")
    with pytest.raises(UsageError, match="quantised, which moved every one of them"):
        check_merge(base, tmp_path / "adapter", tmp_path / "fp8")


# ---- dequantised


def test_fp8_is_folded_as_what_it_stands_for(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exact = in_fp8(base, tmp_path / "fp8")
    model: Any = open_model(tmp_path / "fp8", None, {})[0]
    for name, value in exact.items():
        # One product in fp32: half of its last place.
        assert ((model.get_parameter(name).double() - value).abs() <= 2.0**-24 * value.abs()).all()
    adapted = foreign.adapted(model, {**foreign.R, "target_modules": ["q_proj", "down_proj"]})
    foreign.save(adapted, tmp_path / "adapter")
    paths = [str(tmp_path / name) for name in ("fp8", "adapter", "out")]
    result = CliRunner().invoke(main, ["fold", paths[0], "--adapter", paths[1], "-o", paths[2]])
    assert result.exit_code == 0, result.output
    again = f"{paths[0]}: quantised again as its base was (fp8): not tried here, "
    assert again in caplog.text  # which a terminal shows on stderr
    assert again.partition(": ")[2] in (tmp_path / "out" / "report.json").read_text()
    merged: Any = hf.LlamaForCausalLM.from_pretrained(paths[2]).eval()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    inputs = zoo.text(3, 6)
    assert zoo.distance(foreign.answers(adapted, inputs), zoo.eager(merged, inputs)) < 1e-5
    assert CliRunner().invoke(main, ["check", paths[2]]).exit_code == 0
    assert check_merge(paths[0], paths[1], paths[2]).ok


@pytest.mark.slow
def test_a_run_of_it_trains_in_full(base: Path, tmp_path: Path) -> None:
    """A rewrite that reads the config only, opened again with the weights."""
    in_fp8(base, tmp_path / "fp8")
    steps = ["--pass", "lora", "--lora.rank", "4", "--lora.targets", "q_proj"]
    result = CliRunner().invoke(main, ["rewrite", str(tmp_path / "fp8"), *steps, "-o", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    program = lorafx.load(tmp_path / "run")
    assert {value.dtype for value in program.root.parameters()} == {torch.float32}
    eager: Any = open_model(tmp_path / "fp8", None, {})[0]
    inputs = zoo.text(3, 6)
    # B = 0, and the same kernels over the same weights.
    assert zoo.distance(zoo.eager(eager, inputs), zoo.run(program, inputs)) < 1e-6


def test_mxfp4_experts_are_what_they_stand_for(tmp_path: Path) -> None:
    """gpt-oss as it is published: two numbers of 4 bits a byte, a power of two for 32 of them."""
    sizes: dict[str, Any] = {**zoo.DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    config = hf.GptOssConfig(**sizes)
    hf.GptOssForCausalLM(config).save_pretrained(tmp_path / "base")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    generator = torch.Generator().manual_seed(0)
    stored, exact = {}, {}
    for name, value in load_file(tmp_path / "base" / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = value
            continue
        experts, features, out = value.shape
        codes = torch.randint(0, 16, (experts, out, features // 32, 32), generator=generator)
        scales = torch.randint(120, 127, (experts, out, features // 32), generator=generator)
        stored[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        stored[f"{name}_scales"] = scales.to(torch.uint8)
        numbers = values[codes] * torch.exp2(scales - 127.0)[..., None]
        exact[name] = numbers.reshape(experts, out, features).transpose(1, 2)
    save_file(stored, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    say(tmp_path / "base", {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "lm_head"]})
    model: Any = open_model(tmp_path / "base", None, {})[0]
    assert len(exact) == 4
    assert all(torch.equal(model.get_parameter(name), value) for name, value in exact.items())


def fields(numbers: Tensor, bits: int) -> Tensor:
    """Whole numbers (rows, columns), several to a word of 32 bits in each row, the first in the lowest bits."""
    each = numbers.reshape(len(numbers), -1, 32 // bits).long()
    words = (each << torch.arange(0, 32, bits)).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def packed(base: Path, folder: Path, quantization: dict[str, Any]) -> dict[str, Tensor]:
    """The checkpoint with random numbers packed for its projections; what they stand for (out, in)."""
    copy(base, folder)
    method, bits, size = (quantization[key] for key in ("quant_method", "bits", "group_size"))
    generator = torch.Generator().manual_seed(0)
    stored, exact = {}, {}
    for name, value in load_file(base / "model.safetensors").items():
        if "_proj" not in name:
            stored[name] = value
            continue
        (out, features), module = value.shape, name.removesuffix(".weight")
        codes = torch.randint(0, 2**bits, (features, out), generator=generator)
        zeros = torch.randint(1, 2**bits - 1, (features // size, out), generator=generator)
        scales = (0.01 + 0.1 * torch.rand(features // size, out, generator=generator)).half()
        groups = torch.randperm(features, generator=generator) // size
        if method == "awq":
            groups = groups.sort().values
            # AutoAWQ's order within a word, of which the reader has the inverse.
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            words = [fields(part.reshape(len(part), -1, 8)[..., order].flatten(1), bits) for part in (codes, zeros)]
            stored |= {f"{module}.qweight": words[0], f"{module}.qzeros": words[1], f"{module}.scales": scales}
        else:
            less = 0 if "gptq_v2" in quantization.values() else 1
            stored |= {f"{module}.qweight": fields(codes.t(), bits).t().contiguous(), f"{module}.scales": scales}
            stored |= {f"{module}.qzeros": fields(zeros - less, bits), f"{module}.g_idx": groups.int()}
        exact[name] = (scales.double()[groups] * (codes - zeros[groups])).t()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    say(folder, quantization)
    return exact


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True},
        {"quant_method": "gptq", "bits": 8, "group_size": 16, "checkpoint_format": "gptq_v2"},
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "format": "gptq_v2"},
        {"quant_method": "gptq", "bits": 2, "group_size": 16, "checkpoint_format": "gptq"},
        {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True},
    ],
    ids=["gptq", "gptq-v2", "gptq-v2-format", "gptq-2-bits", "awq"],
)
def test_packed_weights_are_what_they_stand_for(quantization: dict[str, Any], base: Path, tmp_path: Path) -> None:
    exact = packed(base, tmp_path / "packed", quantization)
    model, fresh = open_model(tmp_path / "packed", None, {})
    assert not fresh
    assert len(exact) == 14
    # A whole number of 8 bits and one of the 11 of fp16: their product is exact in fp32.
    assert all(torch.equal(model.get_parameter(name).double(), value) for name, value in exact.items())
    assert all(
        torch.equal(model.get_parameter(name), value)
        for name, value in load_file(base / "model.safetensors").items()
        if name not in exact
    )


def test_what_is_packed_otherwise_is_refused(base: Path, tmp_path: Path) -> None:
    plain = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    packed(base, tmp_path / "packed", plain)
    for more, why in (
        ({"bits": 3}, "gptq with 3 bits"),
        ({"checkpoint_format": "marlin"}, "gptq with layout marlin"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "gptq with layout gptq_v2"),
        ({"dynamic": {"lm_head": {}}}, "gptq with dynamic set"),
        ({"adapter": {"path": "eora"}}, "gptq with adapter set"),
        ({"quant_method": "awq", "version": "gemv"}, "awq with layout gemv"),
        ({"quant_method": "awq"}, r"down_proj: its qweight, qzeros, scales and groups do not fit"),
        ({"bits": 8}, r"down_proj: its qweight, qzeros, scales and groups do not fit"),
    ):
        say(tmp_path / "packed", {**plain, **more})
        with pytest.raises(ArtifactError, match=why):
            open_model(tmp_path / "packed", None, {})
    say(tmp_path / "packed", plain)
    file = tmp_path / "packed" / "model.safetensors"
    stored = load_file(file)
    name = "model.layers.0.mlp.up_proj"
    save_file({**stored, f"{name}.qzeros": torch.full_like(stored[f"{name}.qzeros"], -1)}, file)
    with pytest.raises(ArtifactError, match="zeros that GPTQ's first layout cannot hold"):
        open_model(tmp_path / "packed", None, {})
    save_file({key: value for key, value in stored.items() if key != f"{name}.scales"}, file)
    with pytest.raises(ArtifactError, match=r"up_proj has a qweight and no scales beside it"):
        open_model(tmp_path / "packed", None, {})


def test_a_layer_of_another_layout_is_refused(tmp_path: Path) -> None:
    """GPT-2's are stored (in, out), which a square one would not show."""
    zoo.build("gpt2").save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    file = tmp_path / "base" / "model.safetensors"
    stored = load_file(file)
    name = next(key for key in stored if key.endswith("attn.c_proj.weight")).removesuffix(".weight")
    codes, zeros = torch.ones(32, 32, dtype=torch.long), torch.ones(2, 32, dtype=torch.long)
    parts = {
        "qweight": fields(codes, 4).t().contiguous(),
        "qzeros": fields(zeros, 4),
        "scales": torch.ones(2, 32).half(),
    }
    del stored[f"{name}.weight"]
    save_file({**stored, **{f"{name}.{part}": value for part, value in parts.items()}}, file, {"format": "pt"})
    say(tmp_path / "base", {"quant_method": "gptq", "bits": 4, "group_size": 16})
    with pytest.raises(ArtifactError, match="c_proj is quantised and a Conv1D, whose layout is not known"):
        open_model(tmp_path / "base", None, {})


# ---- what quantising again would cost


def test_the_error_of_quantising_again(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that rounds to whole 64ths, once to the base and once to what was folded."""

    def rounded(folder: Path) -> Any:
        model: Any = open_model(folder, None, {})[0]
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_((value * 64).round() / 64 if "_proj" in name else value)
        return model

    rounded(base).save_pretrained(tmp_path / "base")
    program = lorafx.capture(tmp_path / "base")
    torch.manual_seed(0)
    program = zoo.randomised(lorafx.rewrite(program, [Lora(targets="q_proj", rank=2)]), 0.01)
    folded = lorafx.fold(program)
    lorafx.export(folded, tmp_path / "out", format="hf")
    assert requantised(folded, tmp_path / "out") is None
    say(tmp_path / "base", {"quant_method": "fp8"})
    monkeypatch.setattr(Quantization, "applied", lambda self, cls, path, options: rounded(path))
    line = requantised(folded, tmp_path / "out")
    names = [f"model.layers.{block}.self_attn.q_proj.weight" for block in (0, 1)]
    new = torch.cat([folded.tensor(name).detach() for name in names]).double()
    old = torch.cat([program.tensor(name).detach() for name in names]).double()
    lost, moved = (float((other - new).norm() / new.norm()) for other in ((new * 64).round() / 64, old))
    assert line is not None
    assert "the 2 weights that folding changed move by " in line
    found = [float(word) for word in line.replace(";", "").split() if word.replace(".", "").replace("e-", "").isdigit()]
    # As they are printed: three digits.
    assert found[1] == pytest.approx(lost, rel=5e-3)
    assert found[-1] == pytest.approx(moved, rel=5e-3)
