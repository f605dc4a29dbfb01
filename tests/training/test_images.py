"""Images from folders and tables: what is read, what is refused before training begins and in which words."""

from __future__ import annotations

import copy
import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from PIL import Image

from lorafx.errors import ArtifactError, UsageError
from lorafx.frontend.capture import capture
from lorafx.public import Program
from lorafx.recipes.options import TrainOptions
from lorafx.training.data import prepare, warn_of_one_class
from lorafx.training.images import find_processor
from lorafx.training.rows import Prepared
from tests.captures import shared

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def vit_config(**changes: Any) -> hf.ViTConfig:
    return hf.ViTConfig(**{"image_size": 8, "patch_size": 4, "num_labels": 2, **SIZES, **changes})


@shared
def vit() -> Program:
    torch.manual_seed(0)
    return capture(hf.ViTForImageClassification(vit_config()))


def configured() -> Program:
    """The shared capture under a config of its own: class names are recorded there."""
    model = copy.copy(vit().source.model)
    model.config = vit_config()  # type: ignore[assignment]
    return dataclasses.replace(vit(), source=dataclasses.replace(vit().source, model=model))


def processor(size: int = 8) -> Any:
    """A processor that only scales: a colour of 255 is 1."""
    scale = {"do_normalize": False, "do_resize": True, "resample": Image.Resampling.NEAREST}
    return hf.ViTImageProcessorPil(size={"height": size, "width": size}, **scale)


def picture(colour: tuple[int, int, int], size: int = 16) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("red", RED), ("blue", BLUE)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            picture(colour, 9 + number).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def prepared(data: Any, program: Program | None = None, **options: Any) -> Prepared:
    like = options.pop("like", None)
    given = options.pop("processor", processor())
    return prepare(data, program or configured(), given, TrainOptions(**options), like=like)


def test_a_folder_has_a_folder_for_each_class(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    program = configured()
    (folder / "red" / ".DS_Store").write_bytes(b"")
    ready = prepared(folder, program)
    assert program.config.id2label == {0: "blue", 1: "red"}
    assert [row["labels"] for row in map(ready.rows.__getitem__, range(4))] == [0, 0, 1, 1]
    batch = ready.collator([ready.rows[0], ready.rows[3]])
    assert batch["labels"].tolist() == [0, 1]
    wanted = torch.zeros(2, 3, 8, 8)
    wanted[0, 2] = wanted[1, 0] = 1.0
    assert torch.equal(batch["pixel_values"], wanted)
    shutil.rmtree(folder / "blue")
    assert prepared(folder, program, like=ready).rows[0]["labels"] == 1
    warn_of_one_class(program, prepared(folder, program, like=ready))
    assert "all 2 rows are of one class (red)" in caplog.text


def test_a_table_names_images_from_its_own_folder(folder: Path) -> None:
    (folder / "t.csv").write_text("image,label\nred/0.png,red\nblue/1.png,blue\n", encoding="utf-8")
    ready = prepared(folder / "t.csv")
    assert ready.rows[0]["pixel_values"][:, 0, 0].tolist() == [1.0, 0.0, 0.0]
    (folder / "t.csv").write_text("picture,kind\nred/0.png,1\nblue/7.png,0\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"t\.csv, line 3: .*blue/7\.png: no such image"):
        prepared(folder / "t.csv", text="picture", label="kind")


def test_images_in_memory_are_rows_too(folder: Path) -> None:
    data = io.BytesIO()
    picture(BLUE).save(data, "png")
    sources: list[Any] = [picture(RED), {"bytes": data.getvalue(), "path": None}, str(folder / "red" / "0.png")]
    ready = prepared({"image": sources, "label": [1, 0, 1]})
    assert [ready.rows[row]["pixel_values"][:, 3, 3].tolist() for row in range(3)] == [[1, 0, 0], [0, 0, 1], [1, 0, 0]]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["blue", "red"])})
    table = datasets.Dataset.from_dict({"image": [picture(RED), picture(BLUE)], "label": [1, 0]}, features)
    program = configured()
    assert prepared(table, program).rows[0]["pixel_values"][0].max() == 1.0
    assert program.config.id2label == {0: "blue", 1: "red"}


def test_images_that_are_none_are_refused_before_training(folder: Path) -> None:
    (folder / "red" / "notes.txt").write_text("no image")
    with pytest.raises(ArtifactError, match=r"images, red/notes\.txt: .*notes\.txt cannot be read \(cannot identify"):
        prepared(folder)
    with pytest.raises(ArtifactError, match="data, row 2: 7 is neither an image nor the path of one"):
        prepared({"image": [picture(RED), 7], "label": [0, 1]})
    (folder / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"empty: no images; put those of each class into a folder in it"):
        prepared(folder / "empty")


def test_an_image_that_ends_early_is_named_when_it_is_read(folder: Path) -> None:
    file = folder / "red" / "1.png"
    noise = Image.effect_noise((64, 64), 99).convert("RGB")
    noise.save(file)
    file.write_bytes(file.read_bytes()[:2000])
    ready = prepared(folder)
    with pytest.raises(ArtifactError, match=r"images, red/1\.png: .*1\.png cannot be read \(.*truncated"):
        ready.rows[3]


def test_the_processor_makes_what_the_model_takes(folder: Path) -> None:
    with pytest.raises(
        UsageError, match="makes 3 x 6 x 6 pixels, but ViTForImageClassification was captured with 3 x 8"
    ):
        prepared(folder, processor=processor(6))
    with pytest.raises(UsageError, match="was captured without an image processor beside it; pass tokenizer=processor"):
        prepared(folder, processor=None)


def test_a_checkpoints_processor_is_pillows(tmp_path: Path) -> None:
    assert find_processor(tmp_path) is None
    processor().save_pretrained(tmp_path)
    found = find_processor(tmp_path)
    assert type(found).__name__ == "ViTImageProcessorPil"
    assert found.size["height"] == 8
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ArtifactError, match="its image processor cannot be opened"):
        find_processor(tmp_path)
