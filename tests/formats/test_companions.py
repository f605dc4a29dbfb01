"""What lies beside the weights goes along, whatever it is called, unless it is true of the base alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers as hf

from lorafx.editing.patch_folder import apply
from lorafx.errors import ArtifactError, UsageError
from lorafx.formats.companions import companions, copy_companions, inner_companions
from tests.small import gpt2

TRUE_OF_BOTH = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("source.spm", "target.spm", "bpe.codes", "tekken.json", "chat_template.jinja", "entity_vocab.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "generation_config.json"),
    *("modeling_own.py", "LICENSE", "notes.txt"),
    *("additional_chat_templates/tool_use.jinja", "qformer_tokenizer/tokenizer.json", "qformer_tokenizer/vocab.txt"),
}
OF_THE_BASE = {
    *("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "model.onnx"),
    *("README.md", "all_results.json", "trainer_state.json", "training_args.bin", "optimizer.pt", ".gitattributes"),
    *(
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorafx.json",
        "report.json",
        "blocks.svg",
        "certificate.json",
    ),
    *("onnx/model.onnx", "onnx/tokenizer.json", "checkpoint-5/model.safetensors", "checkpoint-5/tokenizer.json"),
    *("original/consolidated.00.pth", "original/tokenizer.model", ".git/config", "run/lorafx.json", "run/vocab.txt"),
    "data/train.csv",
}
ENCODER = {
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"),
    *("2_Dense/config.json", "2_Dense/model.safetensors", "deep/3_Dense/pytorch_model.bin"),
}
MODULES = [{"idx": n, "path": p} for n, p in enumerate(["", "1_Pooling", "2_Dense", "deep/3_Dense", "4_Normalize"])]


def fill(folder: Path, names: set[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "config.json").write_text('{"architectures": ["Encoder"]}')
    return folder


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    folder = fill(tmp_path / "encoder", TRUE_OF_BOTH | OF_THE_BASE | ENCODER)
    (folder / "modules.json").write_text(json.dumps(MODULES))
    (folder / "4_Normalize").mkdir()
    return folder


def program(name: str, folder: Path | None, **model: Any) -> Any:
    """As much of a program as says where it came from."""
    source = SimpleNamespace(path=None if folder is None else str(folder), model=SimpleNamespace(**model))
    return SimpleNamespace(name=name, source=source)


def test_all_goes_along_but_what_is_true_of_the_base_alone(encoder: Path) -> None:
    assert set(companions(encoder)) == TRUE_OF_BOTH | ENCODER | {"4_Normalize"}


def test_a_copy_has_the_same_bytes_and_keeps_what_was_written(encoder: Path, tmp_path: Path) -> None:
    target = fill(tmp_path / "to", {"modeling_own.py", "generation_config.json"})
    (target / "modeling_own.py").write_text("written")
    model = {"can_generate": lambda: True, "generation_config": None}
    copied = copy_companions(program("Encoder", encoder, **model), target)
    assert set(copied) == (TRUE_OF_BOTH | ENCODER | {"4_Normalize"}) - {"modeling_own.py"}
    files = [name for name in copied if (encoder / name).is_file()]
    assert all((target / name).read_bytes() == (encoder / name).read_bytes() for name in files)
    assert (target / "4_Normalize").is_dir()
    assert (target / "modeling_own.py").read_text() == "written"


def test_another_head_is_no_sentence_encoder_and_what_cannot_generate_has_no_settings(
    encoder: Path, tmp_path: Path
) -> None:
    (tmp_path / "to").mkdir()
    copied = copy_companions(program("Classifier", encoder), tmp_path / "to")
    assert set(copied) == TRUE_OF_BOTH - {"generation_config.json"}


@pytest.mark.parametrize("modules", ['{"a": 1}', "[", '[{"path": "../secret"}, {"path": "/etc"}, {"path": "absent"}]'])
def test_a_broken_list_of_modules_names_nothing(modules: str, tmp_path: Path) -> None:
    fill(tmp_path / "secret", {"key"})
    folder = fill(tmp_path / "base", {"modules.json", "vocab.txt"})
    (folder / "modules.json").write_text(modules)
    assert companions(folder) == ["modules.json", "vocab.txt"]
    assert inner_companions(folder) == []


def test_a_checkpoint_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere: the checkpoint it was captured from is gone"):
        copy_companions(program("Encoder", tmp_path / "nowhere"), tmp_path)


def test_generation_settings_of_a_model_from_memory(tmp_path: Path) -> None:
    model = gpt2()
    model.generation_config.eos_token_id = [3, 9, 11]  # type: ignore[union-attr]
    source: Any = SimpleNamespace(name="GPT2", source=SimpleNamespace(path=None, model=model))
    assert copy_companions(source, tmp_path) == ["generation_config.json"]
    assert hf.GenerationConfig.from_pretrained(tmp_path).eos_token_id == [3, 9, 11]
    model.generation_config.update(do_sample=False, temperature=0.5)  # type: ignore[union-attr, operator]
    with pytest.raises(UsageError, match="its generation_config cannot be written"):
        copy_companions(source, tmp_path)


def test_a_patched_checkpoint_keeps_its_modules(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    from lorafx.editing.patch import Patch

    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    (folder / "model.onnx").write_text("other weights")
    apply(folder, Patch(()), tmp_path / "patched")
    files = {file.relative_to(tmp_path / "patched").as_posix() for file in (tmp_path / "patched").rglob("*.*")}
    assert {"1_Pooling/config.json", "modules.json", "model.safetensors", "vocab.txt"} <= files
    assert "model.onnx" not in files


def test_folders_that_are_written_have_them(tmp_path: Path) -> None:
    """Of a chat model with several end tokens, in every format that is quick to write (ONNX makes the same call)."""
    import torch

    import lorafx
    from lorafx.passes.lora import Lora

    torch.manual_seed(0)
    model: Any = gpt2()
    model.generation_config = hf.GenerationConfig(eos_token_id=[3, 9, 11], do_sample=True, temperature=0.6)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages }}")
    made = lorafx.rewrite(lorafx.capture(tmp_path / "base"), [Lora(rank=2)])
    for value in made.trainable().values():
        torch.nn.init.normal_(value, std=0.1)
    made.save(tmp_path / "run")
    lorafx.export(made, tmp_path / "hf", format="hf", check=False)
    lorafx.export(made, tmp_path / "peft", format="peft", check=False)
    for kind in ("run", "hf", "peft"):
        for name in ("generation_config.json", "chat_template.jinja"):
            assert (tmp_path / kind / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert again.generation_config.eos_token_id == [3, 9, 11]
