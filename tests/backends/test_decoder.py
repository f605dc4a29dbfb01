"""A decoder as one folder: what clients find in it, what it generates, and that a fault in it never gets a name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers as hf
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

import lorafx
from lorafx.backends import decoder as back_end
from lorafx.backends.cached import decode_inputs
from lorafx.cli import main
from lorafx.errors import CaptureError, LorafxError, ParityError, UsageError
from lorafx.passes.magnitude import Magnitude
from lorafx.proof.decoder import MODEL
from lorafx.proof.open import open_runner
from lorafx.public import Program
from tests.backends.as_it_is import accepted
from tests.small import POSITIONS, bert, captured, gpt2, llama, words

TEMPLATE = "{% for message in messages %}[CLS] {{ message['content'] }} [SEP]{% endfor %}"
#: Words of the first neurons and heads that are closed, other ones in each layer.
CLOSED = {0: (slice(0, 2), slice(3, 20)), 1: (slice(1, 2), slice(40, 41))}


def close(model: Any, size: int) -> Any:
    """Zero what reads some heads and neurons: both query heads of a group in the first layer, one head in the next."""
    for number, (heads, neurons) in CLOSED.items():
        layer = model.model.layers[number]
        with torch.no_grad():
            layer.self_attn.o_proj.weight[:, heads.start * size : heads.stop * size] = 0.0
            layer.mlp.down_proj.weight[:, neurons] = 0.0
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose layers have other heads and neurons closed, with a tokenizer that can chat."""
    folder = tmp_path_factory.mktemp("decoder") / "checkpoint"
    torch.manual_seed(0)
    close(llama(head_dim=16), 16).save_pretrained(folder)
    tokenizer = words()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    folder = checkpoint.with_name("onnx")
    result = lorafx.export(lorafx.capture(checkpoint), folder, generate=True)
    assert result is not None
    assert result.ok
    return folder


@pytest.mark.filterwarnings("default")  # the quantiser's own
def test_the_tools_of_onnx_take_it_as_it_is(exported: Path, tmp_path: Path) -> None:
    file = exported / MODEL
    size, off = accepted(file, tmp_path)
    assert size < sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))
    # One of 255 steps over what each weight and activation spans, through two layers.
    assert off < 0.1


def greedy(folder: Path, prompt: list[int], new: int) -> list[int]:
    decoder = open_runner(folder).decoder
    ids, past = torch.tensor([prompt]), decoder.empty(1)
    given = ids
    for _ in range(new):
        logits, past = decoder.step(given, torch.ones_like(ids), past)
        given = logits[:, -1:].argmax(-1)
        ids = torch.cat((ids, given), 1)
    return ids[0].tolist()


@pytest.mark.slow
def test_a_folder_holds_what_clients_read(exported: Path) -> None:
    names = {file.relative_to(exported).as_posix() for file in exported.rglob("*") if file.is_file()}
    clients = {"config.json", "generation_config.json", "genai_config.json", "tokenizer.json", "chat_template.jinja"}
    assert {*clients, "onnx/model.onnx", "onnx/model.onnx_data", "report.json", "lorafx.json"} <= names
    graph = ir.load(exported / MODEL).graph
    sizes = {value.name: [str(size) for size in value.shape or ()] for value in (*graph.inputs, *graph.outputs)}
    past = "batch_size", "past_sequence_length"
    # Of the two key-value heads of the first layer one stays.
    assert sizes["past_key_values.0.key"] == [past[0], "1", past[1], "16"]
    assert sizes["past_key_values.1.value"] == [past[0], "2", past[1], "16"]
    assert sizes["present.0.value"] == [past[0], "1", "total_sequence_length", "16"]
    assert list(sizes)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert sizes["logits"][:2] == [past[0], "sequence_length"]
    said = json.loads((exported / "genai_config.json").read_text(encoding="utf-8"))["model"]
    assert said["decoder"]["filename"] == MODEL
    assert (said["decoder"]["num_hidden_layers"], said["eos_token_id"], said["pad_token_id"]) == (2, 3, 0)
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert config["transformers.js_config"] == {"use_external_data_format": True}


@pytest.mark.slow
def test_weights_are_written_once_and_attention_is_fused(exported: Path, checkpoint: Path) -> None:
    folded = lorafx.fold(lorafx.capture(checkpoint))
    numbers = sum(value.numel() for value in {id(v): v for v in folded.root.parameters()}.values())
    assert (exported / "onnx" / "model.onnx_data").stat().st_size < 4 * numbers * 1.1
    onnx.shape_inference.infer_shapes(onnx.load(exported / MODEL), check_type=True, strict_mode=True)
    operators = [node.op_type for node in ir.load(exported / MODEL).graph]
    assert operators.count("GroupQueryAttention") == 2
    record = json.loads((exported / "report.json").read_text(encoding="utf-8"))["sections"]
    assert record["decoder"]["key_value_heads"] == [1, 2]
    assert record["parity"]["ok"] is True
    assert any("greedy tokens after 5 prompts" in note for note in record["parity"]["notes"])


@pytest.mark.slow
def test_tokens_are_those_of_transformers(exported: Path, checkpoint: Path) -> None:
    model: Any = hf.LlamaForCausalLM.from_pretrained(checkpoint).eval()
    for prompt in ([7], [9, 11, 20, 8, 30]):
        new = POSITIONS - len(prompt)
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=new, min_new_tokens=new, do_sample=False)
        # transformers forbids the end of the text until then, and so does nobody here.
        expected_logits = model(expected).logits[0, len(prompt) - 1 : -1]
        assert 3 not in expected_logits.argmax(-1)
        assert greedy(exported, prompt, new) == expected[0].tolist()


@pytest.mark.slow
def test_a_batch_with_padding_and_a_continuation_are_what_texts_alone_give(exported: Path, checkpoint: Path) -> None:
    decoder, model = open_runner(exported).decoder, hf.LlamaForCausalLM.from_pretrained(checkpoint).eval()
    rows = torch.tensor([[0, 0, 0, 7, 9], [8, 11, 30, 12, 4]])
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    first, past = decoder.step(rows[:, :4], mask[:, :4], decoder.empty(2))
    second, _ = decoder.step(rows[:, 4:], mask, past)
    with torch.no_grad():
        alone = model(rows[:1, 3:]).logits, model(rows[1:]).logits
    torch.testing.assert_close(torch.cat((first, second), 1)[:1, 3:], alone[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat((first, second), 1)[1:], alone[1], rtol=0, atol=1e-6)
    start, past = decoder.step(rows[1:, :2], mask[1:, :2], decoder.empty(1))
    rest, _ = decoder.step(rows[1:, 2:], mask[1:], past)
    torch.testing.assert_close(torch.cat((start, rest), 1), alone[1], rtol=0, atol=1e-6)


# ---- faults


def capped_positions(graph: ir.Graph) -> None:
    """Every token from the third on stands at the third's position."""
    value = next(value for value in graph.inputs if value.name == "position_ids")
    readers = [(use.node, use.idx) for use in value.uses()]
    two = ir.val("two", const_value=ir.tensor(np.array(2), name="two"))
    graph.register_initializer(two)
    least = ir.node("Min", [value, two])
    graph.insert_before(next(iter(graph)), [least])
    for node, index in readers:
        node.replace_input_with(index, least.outputs[0])


def one_weight(graph: ir.Graph) -> None:
    """One number of the last layer's weights is another."""
    name, value = next((n, v) for n, v in graph.initializers.items() if v.shape == (15 * 2, 32) or v.shape == (47, 32))
    assert value.const_value is not None, name
    data = value.const_value.numpy().copy()
    data[0, 0] += 1.0
    value.const_value = ir.tensor(data, name=value.name)


def keys_for_values(graph: ir.Graph) -> None:
    """The cache of the last layer comes out in another order."""
    at = {value.name: index for index, value in enumerate(graph.outputs)}
    key, value = graph.outputs[at["present.1.key"]], graph.outputs[at["present.1.value"]]
    key.name, value.name = value.name, key.name


FAULTS = (capped_positions, one_weight, keys_for_values)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: Callable[[ir.Graph], None], exported: Path, checkpoint: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(exported, tmp_path / "broken"))
    model = ir.load(exported / MODEL)
    fault(model.graph)
    ir.save(model, broken / MODEL, external_data="model.onnx_data")
    (broken / "lorafx.json").unlink()  # as other tools write folders, that check nobody's hashes
    assert lorafx.verify(checkpoint, exported).ok
    result = CliRunner().invoke(main, ["verify", str(checkpoint), str(broken)])
    assert result.exit_code == 4, result.output


@pytest.mark.slow
def test_nothing_is_left_of_a_faulty_export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write = back_end.write_decoder

    def faulty(made: back_end.Decoder, *rest: Any) -> None:
        keys_for_values(made.graph.graph)
        write(made, *rest)

    monkeypatch.setattr(back_end, "write_decoder", faulty)
    with pytest.raises(ParityError, match="onnx export differs from the program: logits"):
        lorafx.export(captured(llama), tmp_path / "onnx", generate=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_attention_that_left_the_graph_has_a_cache_still(tmp_path: Path) -> None:
    """Clients hold a cache of every layer, so one group of the first layer's heads stays, and nothing else of them."""
    torch.manual_seed(0)
    model = llama(head_dim=16)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()  # type: ignore[operator, union-attr]
    folded = lorafx.fold(lorafx.capture(model))
    assert not any(site.module.startswith("model.layers.0.self_attn") for site in folded.sites())
    result = lorafx.export(folded, tmp_path / "onnx", generate=True)
    assert result is not None
    assert result.ok
    graph = onnx.load(tmp_path / "onnx" / MODEL, load_external_data=False).graph
    heads = [value.type.tensor_type.shape.dim[1].dim_value for value in graph.input if value.name.endswith("key")]
    assert heads == [1, 2]


def ending(name: str) -> Any:
    """A model whose code cuts a table to how far a text has come, so that a tracer knows where texts end."""
    torch.manual_seed(0)
    ends: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "vocab_size": 45}
    if name == "xglm":
        sizes: dict[str, Any] = {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}
        return hf.XGLMForCausalLM(hf.XGLMConfig(**ends, **sizes, max_position_embeddings=POSITIONS)).eval()
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    config = hf.GPTNeoConfig(**ends, **sizes, window_size=8, max_position_embeddings=POSITIONS)
    return hf.GPTNeoForCausalLM(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "pruned"])
@pytest.mark.parametrize("name", ["gpt-neo", "xglm"])
@pytest.mark.filterwarnings("default")  # the converter's own
def test_a_table_of_positions_that_ends_is_no_obstacle(name: str, kind: str, tmp_path: Path) -> None:
    program = lorafx.capture(ending(name))
    if kind == "pruned":
        passes = [Magnitude(targets="all-linear", blocks=block, keep=keep) for block, keep in ((0, 0.5), (1, 0.75))]
        program = lorafx.rewrite(program, passes)
    result = lorafx.export(program, tmp_path / "onnx", generate=True)
    assert result is not None
    assert result.ok
    # After prompts of 1, 3, 8 and 16 tokens, to where the positions end.
    assert result.notes[0].startswith(f"{31 + 29 + 24 + 16} greedy tokens after 4 prompts, 0 of them not")


# ---- refusals


def test_a_decoder_of_short_texts_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracer that finds free sizes itself takes a branch on them, and says so in a range that nobody asked for."""
    plain = hf.LlamaForCausalLM.forward

    @wraps(plain)
    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        result: Any = plain(self, *args, **inputs)
        result.logits = result.logits * (1.0 if inputs["attention_mask"].shape[1] < 20 else 2.0)
        return result

    program = captured(llama)
    monkeypatch.setattr(hf.LlamaForCausalLM, "forward", forward)
    said = r"LlamaForCausalLM: after \d+ tokens: .*the graph holds .*; export it without generate"
    with pytest.raises(CaptureError, match=said) as raised:
        back_end.decoder(program, "cpu", None)
    assert "\n" not in str(raised.value)


def refused(error: type[LorafxError], words: str, program: Program, path: Path, **options: Any) -> None:
    with pytest.raises(error, match=words) as raised:
        lorafx.export(program, path, generate=True, **options)
    assert "\n" not in str(raised.value)
    assert not path.exists()


def test_what_cannot_be_a_decoder_is_refused_in_one_line(tmp_path: Path) -> None:
    path, program = tmp_path / "out", captured(gpt2)
    refused(UsageError, "written as onnx, not hf", program, path, format="hf")
    refused(UsageError, "no bfloat16 on the CPU", program, path, dtype=torch.bfloat16)
    refused(UsageError, "bfloat16 cannot be proven", program, path, dtype=torch.bfloat16, provider="cuda")
    refused(UsageError, "BertForSequenceClassification generates no text", captured(bert), path)


def test_a_model_has_its_cache_whatever_its_settings_of_generation_say() -> None:
    """Training with checkpointed activations turns it off in both configs, and there it stays; beams are rows."""
    model: Any = llama(use_cache=False).eval()
    model.generation_config.update(num_beams=3)
    assert model.generation_config.use_cache is False
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    inputs, _ = decode_inputs(model, {"input_ids": ids, "attention_mask": ids.ne(0).long()})
    caches: list[Any] = [value for value in inputs.values() if isinstance(value, hf.DynamicCache)]
    assert [len(cache.layers) for cache in caches] == [model.config.num_hidden_layers]
    assert {len(layer.keys) for cache in caches for layer in cache.layers} == {2}
    assert (model.generation_config.use_cache, model.generation_config.num_beams) == (False, 3)


def test_a_state_that_is_no_cache_of_keys_and_values_is_refused() -> None:
    sizes: dict[str, Any] = {"vocab_size": 45, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    model: nn.Module = hf.MambaForCausalLM(hf.MambaConfig(**sizes, pad_token_id=0, eos_token_id=3)).eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    with pytest.raises(CaptureError, match=r"MambaForCausalLM: between tokens .*no plain cache of keys and values"):
        decode_inputs(model, {"input_ids": ids, "attention_mask": ids.ne(0).long()})


def test_generation_that_fails_by_itself_is_refused_with_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("no such cache.\nIt has none.")

    model = llama().eval()
    monkeypatch.setattr(type(model), "generate", broken)
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    with pytest.raises(CaptureError, match="its generation in transformers fails: no such cache; export it"):
        decode_inputs(model, {"input_ids": ids, "attention_mask": ids.ne(0).long()})


# ---- text


def call(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["generate", *map(str, arguments)])


@pytest.mark.slow
def test_a_folder_and_its_checkpoint_write_the_same_text(exported: Path, checkpoint: Path) -> None:
    results = [call(folder, "--prompt", "w3 w7 w1", "--json") for folder in (exported, checkpoint)]
    assert [result.exit_code for result in results] == [0, 0], results[0].output + results[1].output
    first, second = (json.loads(result.stdout) for result in results)
    assert first["tokens"] == second["tokens"]
    assert first["text"] == second["text"] != ""
    assert first["prompt_tokens"] == 5
    streamed = call(exported, "--prompt", "w3 w7 w1")
    assert streamed.stdout == first["text"] + "\n"
    assert "tokens/s" in streamed.stderr or "1 tokens" in streamed.stderr


def test_text_goes_on_to_the_end_of_the_positions(checkpoint: Path) -> None:
    result = json.loads(call(checkpoint, "--prompt", "w3 w7 w1", "--json", "--max-new-tokens", 500).stdout)
    assert result["prompt_tokens"] + result["new_tokens"] == POSITIONS or 3 not in result["tokens"]
    few = json.loads(call(checkpoint, "--prompt", "w3 w7 w1", "--json", "--max-new-tokens", 2).stdout)
    assert few["tokens"] == result["tokens"][:2]


def test_what_is_said_in_a_chat_goes_through_the_template(checkpoint: Path) -> None:
    said = json.loads(call(checkpoint, "--chat", "w3 w7", "--json", "--max-new-tokens", 1).stdout)
    assert said["prompt_tokens"] == 4  # the template's [CLS] and [SEP], none of the tokenizer's, and two words


def test_bad_prompts_are_refused_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    long = call(checkpoint, "--prompt", " ".join(["w1"] * POSITIONS))
    assert (long.exit_code, f"takes {POSITIONS} tokens" in long.output) == (2, True)
    none = call(checkpoint)
    assert (none.exit_code, "give a text" in none.output) == (2, True)
    assert call(checkpoint, "--prompt", "w1", "--chat", "w1").exit_code == 2
    bare = Path(shutil.copytree(checkpoint, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    mute = call(bare, "--chat", "w1")
    assert (mute.exit_code, "no chat template" in mute.output) == (2, True)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    lost = call(bare, "--prompt", "w1")
    assert (lost.exit_code, "no tokenizer" in lost.output) == (2, True)


def test_no_token_is_said_where_logits_are_not_numbers(checkpoint: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    next(value for name, value in tensors.items() if "norm" in name).view(-1)[0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    result = call(broken, "--prompt", "w3 w7 w1")
    assert (result.exit_code, "its logits are NaN" in result.output) == (5, True)
