"""A model that reads sound and writes text, as the two graphs that clients run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
import transformers as hf
from click.testing import CliRunner

import lorafx
from benchmarks.clients import transcribed
from lorafx.backends import encoder_decoder as back_end
from lorafx.backends.halves import halves
from lorafx.cli import main
from lorafx.errors import ParityError, UsageError
from lorafx.passes.magnitude import Magnitude
from lorafx.proof.encoder_decoder import DECODER, ENCODER
from lorafx.proof.open import open_runner
from tests.backends.test_encoder_decoder import HEADS, LAYERS, TOKENS, WIDTHS, keys_for_values, moved
from tests.small import POSITIONS, words
from tests.zoo import sound

#: What real checkpoints of Whisper say of generation: which language, and what is not said first.
SETTINGS: dict[str, Any] = {
    "is_multilingual": True,
    "lang_to_id": {"<|en|>": 5, "<|de|>": 6},
    "task_to_id": {"transcribe": 7, "translate": 8},
    "no_timestamps_token_id": 9,
    "max_length": POSITIONS,
    "num_beams": 3,
}


def whisper() -> Any:
    """A tiny Whisper of 16 states for 32 frames, which speaks several languages."""
    torch.manual_seed(0)
    tokens: dict[str, Any] = {**TOKENS, "bos_token_id": 2, "suppress_tokens": None, "begin_suppress_tokens": None}
    positions: dict[str, Any] = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": POSITIONS}
    config = hf.WhisperConfig(**LAYERS, **HEADS, **WIDTHS, **tokens, **positions)
    return moved(hf.WhisperForConditionalGeneration(config))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "checkpoint"
    model = whisper()
    model.generation_config.update(**SETTINGS)
    model.save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    folder = checkpoint.with_name("onnx")
    result = CliRunner().invoke(main, ["export", str(checkpoint), "-o", str(folder), "--generate"])
    assert result.exit_code == 0, result.output
    assert "AutoModelForSpeechSeq2Seq.from_pretrained" in " ".join(result.output.split())
    return folder


def pruned() -> lorafx.Program:
    """The same, other shares of both layers gone."""
    passes = [Magnitude(targets="all-linear", blocks=block, keep=keep) for block, keep in ((0, 0.5), (1, 0.75))]
    return lorafx.rewrite(lorafx.capture(whisper()), passes)


def likeliest(model: Any, features: torch.Tensor, new: int) -> list[int]:
    """What a model without a cache says of a sound, never that it ends."""
    said = [2]
    for _ in range(new):
        with torch.no_grad():
            logits = model(input_features=features, decoder_input_ids=torch.tensor([said])).logits[0, -1]
        logits[3] = -torch.inf
        said.append(int(logits.argmax()))
    return said


@pytest.mark.slow
def test_a_folder_holds_what_clients_read(exported: Path) -> None:
    sizes = {
        value.name: [str(size) for size in value.shape or ()]
        for name in (ENCODER, DECODER)
        for value in (*ir.load(exported / name).graph.inputs, *ir.load(exported / name).graph.outputs)
    }
    assert sizes["input_features"] == ["batch_size", "8", "32"]
    assert sizes["last_hidden_state"] == ["batch_size", "16", "32"]
    assert sizes["input_ids"] == ["batch_size", "decoder_sequence_length"]
    assert sizes["past_key_values.1.encoder.value"] == ["batch_size", "4", "past_encoder_sequence_length", "8"]
    assert not any("mask" in name for name in sizes if name)
    sections = json.loads((exported / "report.json").read_text(encoding="utf-8"))["sections"]
    # Four sounds, each answered until the positions end.
    assert any(note.startswith("124 greedy tokens after 4 prompts") for note in sections["parity"]["notes"])
    assert json.loads((exported / "generation_config.json").read_text(encoding="utf-8"))["num_beams"] == 3


@pytest.mark.slow
def test_tokens_are_those_of_transformers(exported: Path, checkpoint: Path) -> None:
    model: Any = hf.WhisperForConditionalGeneration.from_pretrained(checkpoint).eval()
    features, new = sound(3, 0)["input_features"], POSITIONS - 1
    speaker, said, _ = open_runner(exported).decoder.begin(features, torch.ones_like(features))
    past, given = speaker.empty(3), said
    for _ in range(new):
        logits, past = speaker.step(given, torch.ones_like(said), past)
        logits[..., 3] = -torch.inf
        given = logits[:, -1:].argmax(-1)
        said = torch.cat((said, given), 1)
    assert said.tolist() == [likeliest(model, one[None], new) for one in features]
    assert len({token for text in said.tolist() for token in text}) > 3


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the converter's own
def test_a_pruned_one_says_in_transformers_js_what_its_program_does(tmp_path: Path) -> None:
    program, features = pruned(), sound(1, 0)["input_features"]
    result = lorafx.export(program, tmp_path / "onnx", generate=True)
    assert result is not None
    assert result.ok
    own = likeliest(program.module().eval(), features, 20)
    assert transcribed(str(tmp_path / "onnx"), features, 20) == own


@pytest.mark.slow
def test_sound_goes_in_as_the_dtype_of_the_weights(tmp_path: Path) -> None:
    result = lorafx.export(lorafx.capture(whisper()), tmp_path / "half", generate=True, dtype=torch.float16)
    assert result is not None
    assert result.ok
    taken = {value.name: value.dtype for value in ir.load(tmp_path / "half" / ENCODER).graph.inputs}
    assert taken == {"input_features": ir.DataType.FLOAT16}


@pytest.mark.slow
def test_a_fault_is_found(exported: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    decoder = ir.load(exported / DECODER)
    keys_for_values(decoder.graph)
    made = back_end.EncoderDecoder(ir.load(exported / ENCODER), decoder)
    monkeypatch.setattr(back_end, "encoder_decoder", lambda *_: made)
    with pytest.raises(ParityError, match=r"differs from the program: logits.* for inputs sound \d and 31 generated"):
        lorafx.export(lorafx.capture(checkpoint), tmp_path / "onnx", generate=True)
    assert list(tmp_path.iterdir()) == []


def test_states_of_one_length_are_projected_as_far_as_they_are_not_cached() -> None:
    """The decoder half takes a cache of any of them: none, or all."""
    encoder, decoder = halves(lorafx.fold(lorafx.capture(whisper())))
    features = sound(2, 0)["input_features"]
    with torch.no_grad():
        states = encoder.module(input_features=features)["last_hidden_state"]
        given = {name: value[:, :, :0] for name, value in decoder.inputs.items() if name.startswith("past_")}
        ids = torch.tensor([[2], [2]])
        first = decoder.module(input_ids=ids, encoder_hidden_states=states, **given)
        pasts = {name: first[name.replace("past_key_values", "present")] for name in given}
        second = decoder.module(input_ids=ids, encoder_hidden_states=torch.full_like(states, torch.nan), **pasts)
    assert first["present_0_encoder_key"].shape == (2, 4, 16, 8)
    assert torch.equal(second["present_1_encoder_value"], first["present_1_encoder_value"])
    assert second["logits"].isfinite().all()


def test_what_reads_sound_is_asked_for_no_text(checkpoint: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["generate", str(checkpoint), "--prompt", "w3"])
    assert (result.exit_code, "asked with input_features, not with a text" in result.output) == (2, True)
    with pytest.raises(UsageError, match="does not learn from a table of texts"):
        lorafx.export(lorafx.capture(whisper()), tmp_path / "few", generate=True, quantize="int8", data={"text": ["w"]})
    assert not (tmp_path / "few").exists()
