"""An encoder-decoder as one folder: what clients find in it, what it generates, and that a fault never gets a name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, cast

import onnx
import onnx_ir as ir
import pytest
import torch
import transformers as hf
from click.testing import CliRunner

import lorafx
from lorafx.backends import encoder_decoder as back_end
from lorafx.backends.halves import _cache, halves
from lorafx.cli import main
from lorafx.errors import CaptureError, ParityError, UsageError
from lorafx.passes.lora import Lora
from lorafx.proof.encoder_decoder import DECODER, ENCODER, starts
from lorafx.proof.open import open_runner
from tests import zoo
from tests.small import POSITIONS, VOCABULARY, words

LAYERS: dict[str, Any] = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 32}
HEADS: dict[str, Any] = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
WIDTHS: dict[str, Any] = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 2}
#: So many of the first heads of each attention are closed: other ones in each.
CLOSED = {
    "encoder.layers.0.self_attn": 1,
    "encoder.layers.1.self_attn": 2,
    "decoder.layers.0.encoder_attn": 1,
    "decoder.layers.1.encoder_attn": 3,
    "decoder.layers.1.self_attn": 2,
}


def moved(model: Any) -> Any:
    """All parameters off what they began with, so that texts are not all one token."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.15 * torch.randn(value.shape, generator=generator))
    return model.eval()


def bart() -> Any:
    """A tiny BART with heads and neurons closed, other ones in each layer."""
    torch.manual_seed(0)
    tokens: dict[str, Any] = {**TOKENS, "bos_token_id": 2, "max_position_embeddings": POSITIONS}
    config = hf.BartConfig(**LAYERS, **HEADS, **WIDTHS, **tokens, forced_eos_token_id=None)
    model = moved(hf.BartForConditionalGeneration(config))
    with torch.no_grad():
        for name, heads in CLOSED.items():
            model.model.get_submodule(name).out_proj.weight[:, : 8 * heads] = 0.0
        model.model.decoder.layers[0].fc2.weight[:, 3:9] = 0.0
    return model


def t5() -> Any:
    """A tiny T5 whose second layer reads by fewer channels in each head, fewer yet of values; and some neurons gone."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = moved(hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **TOKENS)))
    with torch.no_grad():
        reading = model.decoder.block[1].layer[1].EncDecAttention
        reading.o.weight.unflatten(1, (4, 8))[:, :, 5:7] = 0.0
        for part in (reading.q, reading.k):
            part.weight.unflatten(0, (4, 8))[:, 2] = 0.0
        model.encoder.block[0].layer[1].DenseReluDense.wo.weight[:, 7:20] = 0.0
    return model


def tried(model: Any) -> lorafx.Program:
    """A LoRA of values that do something, not folded yet."""
    program = lorafx.rewrite(lorafx.capture(model), [Lora(rank=2, targets="*.SelfAttention.q")])
    return zoo.randomised(program, 0.05)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder-decoder") / "checkpoint"
    bart().save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    folder = checkpoint.with_name("onnx")
    result = CliRunner().invoke(main, ["export", str(checkpoint), "-o", str(folder), "--generate"])
    assert result.exit_code == 0, result.output
    return folder


def sizes_of(folder: Path, name: str) -> dict[str, list[str]]:
    graph = ir.load(folder / name).graph
    return {value.name or "": [str(size) for size in value.shape or ()] for value in (*graph.inputs, *graph.outputs)}


def greedy(folder: Path, texts: list[list[int]], new: int) -> list[list[int]]:
    """What a folder answers to texts of other lengths, padded on the right; never that it ends."""
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    speaker, said, _ = open_runner(folder).decoder.begin(ids, ids.ne(0).long())
    past, given = speaker.empty(len(texts)), said
    for _ in range(new):
        logits, past = speaker.step(given, torch.ones_like(said), past)
        logits[..., 3] = -torch.inf
        given = logits[:, -1:].argmax(-1)
        said = torch.cat((said, given), 1)
    return said.tolist()


@pytest.mark.slow
def test_a_folder_holds_what_clients_read(exported: Path) -> None:
    names = {file.relative_to(exported).as_posix() for file in exported.rglob("*") if file.is_file()}
    graphs = {ENCODER, f"{ENCODER}_data", DECODER, f"{DECODER}_data"}
    assert {"config.json", "generation_config.json", "tokenizer.json", "report.json", *graphs} <= names
    assert sizes_of(exported, ENCODER) == {
        "input_ids": ["batch_size", "encoder_sequence_length"],
        "attention_mask": ["batch_size", "encoder_sequence_length"],
        "last_hidden_state": ["batch_size", "encoder_sequence_length", "32"],
    }
    sizes = sizes_of(exported, DECODER)
    assert list(sizes)[:4] == [
        "input_ids",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "past_key_values.0.decoder.key",
    ]
    # transformers.js takes the heads of an empty cache from here, layer by layer.
    assert sizes["past_key_values.1.decoder.key"] == ["batch_size", "2", "past_decoder_sequence_length", "8"]
    assert sizes["past_key_values.0.encoder.value"] == ["batch_size", "3", "past_encoder_sequence_length", "8"]
    assert sizes["past_key_values.1.encoder.key"] == ["batch_size", "1", "past_encoder_sequence_length", "8"]
    assert sizes["present.1.encoder.key"] == ["batch_size", "1", "encoder_sequence_length", "8"]
    assert sizes["present.0.decoder.value"] == ["batch_size", "4", "total_sequence_length", "8"]
    assert sizes["logits"] == ["batch_size", "decoder_sequence_length", str(VOCABULARY)]
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert config["transformers.js_config"] == {"use_external_data_format": True}
    for name in (ENCODER, DECODER):
        onnx.shape_inference.infer_shapes(onnx.load(exported / name), check_type=True, strict_mode=True)


@pytest.mark.slow
def test_each_graph_has_its_own_weights_and_no_branch(exported: Path, checkpoint: Path) -> None:
    folded = lorafx.fold(lorafx.capture(checkpoint))
    numbers = {name: folded.tensor(name).numel() for name in folded.names("base")}
    for name, own, other in ((ENCODER, "encoder.", "decoder."), (DECODER, "decoder.", "encoder.")):
        wanted = sum(count for key, count in numbers.items() if f"model.{other}" not in key and key != "lm_head.weight")
        wanted -= numbers[f"model.{own}embed_tokens.weight"]  # one table by three names
        assert 0.9 * 4 * wanted < (exported / f"{name}_data").stat().st_size < 1.1 * 4 * wanted, name
        assert "If" not in {node.op_type for node in ir.load(exported / name).graph}


@pytest.mark.slow
def test_tokens_are_those_of_transformers(exported: Path, checkpoint: Path) -> None:
    model: Any = hf.BartForConditionalGeneration.from_pretrained(checkpoint).eval()
    texts = [[7], [9, 11, 20, 8, 30], [8, 2, 12, 4, 17, 33, 9, 9]]
    new = POSITIONS - 1
    found = greedy(exported, texts, new)
    for text, said in zip(texts, found, strict=True):
        ids = torch.tensor([text])
        options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "num_beams": 1}
        expected = model.generate(ids, **options)[0].tolist()
        assert said == expected
    assert len(set(found[1])) > 3  # not one token again and again


@pytest.mark.slow
def test_what_was_read_is_projected_once(exported: Path) -> None:
    speaker, start, mask = open_runner(exported).decoder.begin(torch.tensor([[9, 11, 20]]), torch.ones(1, 3).long())
    _, past = speaker.step(start, mask, speaker.empty(1))
    wanted, _ = speaker.step(start, torch.ones(1, 2), past)
    speaker.read["encoder_hidden_states"][:] = float("nan")
    found, after = speaker.step(start, torch.ones(1, 2), past)
    assert torch.equal(found, wanted)
    assert speaker.step(start, mask, speaker.empty(1))[0].isnan().all()  # the states are read where nothing is cached
    assert (after["past_key_values.0.encoder.key"] == past["past_key_values.0.encoder.key"]).all()


@pytest.mark.slow
def test_the_report_says_what_was_compared(exported: Path) -> None:
    record = json.loads((exported / "report.json").read_text(encoding="utf-8"))["sections"]
    assert record["decoder"]["heads"] == [4, 2]
    assert record["decoder"]["cross_heads"] == [3, 1]
    assert record["parity"]["ok"] is True
    # Five prompts, answered until the positions end.
    assert any("155 greedy tokens after 5 prompts" in note for note in record["parity"]["notes"])


@pytest.mark.slow
def test_a_trained_t5_without_some_channels_answers_as_it_did(tmp_path: Path) -> None:
    program = tried(t5())
    result = lorafx.export(program, tmp_path / "onnx", generate=True)
    assert result is not None
    assert result.ok
    assert any("256 greedy tokens after 4 prompts" in note for note in result.notes)
    sizes = sizes_of(tmp_path / "onnx", DECODER)
    assert (sizes["past_key_values.1.encoder.key"][3], sizes["past_key_values.1.encoder.value"][3]) == ("7", "6")
    assert lorafx.verify(program, tmp_path / "onnx").ok


# ---- faults


def keys_for_values(graph: ir.Graph) -> None:
    """Keys of what was read come out as values."""
    at = {value.name: value for value in graph.outputs}
    key, value = at["present.1.encoder.key"], at["present.1.encoder.value"]
    key.name, value.name = value.name, key.name


def unmasked(graph: ir.Graph) -> None:
    """The decoder sees what pads the texts it reads."""
    mask = next(value for value in graph.inputs if value.name == "encoder_attention_mask")
    ones = ir.node("Equal", [mask, mask])
    cast_back = ir.node("Cast", [ones.outputs[0]], {"to": ir.DataType.INT64})
    readers = [(use.node, use.idx) for use in mask.uses() if use.node is not ones]
    graph.insert_before(next(iter(graph)), [ones, cast_back])
    for node, index in readers:
        node.replace_input_with(index, cast_back.outputs[0])


def forgotten(graph: ir.Graph) -> None:
    """What was read is read anew in the place of what is cached: its first token is left out."""
    node = next(n for n in graph if n.op_type == "Concat" and n.outputs[0].name == "present.0.encoder.value")
    other = next(n for n in graph if n.op_type == "Concat" and n.outputs[0].name == "present.0.encoder.key")
    past = node.inputs[0]
    node.replace_input_with(0, other.inputs[0])
    assert past is not other.inputs[0]


FAULTS = (keys_for_values, unmasked, forgotten)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: Callable[[ir.Graph], None], exported: Path, checkpoint: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(exported, tmp_path / "broken"))
    model = ir.load(exported / DECODER)
    fault(model.graph)
    ir.save(model, broken / DECODER, external_data=f"{Path(DECODER).name}_data")
    (broken / "lorafx.json").unlink()  # as other tools write folders, that check nobody's hashes
    assert lorafx.verify(checkpoint, exported).ok
    result = CliRunner().invoke(main, ["verify", str(checkpoint), str(broken)])
    assert result.exit_code == 4, result.output


@pytest.mark.slow
def test_nothing_is_left_of_a_faulty_export(
    monkeypatch: pytest.MonkeyPatch, exported: Path, checkpoint: Path, tmp_path: Path
) -> None:
    decoder = ir.load(exported / DECODER)
    keys_for_values(decoder.graph)
    made = back_end.EncoderDecoder(ir.load(exported / ENCODER), decoder)
    monkeypatch.setattr(back_end, "encoder_decoder", lambda *_: made)
    with pytest.raises(ParityError, match="onnx export differs from the program: logits"):
        lorafx.export(lorafx.capture(checkpoint), tmp_path / "onnx", generate=True)
    assert list(tmp_path.iterdir()) == []


# ---- text


@pytest.mark.slow
def test_a_folder_and_its_checkpoint_write_the_same_text(exported: Path, checkpoint: Path) -> None:
    arguments = ["--prompt", "w3 w7 w1", "--json", "--max-new-tokens", "12"]
    results = [CliRunner().invoke(main, ["generate", str(folder), *arguments]) for folder in (exported, checkpoint)]
    assert [result.exit_code for result in results] == [0, 0], results[0].output + results[1].output
    first, second = (json.loads(result.stdout) for result in results)
    assert first["tokens"] == second["tokens"] != []
    assert first["text"] == second["text"]
    assert first["prompt_tokens"] == 5


def test_a_checkpoint_answers_as_transformers_does(checkpoint: Path) -> None:
    result = CliRunner().invoke(
        main, ["generate", str(checkpoint), "--prompt", "w3 w7", "--json", "--max-new-tokens", "9"]
    )
    assert result.exit_code == 0, result.output
    model: Any = hf.BartForConditionalGeneration.from_pretrained(checkpoint).eval()
    ids = cast(Any, words())("w3 w7", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=9, do_sample=False, num_beams=1)[0, 1:].tolist()
    assert json.loads(result.stdout)["tokens"] == [token for token in expected if token != 3]


def test_an_answer_begins_with_what_the_settings_say(tmp_path: Path) -> None:
    config = hf.T5Config(**TOKENS)
    assert starts(config, tmp_path) == (2,)
    settings = tmp_path / "generation_config.json"
    settings.write_text('{"decoder_start_token_id": 5, "forced_bos_token_id": 7}', encoding="utf-8")
    assert starts(config, tmp_path, None) == (5, 7)
    with pytest.raises(UsageError, match="which token an answer begins with"):
        starts(None, None)


# ---- refusals


def refused(words_: str, program: lorafx.Program, path: Path, **options: Any) -> None:
    with pytest.raises(UsageError, match=words_) as raised:
        lorafx.export(program, path, generate=True, **options)
    assert "\n" not in str(raised.value)
    assert not path.exists()


def test_a_cache_is_one_whatever_the_settings_of_generation_say() -> None:
    """Training leaves ``use_cache = false``; translators and summarisers search by beams, of which each is a row."""
    model: Any = zoo.build("t5")
    settings: dict[str, Any] = {"use_cache": False, "num_beams": 4, "cache_implementation": "static"}
    model.config.use_cache = False
    model.generation_config.update(**settings)
    _, cache = _cache(model, zoo.captured("t5").example)
    assert [len(layer.keys) for layer in cache.cross_attention_cache.layers] == [2] * model.config.num_decoder_layers
    assert {name: getattr(model.generation_config, name) for name in settings} == settings


def test_what_no_two_graphs_are_written_of_is_refused_in_one_line(tmp_path: Path) -> None:
    program, path = zoo.captured("t5"), tmp_path / "out"
    refused("two graphs, which have no slots yet; leave slots or generate out", program, path, adapters="slots")
    example = {**program.example, "decoder_attention_mask": torch.ones_like(program.example["decoder_input_ids"])}
    masked = lorafx.capture(zoo.build("t5"), inputs=example)
    refused("generates from input_ids, .*decoder_attention_mask: only from .* yet; leave generate", masked, path)


def looking(at: str) -> Callable[..., Any]:
    """A T5 whose logits look at the encoder's states, or at the text, or at how long it is, beside what attention
    gives."""
    plain = hf.T5ForConditionalGeneration.forward

    @wraps(plain)
    def forward(self: Any, **inputs: Any) -> Any:
        result: Any = plain(self, **inputs)
        text = inputs.get("input_ids")
        if at == "length":
            result.logits = result.logits * (1.0 if result.encoder_last_hidden_state.shape[1] < 50 else 2.0)
        elif at == "states":
            result.logits = result.logits + result.encoder_last_hidden_state.mean()
        elif text is not None:  # generation gives what the encoder gave
            result.logits = result.logits + text.sum()
        return result

    return forward


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ("states", "more of its decoder than keys and values reads the encoder"),
        ("text", "a half of it reads input_ids"),
        ("length", "dimension 1 of input 'input_ids' is .* and the graph holds for 2 to 49"),
    ],
)
def test_a_decoder_that_looks_at_more_is_refused(at: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.T5ForConditionalGeneration, "forward", looking(at))
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **TOKENS)).eval()
    with pytest.raises(CaptureError, match=said):
        halves(lorafx.fold(lorafx.capture(model)))
