"""What a checkpoint holds, and what a caller asks for, is used or refused; never dropped in silence."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import lorafx
from lorafx.errors import ArtifactError, UsageError
from lorafx.models.checkpoint import open_model
from tests.small import bert


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    bert(num_labels=3).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    return tmp_path / "base"


def config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


def test_a_head_is_left_out_where_another_task_was_asked_for(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lorafx"):
        assert type(open_model(checkpoint, "feature-extraction", {})[0]) is hf.BertModel
    assert "classifier.bias and 1 more is in its files but not in a BertModel" in caplog.text
    model, fresh = open_model(checkpoint, "fill-mask", {})
    assert type(model) is hf.BertForMaskedLM
    assert "cls.predictions.bias" in fresh


def test_a_head_is_not_left_out_when_nobody_chose_a_class(checkpoint: Path) -> None:
    config(checkpoint, architectures=None)
    with pytest.raises(ArtifactError, match=r"names no architecture, and a BertModel leaves out classifier.bias; say"):
        open_model(checkpoint, None, {})
    assert open_model(checkpoint, "text-classification", {})[1] == frozenset()


@pytest.mark.parametrize("task", [None, "text-classification", "feature-extraction"])
def test_blocks_that_the_config_does_not_count_are_refused(checkpoint: Path, task: str | None) -> None:
    config(checkpoint, num_hidden_layers=1)
    with pytest.raises(ArtifactError, match=r"hold bert.encoder.layer.1.*, for which a Bert\w+ of this config has no"):
        open_model(checkpoint, task, {})


def test_masks_that_older_classes_kept_are_no_weights(checkpoint: Path) -> None:
    values = load_file(checkpoint / "model.safetensors")
    values["bert.encoder.layer.0.attention.masked_bias"] = torch.tensor(-1e4)
    values["bert.encoder.layer.0.attention.causal"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    save_file(values, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert open_model(checkpoint, None, {})[1] == frozenset()


def test_matrices_of_an_adapter_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "adapted"))
    values = load_file(folder / "model.safetensors")
    values["bert.encoder.layer.0.attention.self.query.lora_A.weight"] = torch.ones(2, 32)
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"query.lora_A.weight, for which a Bert"):
        lorafx.capture(folder)


@pytest.mark.parametrize("options", [{"num_labels": 5}, {"nonsense": 1}, {"meta": True}])
def test_a_model_in_memory_takes_no_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(options))} is for opening a folder"):
        lorafx.capture(bert(), **options)


@pytest.mark.parametrize("meta", [False, True])
def test_an_option_that_transformers_does_not_know_is_refused(checkpoint: Path, meta: bool) -> None:
    with pytest.raises(UsageError, match="transformers takes no 'nonsense' for this model"):
        lorafx.capture(checkpoint, meta=meta, nonsense=1)


# ---- shapes and shards


def test_a_weight_of_another_shape_is_named_with_both(checkpoint: Path) -> None:
    config(checkpoint, intermediate_size=40)
    with pytest.raises(
        ArtifactError, match=r"hold bert\S+ as \(\d+,?\d*.*\), where a Bert\w+ of this config .* has \("
    ):
        open_model(checkpoint, None, {})


def test_a_head_of_another_size_is_anew_only_when_asked_for(checkpoint: Path) -> None:
    with pytest.raises(ArtifactError, match=r"hold classifier.bias as \(3,\), .* has \(5,\) \(and 1 more\)"):
        open_model(checkpoint, None, {"num_labels": 5})
    model, fresh = open_model(checkpoint, None, {"num_labels": 5, "ignore_mismatched_sizes": True})
    assert fresh == {"classifier.weight", "classifier.bias"}, "their values are random"
    assert model.get_parameter("classifier.weight").shape[0] == 5


def test_a_head_of_another_size_is_seen_before_weights_are_read(checkpoint: Path) -> None:
    with pytest.raises(ArtifactError, match=r"hold classifier.bias as \(3,\), .* has \(5,\) .*--ignore-m"):
        open_model(checkpoint, None, {"num_labels": 5}, meta=True)
    asked = {"num_labels": 5, "ignore_mismatched_sizes": True}
    assert open_model(checkpoint, None, asked, meta=True)[0].get_parameter("classifier.weight").shape[0] == 5


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    bert().save_pretrained(tmp_path / "shards", max_shard_size="20KB")  # type: ignore[operator]
    return tmp_path / "shards"


def test_an_index_that_looks_in_the_wrong_shard_is_refused(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    key, place = next(iter(said["weight_map"].items()))
    said["weight_map"][key] = next(other for other in said["weight_map"].values() if other != place)
    index.write_text(json.dumps(said))
    with pytest.raises(ArtifactError, match=rf"{key} is said to be in .*, which does not hold it"):
        open_model(shards, None, {})


def test_a_tensor_in_two_shards_is_refused(shards: Path) -> None:
    first, second = sorted(shards.glob("model-*.safetensors"))[:2]
    one, two = load_file(first), load_file(second)
    key = next(iter(one))
    save_file(two | {key: one[key] + 1.0}, second, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=rf"{first.name} and {second.name} both hold {key}"):
        open_model(shards, None, {})


@pytest.mark.parametrize("meta", [True, False])
def test_a_dtype_is_one_that_models_are_opened_in(checkpoint: Path, meta: bool) -> None:
    for asked in ("float99", "int8", torch.int8, 3):
        with pytest.raises(UsageError, match=rf"dtype = {re.escape(repr(asked))} is not one that a model is opened in"):
            open_model(checkpoint, None, {"dtype": asked}, meta=meta)
    for asked, held in (("auto", torch.float32), ("bfloat16", torch.bfloat16), (torch.float64, torch.float64)):
        model = open_model(checkpoint, None, {"dtype": asked}, meta=meta)[0]
        assert {value.dtype for value in model.parameters()} == {held}


def test_a_shard_that_may_not_be_read_says_what_to_do(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs this may read every file, so the system's refusal is played."""
    kept, closed = Path.open, next(shards.glob("model-00002-*"))

    def opening(file: Path, *given: Any, **named: Any) -> Any:
        if file == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return kept(file, *given, **named)

    monkeypatch.setattr(Path, "open", opening)
    with pytest.raises(ArtifactError) as caught:
        open_model(shards, None, {})
    to_do = "Permission denied; change its permissions, or choose another place"
    assert str(caught.value) == f"{closed}: cannot be used: {to_do}"


@pytest.mark.parametrize("labels", [0, -1, 10**11, True, 1.5])
def test_a_number_of_classes_that_no_head_has_is_refused_before_their_names_are_made(
    labels: Any, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=rf"num_labels = {labels}, .* \(size of the classification head\)"):
        open_model(checkpoint, "text-classification", {"num_labels": labels}, meta=True)
