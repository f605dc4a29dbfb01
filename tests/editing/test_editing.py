"""Knowledge editing: what is said afterwards, how little changes, and that the patch alone carries it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from lorafx.commands.edit import edit as edit_command
from lorafx.editing.continuations import Encoder, says, top_tokens
from lorafx.editing.edit import EditResult, edit
from lorafx.editing.patch import PATCH, Patch
from lorafx.editing.patch_folder import apply, revert, slots
from lorafx.editing.requests import EditOptions, EditRequest, read_edits
from lorafx.errors import ArtifactError, LorafxError, UsageError
from lorafx.files.folder import file_hash, read_manifest
from lorafx.frontend.capture import capture
from tests import small

REQUESTS = (
    EditRequest("w1 w2 w3", "w20", ("w4 w2 w3",), ("w30 w31",)),
    EditRequest("w5 w6", "w7 w8"),
)
PROMPTS = ("w10", "w11 w12", "w13 w14 w15")
#: A random model of two layers needs larger steps than a real one; the schedule is shortened with them.
OPTIONS: dict[str, Any] = {"learning_rate": 2e-2, "density": 0.25, "start": 2, "end": 6, "steps": 60, "margin": 0.02}
OPTIONS |= {"rank": 2}


def checkpoint(folder: Path, build: Any = small.llama, **saving: Any) -> Path:
    torch.manual_seed(0)
    build().save_pretrained(folder, **saving)
    small.words().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def separate(llama: Path) -> EditResult:
    return edit(llama, REQUESTS, prompts=PROMPTS, sequential=False, **OPTIONS)


def ask(folder: Path, request: EditRequest) -> bool:
    """Whether plain transformers, on the folder alone, continues the prompt with the target."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt, target = Encoder(folder).pair(request.prompt, request.target)
    said = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=len(target),
        min_new_tokens=len(target),
        do_sample=False,
    )
    return said[0, len(prompt) :].tolist() == target


def test_each_edit_is_learned_and_its_patch_carries_it(llama: Path, separate: EditResult, tmp_path: Path) -> None:
    before = file_hash(llama / "model.safetensors")
    assert [outcome.success for outcome in separate.outcomes] == [True, True]
    assert not any(outcome.before for outcome in separate.outcomes)
    assert len(separate.patches) == 2
    for number, (request, patch) in enumerate(zip(REQUESTS, separate.patches, strict=True)):
        edited, back = tmp_path / f"edited-{number}", tmp_path / f"back-{number}"
        apply(llama, patch, edited)
        assert not ask(llama, request)
        assert ask(edited, request)
        revert(edited, patch, back)
        assert file_hash(back / "model.safetensors") == before
    assert file_hash(llama / "model.safetensors") == before


def test_only_adapted_weights_change_and_few_of_them(llama: Path, separate: EditResult) -> None:
    options = separate.options
    matrices = {name for name in slots(llama) if ".mlp." in name}
    assert separate.adapted == len(matrices) * 32 * 48
    for outcome, patch in zip(separate.outcomes, separate.patches, strict=True):
        assert {change.name for change in patch.changes} <= matrices
        # Each rank joins ⌈density · in⌉ columns with ⌈density · out⌉ rows of a matrix.
        assert all(len(change.indices) <= options.rank * 12 * 8 for change in patch.changes)
        assert outcome.changed == patch.changed == sum(len(change.indices) for change in patch.changes)
        assert outcome.share == patch.changed / separate.adapted


def test_what_is_measured_is_what_the_patched_model_says(llama: Path, separate: EditResult) -> None:
    base = capture(llama)
    encoder = Encoder(llama)
    prompts = [encoder.prompt(text) for text in PROMPTS]
    old = top_tokens(base.module().eval(), prompts)
    for outcome, patch, request in zip(separate.outcomes, separate.patches, REQUESTS, strict=True):
        model = patch.apply_to(base).module().eval()
        kept = [a == b for a, b in zip(old, top_tokens(model, prompts), strict=True)]
        assert outcome.locality == sum(kept) / len(kept)
        paraphrases = says(model, [encoder.pair(text, request.target) for text in request.paraphrases])
        assert list(outcome.paraphrases) == paraphrases
        assert (outcome.near is None) == (not request.locality)


def test_edits_in_sequence_make_one_patch_of_all(llama: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    result = edit(llama, REQUESTS, prompts=PROMPTS, say=lines.append, **OPTIONS)
    (patch,) = result.patches
    assert result.outcomes[1].success
    assert len(lines) == 2
    apply(llama, patch, tmp_path / "edited")
    assert [ask(tmp_path / "edited", request) for request in REQUESTS] == [o.success for o in result.outcomes]
    revert(tmp_path / "edited", patch, tmp_path / "back")
    assert file_hash(tmp_path / "back" / "model.safetensors") == file_hash(llama / "model.safetensors")


def test_edits_repeat_bit_by_bit(llama: Path, separate: EditResult) -> None:
    torch.manual_seed(123)
    again = edit(llama, REQUESTS[:1], sequential=False, **OPTIONS)
    assert [c.after for c in again.patches[0].changes] == [c.after for c in separate.patches[0].changes]
    other = edit(llama, REQUESTS[:1], sequential=False, **{**OPTIONS, "seed": 1})
    assert [c.after for c in other.patches[0].changes] != [c.after for c in separate.patches[0].changes]


def test_training_ends_when_the_target_leads_and_the_update_is_sparse(llama: Path) -> None:
    soon = edit(llama, REQUESTS[:1], **OPTIONS).outcomes[0]
    late = edit(llama, REQUESTS[:1], **{**OPTIONS, "margin": 1e9}).outcomes[0]
    assert OPTIONS["end"] <= soon.steps < late.steps == OPTIONS["steps"]


def test_weights_hold_the_model_back_near_the_edit(llama: Path) -> None:
    from torch.nn.functional import kl_div

    base = capture(llama)
    encoder = Encoder(llama)
    row = torch.tensor([encoder.prompt(REQUESTS[0].locality[0])])

    def distance(**weights: float) -> float:
        result = edit(llama, REQUESTS[:1], **{**OPTIONS, "margin": 1e9, "prefix_weight": 0.0, **weights})
        with torch.no_grad():
            models = [program.module().eval() for program in (base, result.patches[0].apply_to(base))]
            old, new = (model(input_ids=row).logits.log_softmax(-1) for model in models)
        return float(kl_div(new, old, reduction="sum", log_target=True))

    assert distance(locality_weight=3.0) < 0.5 * distance()


def test_gpt2_and_a_sharded_checkpoint_with_dropout(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", lambda: small.gpt2(resid_pdrop=0.3, attn_pdrop=0.3), max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    result = edit(base, REQUESTS[:1], **{**OPTIONS, "targets": ("attn.c_attn", "mlp.c_proj")})
    assert result.outcomes[0].success
    apply(base, result.patches[0], tmp_path / "edited")
    assert ask(tmp_path / "edited", REQUESTS[0])


def test_a_checkpoint_of_the_bare_model_is_edited_under_its_own_names(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", small.gpt2)
    tensors = {
        name.removeprefix("transformer."): value for name, value in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    result = edit(base, REQUESTS[:1], **OPTIONS)
    assert result.outcomes[0].success
    assert all(change.name.startswith("h.") for change in result.patches[0].changes)
    apply(base, result.patches[0], tmp_path / "edited")
    assert ask(tmp_path / "edited", REQUESTS[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_checkpoints_are_edited_in_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", lambda: small.llama().to(dtype))
    result = edit(base, REQUESTS[:1], **OPTIONS)
    assert result.outcomes[0].success
    assert {change.values.dtype for change in result.patches[0].changes} == {dtype}
    apply(base, result.patches[0], tmp_path / "edited")
    revert(tmp_path / "edited", result.patches[0], tmp_path / "back")
    assert file_hash(tmp_path / "back" / "model.safetensors") == file_hash(base / "model.safetensors")


def test_a_zero_with_a_sign_is_no_change(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][:, ::2] = -0.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (patch,) = edit(base, REQUESTS[:1], **OPTIONS).patches
    change = next(change for change in patch.changes if change.name == name)
    assert len(change.indices) <= OPTIONS["rank"] * 12 * 8
    assert not bool((change.values == change.old).any())


# ---- refusals


def test_what_cannot_be_edited_is_refused(llama: Path, tmp_path: Path) -> None:
    def refusal(*arguments: Any, **options: Any) -> str:
        with pytest.raises((UsageError, ArtifactError)) as caught:
            edit(*arguments, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no edits" in refusal(llama, ())
    assert "did you mean 'density'" in refusal(llama, REQUESTS, denstiy=0.1)
    assert "end before the update is sparse" in refusal(llama, REQUESTS, steps=10)
    assert "role:ffn.donw" in refusal(llama, REQUESTS, targets=("role:ffn.donw",))
    assert "tokens; the model reads 32" in refusal(llama, [EditRequest("w1 " * 40, "w2")])
    assert "is not a causal language model" in refusal(_classifier(tmp_path / "bert"), REQUESTS)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((llama / name).read_bytes())
    assert "tokenizer" in refusal(bare, REQUESTS)


def _classifier(folder: Path) -> Path:
    model: Any = small.bert()
    model.save_pretrained(folder)
    small.words().save_pretrained(folder)
    return folder


def test_a_checkpoint_stored_in_another_dtype_than_it_opens_in_is_refused(llama: Path, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    half = {name: value.half() for name, value in load_file(base / "model.safetensors").items()}
    save_file(half, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), encoding="utf-8")
    with pytest.raises(UsageError, match="stored in another form"):
        edit(base, REQUESTS)


# ---- texts


def test_a_target_follows_its_prompt_after_one_space(llama: Path) -> None:
    encoder = Encoder(llama)
    pairs = [encoder.pair("w1 w2", "w3"), encoder.pair("w1 w2 ", "w3"), encoder.pair("w1 w2", " w3")]
    assert pairs[0] == pairs[1] == pairs[2] == ([2, 6, 7], [8])  # the tokenizer's [CLS] leads, its [SEP] is left out
    assert encoder.prompt("w1 w2") == [2, 6, 7]


# ---- the file of edits


def test_edits_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": "a b", "target": "c", "paraphrases": ["d"]}, {"prompt": "e", "target": "f"}]
    file = tmp_path / "edits.jsonl"
    file.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_edits(file) == (EditRequest("a b", "c", ("d",)), EditRequest("e", "f"))


BAD_ROWS = [
    ('{"prompt": "a"}', "no value for 'target'"),
    ('{"prompt": "a", "target": " "}', "'target' is empty"),
    ('{"prompt": "a", "target": 5}', "'target' is 5, not a text"),
    ('{"prompt": "a", "target": "b", "paraphrase": ["c"]}', "did you mean 'paraphrases'"),
    ('{"prompt": "a", "target": "b", "locality": "c"}', "'locality' is 'c', not a list of texts"),
    ('{"prompt": "a", "target": "b", "locality": [1]}', "not a list of texts"),
    ('{"prompt": "a", ', "not valid JSON"),
    ("[1]", "expected an object"),
]


@pytest.mark.parametrize(("row", "words"), BAD_ROWS)
def test_a_bad_row_is_named_by_its_line(row: str, words: str, llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "edits.jsonl"
    file.write_text('{"prompt": "a", "target": "b"}\n\n' + row + "\n", encoding="utf-8")
    error = call(llama, "--edits", file, "-o", tmp_path / "out").exception
    assert isinstance(error, LorafxError)
    assert error.exit_code == 5
    assert f"{file}, line 3: " in str(error)
    assert words in str(error)
    assert "\n" not in str(error)
    assert not (tmp_path / "out").exists()


# ---- the command line


def call(*arguments: object) -> Result:
    return CliRunner().invoke(edit_command, [str(argument) for argument in arguments])


def written(folder: Path) -> Path:
    rows = [{"prompt": r.prompt, "target": r.target, "paraphrases": list(r.paraphrases)} for r in REQUESTS]
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")
    return folder / "edits.jsonl"


def flags() -> list[str]:
    return [part for name, value in OPTIONS.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def test_the_command_writes_a_patch_a_report_and_a_manifest(llama: Path, separate: EditResult, tmp_path: Path) -> None:
    edits, out = written(tmp_path), tmp_path / "out"
    arguments = [llama, "--edits", edits, "-o", out, "--prompts", tmp_path / "prompts.txt", "--json", *flags()]
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["summary"]["edits"] == 2
    assert shown["summary"]["locality"] is not None
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == shown
    manifest = read_manifest(out, hashes=True)
    assert manifest.kind == "edit"
    assert sorted(manifest.files) == [PATCH, "report.json"]
    assert Patch.load(out).changed == shown["summary"]["changed"]
    assert "exists already" in str(call(*arguments).exception)
    again = call(*arguments, "--overwrite", "--separate")
    assert again.exit_code == 0, again.output
    assert sorted(read_manifest(out).files) == ["patch-000.safetensors", "patch-001.safetensors", "report.json"]
    loaded = Patch.load(out / "patch-000.safetensors")
    assert [c.after for c in loaded.changes] == [c.after for c in separate.patches[0].changes]
    assert loaded.about["prompt"] == REQUESTS[0].prompt


def test_the_command_speaks_to_people_too(llama: Path, tmp_path: Path) -> None:
    result = call(llama, "--edits", written(tmp_path), "-o", tmp_path / "out", *flags())
    assert result.exit_code == 0, result.output
    assert "w1 w2 w3 → w20" in result.stdout
    assert "edit 2 of 2" in result.stderr


def test_options_of_the_command_are_those_of_editing(llama: Path, tmp_path: Path) -> None:
    shown = call("--help").stdout
    assert all(f"--{name.replace('_', '-')} " in shown for name in EditOptions.__dataclass_fields__)
    error = call(llama, "--edits", written(tmp_path), "-o", tmp_path / "out", "--rank", "many").exception
    assert isinstance(error, UsageError)
    assert "an integer" in str(error)


# ---- the real model


@pytest.mark.slow
def test_smollm2_learns_edits_within_the_limits(smollm2: Path, tmp_path: Path) -> None:
    from examples import assets

    here = Path(assets.__file__).parent
    requests = read_edits(here / "edits.jsonl")[:2]
    prompts = (here / "unrelated_prompts.txt").read_text(encoding="utf-8").splitlines()
    result = edit(smollm2, requests, prompts=prompts, sequential=False)
    for outcome in result.outcomes:
        assert outcome.success
        assert not outcome.before
        assert outcome.locality is not None
        assert outcome.locality >= 0.95
        assert outcome.share <= 0.01
    before = file_hash(smollm2 / "model.safetensors")
    apply(smollm2, result.patches[0], tmp_path / "edited")
    assert file_hash(tmp_path / "edited" / "model.safetensors") != before
    revert(tmp_path / "edited", result.patches[0], tmp_path / "back")
    assert file_hash(tmp_path / "back" / "model.safetensors") == before
