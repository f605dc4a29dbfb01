"""Sparse patches: bit-exact on any tensors, on folders as they come, and refused wherever they do not belong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafx
from lorafx.cli import main
from lorafx.commands.edit import patch as patch_group
from lorafx.editing import patch_folder
from lorafx.editing.patch import PATCH, Patch, make, tensor_hash
from lorafx.editing.patch_folder import apply, between, revert, slots
from lorafx.errors import ArtifactError, LorafxError, UsageError
from lorafx.files.folder import file_hash
from lorafx.graph.tree import named_tensors
from tests import small

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.float64, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def equal_bits(a: Tensor, b: Tensor) -> bool:
    integer = INTEGERS[a.element_size()]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(integer), b.reshape(-1).view(integer))
    )


def random_bits(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bit pattern the dtype has: NaNs with payloads, infinities, signed zeros and subnormals among them."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8).bool()
    size = torch.empty((), dtype=dtype).element_size()
    data = torch.randint(0, 256, (*shape, size), generator=generator, dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    shapes=st.lists(st.lists(st.integers(0, 6), max_size=3).map(tuple), min_size=1, max_size=3),
    share=st.floats(0.0, 1.0),
)
def test_a_patch_goes_on_and_comes_off_bit_by_bit(
    seed: int, dtype: torch.dtype, shapes: list[tuple[int, ...]], share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = {f"t{number}": random_bits(generator, shape, dtype) for number, shape in enumerate(shapes)}
    chosen = {name: torch.rand(value.shape, generator=generator) < share for name, value in base.items()}
    edited = {
        name: torch.where(chosen[name], random_bits(generator, tuple(value.shape), dtype), value)
        if dtype != torch.float8_e4m3fn
        else _where_bytes(chosen[name], random_bits(generator, tuple(value.shape), dtype), value)
        for name, value in base.items()
    }
    patch = make(base, edited)
    for change in patch.changes:
        change.check(base[change.name], "base")
        applied = change.exchanged(base[change.name])
        assert equal_bits(applied, edited[change.name])
        change.check(applied, "edited", undo=True)
        assert equal_bits(change.exchanged(applied, undo=True), base[change.name])
    untouched = base.keys() - {change.name for change in patch.changes}
    assert all(equal_bits(base[name], edited[name]) for name in untouched)
    assert patch.changed <= sum(int(mask.sum()) for mask in chosen.values())


def _where_bytes(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask, a.view(torch.uint8), b.view(torch.uint8)).view(a.dtype)


# ---- the file


def edited_pair(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(40, 30, generator=generator).to(dtype) for name in ("a.weight", "b.weight")}
    edited = {name: value.clone() for name, value in base.items()}
    edited["a.weight"][3, 4:9] += 1
    edited["b.weight"].view(-1)[-1] = 7
    return base, edited


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_saved_is_what_is_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    base, edited = edited_pair(dtype)
    patch = make(base, edited).noting(prompt="Où?", target="là")
    patch.save(tmp_path / "edit" / PATCH)
    for path in (tmp_path / "edit", tmp_path / "edit" / PATCH):
        loaded = Patch.load(path)
        assert loaded.to_json() == patch.to_json()
        assert all(equal_bits(x.values, y.values) for x, y in zip(loaded.changes, patch.changes, strict=True))
    patch.save(tmp_path / "again.safetensors")
    assert file_hash(tmp_path / "again.safetensors") == file_hash(tmp_path / "edit" / PATCH)


def test_the_file_holds_indices_new_and_old_values_and_the_hash_of_the_old(tmp_path: Path) -> None:
    base, edited = edited_pair()
    make(base, edited).save(tmp_path / PATCH)
    tensors = load_file(tmp_path / PATCH)
    for name in base:
        restored = base[name].clone()
        restored.view(-1)[tensors[f"{name}.indices"].long()] = tensors[f"{name}.values"]
        assert torch.equal(restored, edited[name])
        assert tensors[f"{name}.indices"].dtype == torch.int32
    with safe_open(tmp_path / PATCH, framework="pt") as stored:
        entries = json.loads(stored.metadata()["lorafx_patch"])["tensors"]
    assert [entry["old"] for entry in entries] == [tensor_hash(tensors[f"{name}.old"]) for name in base]
    assert entries[0]["before"] == tensor_hash(base["a.weight"])


def test_its_size_is_proportional_to_the_changed_weights(tmp_path: Path) -> None:
    sizes = []
    for count in (1000, 2000, 3000):
        base = {"w": torch.zeros(1000, 1000)}
        edited = {"w": torch.zeros(1000, 1000)}
        edited["w"].view(-1)[:count] = 1
        make(base, edited).save(tmp_path / f"{count}.safetensors")
        sizes.append((tmp_path / f"{count}.safetensors").stat().st_size)
    # 4 bytes of index, 4 of the new and 4 of the old weight; the header is padded to a multiple of 8.
    assert abs(sizes[1] - sizes[0] - 12_000) <= 8
    assert abs(sizes[2] - sizes[1] - 12_000) <= 8


def test_tied_weights_are_stored_once() -> None:
    weight, new = torch.zeros(4, 4), torch.ones(4, 4)
    patch = make({"embed": weight, "head": weight}, {"embed": new, "head": new})
    assert [change.names for change in patch.changes] == [("embed", "head")]
    assert patch.changed == 16


@pytest.mark.parametrize(
    ("edited", "words"),
    [
        ({"b": torch.zeros(2)}, "one of the two only"),
        ({"a": torch.zeros(3)}, "float32 (2,) in one, float32 (3,) in the other"),
        ({"a": torch.zeros(2, dtype=torch.float16)}, "float16 (2,) in the other"),
        ({"a": torch.zeros(2, device="meta")}, "meta device"),
    ],
)
def test_tensors_that_no_patch_joins_are_named(edited: dict[str, Tensor], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        make({"a": torch.zeros(2)}, edited)
    assert words in str(caught.value)


def test_an_existing_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    patch = make(*edited_pair())
    (tmp_path / PATCH).write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="exists already"):
        patch.save(tmp_path / PATCH)
    patch.save(tmp_path / PATCH, overwrite=True)
    assert Patch.load(tmp_path).changed == patch.changed
    assert [file.name for file in tmp_path.iterdir()] == [PATCH]


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def _rewrite(file: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    with safe_open(file, framework="pt") as stored:
        record = json.loads(stored.metadata()["lorafx_patch"])
    tensors = load_file(file)
    change(tensors, record)
    save_file(tensors, file, metadata={"lorafx_patch": json.dumps(record)})


def _flip_old(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    tensors["a.weight.old"][0] += 1


def _shuffle(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    tensors["a.weight.indices"] = tensors["a.weight.indices"].flip(0).contiguous()


def _outside(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    tensors["b.weight.indices"][-1] = 1200


def _lose(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    del tensors["b.weight.values"]


def _extra(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    tensors["c"] = torch.zeros(1)


def _newer(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    record["format"] = 99


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_flip_old, "corrupted patch"),
        (_shuffle, "corrupted patch"),
        (_outside, "corrupted patch"),
        (_lose, "corrupted patch"),
        (_extra, "does not speak of"),
        (_newer, "upgrade lorafx"),
    ],
)
def test_a_damaged_patch_is_refused(damage: Any, words: str, tmp_path: Path) -> None:
    make(*edited_pair()).save(tmp_path / PATCH)
    _rewrite(tmp_path / PATCH, damage)
    with pytest.raises(ArtifactError, match=words):
        Patch.load(tmp_path)


def test_what_is_no_patch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such patch"):
        Patch.load(tmp_path)
    save_file({"w": torch.zeros(2)}, tmp_path / PATCH)
    with pytest.raises(ArtifactError, match="but no patch"):
        Patch.load(tmp_path)
    make(*edited_pair()).save(tmp_path / PATCH, overwrite=True)
    _truncate(tmp_path / PATCH)
    with pytest.raises(ArtifactError, match="truncated"):
        Patch.load(tmp_path)


def test_wrong_new_values_are_seen_before_anything_is_written(tmp_path: Path) -> None:
    base, edited = edited_pair()
    make(base, edited).save(tmp_path / PATCH)

    def flip_new(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        tensors["a.weight.values"][0] += 1

    _rewrite(tmp_path / PATCH, flip_new)
    change = Patch.load(tmp_path).changes[0]
    with pytest.raises(ArtifactError, match=r"a\.weight does not become what it should"):
        change.exchanged(base["a.weight"])


# ---- folders


def checkpoint(folder: Path, build: Any = small.llama, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
    torch.manual_seed(0)
    build().to(dtype).save_pretrained(folder, **saving)
    small.words().save_pretrained(folder)
    (folder / "README.md").write_text("A model.\n", encoding="utf-8")
    return folder


def edited_weights(folder: Path, names: int = 3) -> Patch:
    """A patch of a few weights in some tensors of a folder, the tied embedding among them."""
    held = slots(folder)
    chosen = [name for name in held if "embed" in name or "wte" in name][:1]
    chosen += [name for name in held if name not in chosen and len(held[name].shape) == 2][:names]
    base = {name: held[name].read() for name in chosen}
    edited = {name: value.clone() for name, value in base.items()}
    for value in edited.values():
        value.view(-1)[:: value.numel() // 5] += 0.5
    return make(base, edited)


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: file_hash(file) for file in sorted(folder.iterdir()) if file.name != "lorafx.json"}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("build", [small.llama, small.gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_a_reverted_folder_has_the_very_files_of_the_base(
    build: Any, dtype: torch.dtype, sharded: bool, tmp_path: Path
) -> None:
    base = checkpoint(tmp_path / "base", build, dtype, **({"max_shard_size": "20KB"} if sharded else {}))
    assert len(list(base.glob("*.safetensors"))) > 1 or not sharded
    patch = edited_weights(base)
    before = hashes(base)
    apply(base, patch, tmp_path / "edited")
    assert hashes(base) == before
    old, new = slots(base), slots(tmp_path / "edited")
    patched = {name for change in patch.changes for name in change.names}
    for name in old:
        assert equal_bits(old[name].read(), new[name].read()) != (name in patched)
    revert(tmp_path / "edited", patch, tmp_path / "back")
    assert hashes(tmp_path / "back") == before


@pytest.mark.parametrize("changed", [False, True], ids=["same base", "another base"])
def test_an_interrupted_folder_is_gone_on_with_if_it_is_of_the_same_files(
    changed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checkpoint(tmp_path / "base", max_shard_size="20KB")
    patch = edited_weights(base)
    names = sorted(file.name for file in base.glob("*.safetensors"))
    plain, stop, written = patch_folder.write_pieces, names[-1], list[str]()

    def noted(target: Path, *rest: Any) -> Any:
        if target.name == stop:
            raise KeyboardInterrupt
        written.append(target.name)
        return plain(target, *rest)

    monkeypatch.setattr(patch_folder, "write_pieces", noted)
    with pytest.raises(KeyboardInterrupt):
        apply(base, patch, tmp_path / "out")
    assert written == names[:-1]
    if changed:  # a weight that the patch does not reach
        held = load_file(base / names[0])
        untouched = next(name for name in held if name not in {name for c in patch.changes for name in c.names})
        held[untouched] += 1.0
        save_file(held, base / names[0], metadata={"format": "pt"})
    stop = ""
    written.clear()
    apply(base, patch, tmp_path / "out")
    assert written == (names if changed else names[-1:])
    apply(base, patch, tmp_path / "whole")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert not list(tmp_path.glob(".out.*"))


def test_transformers_opens_a_patched_folder_and_ties_its_head(tmp_path: Path) -> None:
    import transformers

    base = checkpoint(tmp_path / "base", lambda: small.llama(tie_word_embeddings=True))
    patch = edited_weights(base)
    apply(base, patch, tmp_path / "edited")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    embedding = next(change for change in patch.changes if "embed" in change.name)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tensor_hash(model.lm_head.weight) == embedding.after
    assert lorafx.load(tmp_path / "edited").name == "LlamaForCausalLM"


def test_a_tied_weight_stored_twice_is_patched_twice(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", lambda: small.llama(tie_word_embeddings=True))
    tensors = load_file(base / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, base / "model.safetensors", metadata={"format": "pt"})
    new = embedding + 1
    names = ("model.embed_tokens.weight", "lm_head.weight")
    patch = make(dict.fromkeys(names, embedding), dict.fromkeys(names, new))
    apply(base, patch, tmp_path / "edited")
    assert all(torch.equal(slots(tmp_path / "edited")[name].read(), new) for name in names)


def test_the_patch_between_two_folders_leads_from_one_to_the_other(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    patch = edited_weights(base)
    apply(base, patch, tmp_path / "edited")
    found = between(base, tmp_path / "edited")
    assert {c.name: c.after for c in found.changes} == {c.name: c.after for c in patch.changes}
    with pytest.raises(UsageError, match="one of the two only"):
        between(base, checkpoint(tmp_path / "other", small.gpt2))


def test_weights_in_other_formats_are_left_behind(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    (base / "model.gguf").write_bytes(b"the same weights, unpatched")
    (base / "eval_results.json").write_text("{}")
    apply(base, edited_weights(base), tmp_path / "edited")
    assert not (tmp_path / "edited" / "model.gguf").exists()
    assert not (tmp_path / "edited" / "eval_results.json").exists(), "scores of other weights"
    assert (tmp_path / "edited" / "README.md").is_file()


def test_weights_that_the_index_does_not_place_are_left_behind(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", max_shard_size="20KB")
    shutil.copy(next(base.glob("model-*.safetensors")), base / "consolidated.safetensors")
    apply(base, edited_weights(base), tmp_path / "edited")
    found = {file.name for file in (tmp_path / "edited").glob("*.safetensors*")}
    assert found == {file.name for file in base.glob("model*.safetensors*")}


@pytest.mark.parametrize("undo", [False, True], ids=["applied", "reverted"])
def test_what_was_proven_of_other_weights_stays_with_them(undo: bool, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    lorafx.export(lorafx.capture(base), tmp_path / "folded", format="hf")
    assert CliRunner().invoke(main, ["check", str(tmp_path / "folded")]).exit_code == 0
    patch, folder = edited_weights(tmp_path / "folded"), tmp_path / "folded"
    if undo:
        apply(folder, patch, tmp_path / "applied")
        records = ("certificate.json", "report.json", "report.html")
        for name in records:
            shutil.copy(folder / name, tmp_path / "applied" / name)
        folder = tmp_path / "applied"
    (revert if undo else apply)(folder, patch, tmp_path / "out")
    kept = {file.name for file in (tmp_path / "out").iterdir()}
    expected = {"lorafx.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert kept == expected | {"tokenizer_config.json"}
    result = CliRunner().invoke(main, ["check", str(tmp_path / "out")])
    assert result.exit_code == 5
    assert "no certificate.json" in result.stderr


def test_a_folder_changed_since_it_was_written_is_not_vouched_for_again(tmp_path: Path) -> None:
    """In a tensor that the patch does not reach, which nothing but the file's own sha256 could tell."""
    base, folder = checkpoint(tmp_path / "base"), tmp_path / "first"
    patch = edited_weights(base)
    apply(base, patch, folder)
    file = folder / "model.safetensors"
    norm = slots(folder)["model.norm.weight"]
    data = bytearray(file.read_bytes())
    data[norm.start] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"model\.safetensors: not the file that was written"):
        revert(folder, patch, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    with pytest.raises(ArtifactError, match=r"model\.safetensors: not the file that was written"):
        between(base, folder)


def _other_weights(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"][0, 0] += 1
    tensors["model.layers.0.mlp.down_proj.weight"][0, 1] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def _half(base: Path) -> None:
    tensors = {name: value.half() for name, value in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def _another_model(base: Path) -> None:
    shutil.rmtree(base)
    checkpoint(base, small.gpt2)


def _pickled(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")


def _broken(base: Path) -> None:
    _truncate(base / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_other_weights, "wrong base: model.layers.0.mlp.down_proj.weight is not the tensor"),
        (_half, "is float16 (45, 32), the patch is for float32 (45, 32)"),
        (_another_model, "it holds no model.embed_tokens.weight"),
        (_pickled, "pytorch_model.bin is pickled"),
        (_broken, "truncated"),
    ],
)
def test_a_wrong_base_is_refused_by_name_and_nothing_is_written(change: Any, words: str, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    patch = edited_weights(base)
    change(base)
    with pytest.raises(ArtifactError) as caught:
        apply(base, patch, tmp_path / "edited")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


def test_twice_applied_and_never_applied_are_errors(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    patch = edited_weights(base)
    apply(base, patch, tmp_path / "edited")
    with pytest.raises(ArtifactError, match="is applied here already"):
        apply(tmp_path / "edited", patch, tmp_path / "twice")
    with pytest.raises(ArtifactError, match="is not applied here, so there is nothing to revert"):
        revert(base, patch, tmp_path / "never")
    with pytest.raises(UsageError, match="exists already"):
        apply(base, patch, tmp_path / "edited")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base", "edited"]


# ---- programs


@pytest.mark.parametrize("build", [small.llama, small.gpt2], ids=["llama", "gpt2"])
def test_a_program_takes_a_patch_and_gives_it_back(build: Any, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", build)
    patch, program = edited_weights(base), lorafx.capture(base)
    before = {name: tensor_hash(value) for name, value in named_tensors(program.root)}
    applied = patch.apply_to(program)
    assert {name: tensor_hash(value) for name, value in named_tensors(program.root)} == before
    apply(base, patch, tmp_path / "edited")
    again = lorafx.capture(tmp_path / "edited")
    inputs = small.example("token_type_ids" in program.example)  # which the tokenizer of both gives
    with torch.no_grad():
        ours, theirs = applied.module().eval()(**inputs).logits, again.module().eval()(**inputs).logits
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, program.module().eval()(**inputs).logits)
    names = dict(named_tensors(applied.root))
    for alias, value in named_tensors(program.root):  # ties stay ties
        assert [n for n, v in named_tensors(program.root) if v is value] == [
            n for n in names if names[n] is names[alias]
        ]
    restored = patch.remove_from(applied)
    assert {name: tensor_hash(value) for name, value in named_tensors(restored.root)} == before
    with pytest.raises(ArtifactError, match="applied here already"):
        patch.apply_to(applied)
    with pytest.raises(UsageError, match="can no longer be saved as a run"):
        applied.save(tmp_path / "run")


def test_a_patched_program_exports_as_its_folder(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    patch = edited_weights(base)
    applied = patch.apply_to(lorafx.capture(base))
    lorafx.export(applied, tmp_path / "out", format="hf")
    assert not {c.after for c in patch.changes} - {tensor_hash(s.read()) for s in slots(tmp_path / "out").values()}


def test_a_program_of_another_model_is_refused(tmp_path: Path) -> None:
    patch = edited_weights(checkpoint(tmp_path / "base"))
    with pytest.raises(ArtifactError, match="the patch is for another model"):
        patch.apply_to(lorafx.capture(checkpoint(tmp_path / "other", small.gpt2)))


# ---- the command line


def call(*arguments: object) -> Result:
    return CliRunner().invoke(patch_group, [str(argument) for argument in arguments])


def test_the_commands_apply_revert_make_and_show(tmp_path: Path) -> None:
    base, file = checkpoint(tmp_path / "base"), tmp_path / PATCH
    patch = edited_weights(base)
    patch.save(file)
    shown = call("inspect", file, "--json")
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout) == patch.to_json()
    assert patch.changes[0].name in call("inspect", file).stdout
    assert call("apply", base, file, "-o", tmp_path / "edited").exit_code == 0
    assert call("revert", tmp_path / "edited", file, "-o", tmp_path / "back").exit_code == 0
    assert hashes(tmp_path / "back") == hashes(base)
    assert call("make", base, tmp_path / "edited", "-o", tmp_path / "made.safetensors").exit_code == 0
    assert Patch.load(tmp_path / "made.safetensors").changed == patch.changed


def test_errors_of_the_commands_are_lorafxs(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    edited_weights(base).save(tmp_path / PATCH)
    for arguments, code in (
        (("apply", base, tmp_path / "none.safetensors", "-o", tmp_path / "out"), 5),
        (("revert", base, tmp_path / PATCH, "-o", tmp_path / "out"), 5),
        (("apply", tmp_path / "nowhere", tmp_path / PATCH, "-o", tmp_path / "out"), 5),
        (("apply", base, tmp_path / PATCH, "-o", base), 2),
        (("inspect", base), 5),
    ):
        error = call(*arguments).exception
        assert isinstance(error, LorafxError), arguments
        assert error.exit_code == code, error
        assert "\n" not in str(error)
