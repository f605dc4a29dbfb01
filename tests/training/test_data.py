"""Tables of text: what is read, what is refused and in which words, and what a model is given to learn from."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, models
from torch import nn

from lorafx.errors import ArtifactError, LorafxError, UsageError
from lorafx.files.table import read_table, table_of
from lorafx.frontend.capture import capture
from lorafx.public import Program
from lorafx.recipes.options import TrainOptions
from lorafx.training.collating import Collator
from lorafx.training.data import pad_like, positions, prepare
from lorafx.training.rows import Prepared
from lorafx.training.tokens import Cuts, Texts
from tests.small import POSITIONS, bert, bert_config, captured, example, gpt2, table, words

ROWS: dict[str, list[Any]] = {"text": ["w1, w2\nw3", 'a "quoted" text', "Gemüse 蔬菜"], "label": ["1", "0", "1"]}


def write(file: Path, columns: dict[str, list[Any]]) -> Path:
    """A table in the format the file's suffix names."""
    names, rows = list(columns), [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if file.suffix in (".csv", ".tsv"):
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, names, delimiter="," if file.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        parquet.write_table(pyarrow.table(columns), file)
    return file


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".CSV"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"t{suffix.lower()}", ROWS).rename(tmp_path / f"t{suffix}")
    read = read_table(file)
    assert read.columns == ROWS
    assert len(read) == 3


@settings(deadline=None)  # files, on a machine that may be busy
@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.integers()), min_size=1, max_size=8))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]]) -> None:
    folder = tmp_path_factory.mktemp("tables")
    columns: dict[str, list[Any]] = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    for suffix in (".jsonl", ".parquet") if all(abs(label) < 2**63 for _, label in rows) else (".jsonl",):
        assert read_table(write(folder / f"t{suffix}", columns)).columns == columns
    texts = {
        "text": [text.replace("\r", "").replace("\0", "") for text, _ in rows],
        "label": list(map(str, columns["label"])),
    }
    assert read_table(write(folder / "t.csv", texts)).columns == texts


def test_a_csv_field_may_be_long_and_the_limit_is_put_back(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    long = "w1 " * 100_000
    assert read_table(write(tmp_path / "t.csv", {"text": [long], "label": ["0"]})).columns["text"] == [long]
    assert csv.field_size_limit() == before


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("\ufefftext,label\na,1\n", encoding="utf-8")
    assert list(read_table(tmp_path / "t.csv").columns) == ["text", "label"]


BAD_FILES: dict[str, tuple[str, str | bytes, str]] = {
    "suffix": ("t.xlsx", "", "unknown kind of table '.xlsx'; known: .csv, .tsv, .jsonl, .json, .parquet"),
    "empty": ("t.csv", "", "t.csv: empty; its first line names the columns"),
    "header only": ("t.csv", "text,label\n", "t.csv: no rows"),
    "no rows": ("t.jsonl", "\n", "t.jsonl: no rows"),
    "too many": ("t.csv", "text,label\na,1\nb, c,0\n", "t.csv, line 3: 3 fields where the first line names 2"),
    "too few": ("t.csv", 'text,label\n"a\nb",1\nc\n', "t.csv, line 4: 1 fields where the first line names 2"),
    "quotes": ("t.csv", 'text,label\na,1\n"b,0\nc,1\n', "t.csv, line 3: unexpected end of data; check the quotes"),
    "twice": ("t.csv", "text,text\na,b\n", "t.csv, line 1: two columns are called 'text'"),
    "bytes": ("t.csv", b"text,label\n\xff\xfe,1\n", "t.csv: not UTF-8 text (byte 11)"),
    "json": ("t.jsonl", '{"text": "a"}\n{"text": \n', "t.jsonl, line 2: not valid JSON"),
    "two values": ("t.jsonl", '{"text": "a", "text": "b"}\n', "line 1: not valid JSON (two values are called 'text')"),
    "digits": ("t.jsonl", '{"text": %s}\n' % ("9" * 5000), "line 1: not valid JSON (Exceeds the limit"),
    "depth": ("t.jsonl", "[" * 200_000, "line 1: not valid JSON (maximum recursion depth"),
    "object": (
        "t.jsonl",
        '{"text": "a"}\n\n["b"]\n',
        "t.jsonl, line 3: expected an object of named values, found ['b']",
    ),
    "array": ("t.json", '[{"text": "a"}, 3]', "t.json, row 2: expected an object of named values, found 3"),
    "parquet": ("t.parquet", "PAR1 no", "t.parquet: not a readable parquet file"),
    "pointer": ("t.parquet", "version https://git-lfs.github.com/spec/v1\n", "t.parquet: a git-lfs pointer"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArtifactError) as caught:
        read_table(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"t\.csv: no such file"):
        read_table(tmp_path / "t.csv")
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(ArtifactError, match=r"d\.csv: a folder, not a file"):
        read_table(tmp_path / "d.csv")


def test_tables_also_come_from_memory() -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b"}]
    assert table_of(rows).columns == {"text": ["a", "b"], "label": [1, None]}
    assert table_of(datasets.Dataset.from_dict({"text": ["a"]})).columns == {"text": ["a"]}
    with pytest.raises(ArtifactError, match="data, row 2: no value for 'label'"):
        table_of(rows).column("label")
    with pytest.raises(ArtifactError, match="column 'label' has 1 values where others have 2"):
        table_of({"text": ["a", "b"], "label": [1]})
    with pytest.raises(UsageError, match="expected a file, columns or rows, got int"):
        table_of(3)


# ---- what a model is given


def prepared(columns: Any, program: Program | None = None, tokenizer: Any = None, **options: Any) -> Prepared:
    like = options.pop("like", None)
    return prepare(columns, program or labelled(), tokenizer or words(), TrainOptions(**options), like=like)


def labelled(**changes: Any) -> Program:
    """The captured BERT under a config of its own: class names are recorded there."""
    program = captured(bert)
    model = copy.copy(program.source.model)
    model.config = bert_config(**changes)  # type: ignore[assignment]
    return dataclasses.replace(program, source=dataclasses.replace(program.source, model=model))


def test_inputs_are_what_the_model_was_captured_with() -> None:
    rows = prepared(table(3)).rows
    assert list(rows[0]) == ["input_ids", "attention_mask", "token_type_ids", "labels"]
    assert len(rows) == 3
    assert list(prepared({"text": ["w1 w2"]}, captured(gpt2)).rows[0]) == ["input_ids", "attention_mask", "labels"]


def test_texts_are_cut_to_what_the_model_holds() -> None:
    long = {"text": ["w1 " * 100], "label": [0]}
    assert len(prepared(long, max_length=9).rows[0]["input_ids"]) == 9
    assert len(prepared(long, max_length=999).rows[0]["input_ids"]) == POSITIONS


def test_roberta_counts_positions_from_its_padding() -> None:
    plain = captured(bert)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    roberta = hf.RobertaForSequenceClassification(hf.RobertaConfig(vocab_size=45, max_position_embeddings=20, **sizes))
    assert positions(plain) == POSITIONS
    assert positions(capture(roberta)) == 18


def test_two_texts_are_told_apart() -> None:
    columns = {"a": ["w1 w2"], "b": ["w3"], "label": [1]}
    row = prepared(columns, text="a", text_pair="b").rows[0]
    assert row["input_ids"] == [2, 6, 7, 3, 8, 3]
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    untold = capture(bert(), inputs=example(False))
    with pytest.raises(UsageError, match="captured without token_type_ids, which tell two texts apart"):
        prepared(columns, untold, text="a", text_pair="b")


def test_integers_are_classes_as_they_are() -> None:
    for labels in (["1", "0"], [1, 0], [1.0, 0.0], [True, False]):
        assert prepared({"text": ["w1", "w2"], "label": labels}).rows.features["labels"] == [1, 0]


def test_class_names_are_sorted_and_recorded() -> None:
    program = labelled(num_labels=3)
    train = prepared({"text": ["w1", "w2", "w3"], "label": ["good", "bad", "good"]}, program)
    assert train.rows.features["labels"] == [1, 0, 1]
    assert program.config.id2label == {0: "bad", 1: "good", 2: "LABEL_2"}
    assert program.config.label2id == {"bad": 0, "good": 1, "LABEL_2": 2}
    held_out = prepared({"text": ["w1"], "label": ["good"]}, program, like=train)
    assert held_out.rows.features["labels"] == [1]
    with pytest.raises(
        ArtifactError, match=r"row 1: label 'god' is none of the classes \(did you mean 'good'\?\): bad, good"
    ):
        prepared({"text": ["w1"], "label": ["god"]}, program, like=train)


def test_class_names_the_checkpoint_knows_keep_their_numbers() -> None:
    program = labelled(id2label={0: "POSITIVE", 1: "NEGATIVE"}, label2id={"POSITIVE": 0, "NEGATIVE": 1})
    ready = prepared({"text": ["w1", "w2"], "label": ["NEGATIVE", "POSITIVE"]}, program)
    assert ready.rows.features["labels"] == [1, 0]
    assert program.config.id2label == {0: "POSITIVE", 1: "NEGATIVE"}


def test_training_and_evaluation_labels_are_of_one_kind() -> None:
    numbers = prepared({"text": ["w1"], "label": [1]})
    with pytest.raises(ArtifactError, match="row 1: label 'good' is not an integer, as other labels are"):
        prepared({"text": ["w1"], "label": ["good"]}, like=numbers)
    names = prepared({"text": ["w1", "w2"], "label": ["good", "bad"]})
    with pytest.raises(ArtifactError, match="row 1: label 1 is no class name, as others are"):
        prepared({"text": ["w1"], "label": [1]}, like=names)


BAD_TABLES: dict[str, tuple[dict[str, list[Any]], dict[str, Any], str]] = {
    "no column": (
        {"texts": ["a"], "label": [0]},
        {},
        "no column 'text' (did you mean 'texts'?); its columns: 'texts', 'label'",
    ),
    "no label": ({"text": ["a"], "target": [0]}, {}, "no column 'label'; its columns: 'text', 'target'"),
    "no pair": ({"text": ["a"], "label": [0]}, {"text_pair": "b"}, "no column 'b'"),
    "missing": ({"text": ["a", None], "label": [0, 1]}, {}, "row 2: no value for 'text'"),
    "number": ({"text": ["a", 3], "label": [0, 1]}, {}, "row 2: 'text' is 3, not a text"),
    "mixed": (
        {"text": ["a", "b"], "label": ["1", "good"]},
        {},
        "row 2: label 'good' is not an integer, as other labels are",
    ),
    "range": ({"text": ["a", "b"], "label": [0, 2]}, {}, "row 2: label 2, but the head has 2 classes, 0 to 1"),
    "negative": ({"text": ["a"], "label": [-1]}, {}, "row 1: label -1, but the head has 2 classes"),
    "fraction": ({"text": ["a"], "label": [0.5]}, {}, "row 1: label 0.5 is neither an integer nor a class name"),
    "unnamed": ({"text": ["a"], "label": [""]}, {}, "row 1: label '' is neither an integer nor a class name"),
    "classes": (
        {"text": ["a", "b", "c"], "label": ["x", "y", "z"]},
        {},
        "3 classes in 'label' (x, y, z), but the head has 2;",
    ),
    "nothing": ({"text": [], "label": []}, {}, "no rows"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_table_that_does_not_fit_is_refused(case: str) -> None:
    columns, options, message = BAD_TABLES[case]
    with pytest.raises(ArtifactError) as caught:
        prepared(columns, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_messages_name_the_line_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('text,label\n"w1\nw2",0\n\nw3,7\n', encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"t\.csv, line 5: label 7, but the head has 2 classes"):
        prepared(tmp_path / "t.csv")


def test_regression_learns_numbers() -> None:
    program = captured(bert, num_labels=1)
    assert prepared({"text": ["w1", "w2"], "label": ["0.5", 2]}, program).rows.features["labels"] == [0.5, 2.0]
    with pytest.raises(ArtifactError, match="row 1: label 'high' is not a number"):
        prepared({"text": ["w1"], "label": ["high"]}, program)


def test_a_causal_model_learns_its_text_and_not_the_padding() -> None:
    tokenizer = words()
    tokenizer.pad_token, tokenizer.eos_token = "[SEP]", "[SEP]"  # padding with the end of text, as is usual
    program = captured(gpt2)
    program.config.pad_token_id = 3
    ready = prepared({"text": ["w1 w2 w3", "w4"]}, program, tokenizer)
    batch = ready.collator([ready.rows[0], ready.rows[1]])
    program.config.pad_token_id = 0
    assert batch["labels"].tolist() == [[2, 6, 7, 8, 3], [2, 9, 3, -100, -100]]
    bare = words()
    bare.backend_tokenizer.post_processor = None
    with pytest.raises(ArtifactError, match=r"row 2: 'text' has fewer than two tokens"):
        prepared({"text": ["w1 w2", "w1"]}, program, bare)


def masked() -> nn.Module:
    return hf.BertForMaskedLM(bert_config())


def test_a_masked_model_learns_what_is_hidden() -> None:
    torch.manual_seed(0)
    ready = prepared({"text": ["w1 w2 w3 w4 w5 w6"] * 8}, capture(masked(), inputs=example(True)))
    batch = ready.collator([ready.rows[row] for row in range(8)])
    hidden = batch["labels"] != -100
    assert hidden.any()
    assert not hidden.all()
    assert not hidden[:, [0, -1]].any()  # never [CLS] and [SEP]


def test_a_batch_of_a_masked_model_always_hides_something() -> None:
    program = capture(masked(), inputs=example(True))
    ready = prepared({"text": ["w1"] * 2}, program)
    torch.manual_seed(0)
    for _ in range(20):  # by chance alone 0.85 of these would hide nothing
        batch = ready.collator([ready.rows[0]])
        assert batch["labels"].tolist() == [[-100, 6, -100]]
    with pytest.raises(ArtifactError, match=r"row 2: 'text' has no token to hide and learn; mend or remove"):
        prepared({"text": ["w1", ""]}, program)


def test_an_encoder_decoder_writes_its_label() -> None:
    sizes: dict[str, Any] = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    config = hf.T5Config(**{**sizes, "vocab_size": 45, "decoder_start_token_id": 0, "eos_token_id": 3})
    program = capture(hf.T5ForConditionalGeneration(config))
    ready = prepared({"text": ["w1 w2", "w3"], "label": ["w9", "w8 w7"]}, program)
    batch = ready.collator([ready.rows[0], ready.rows[1]])
    assert batch["labels"].tolist() == [[2, 14, 3, -100], [2, 13, 12, 3]]
    assert batch["decoder_input_ids"].tolist() == [[0, 2, 14, 3], [0, 2, 13, 12]]


def vision() -> nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=8, patch_size=4, **sizes))


def tokens() -> nn.Module:
    return hf.BertForTokenClassification(bert_config())


def encoder() -> nn.Module:
    return hf.BertModel(bert_config())


def sights() -> nn.Module:
    return vision().vit  # type: ignore[return-value]


@pytest.mark.parametrize("build", [sights, encoder])
def test_other_models_ask_for_a_dataset_of_their_inputs(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(UsageError, match="does not learn from a table of texts and labels; pass a dataset"):
        prepared(table(3), capture(build()))


def test_a_dataset_of_inputs_needs_no_tokenizer() -> None:
    program = capture(vision())
    rows = [{"pixel_values": torch.zeros(3, 8, 8), "labels": 0}]
    assert prepare(rows, program, None, TrainOptions()) == Prepared(rows)
    frame = datasets.Dataset.from_dict({"pixel_values": [[0.0]], "labels": [0]})
    assert prepare(frame, program, None, TrainOptions()).rows is frame


def test_a_tokenizer_of_another_checkpoint_is_refused() -> None:
    other = words()
    other.add_tokens(["w99"])
    with pytest.raises(UsageError, match="gives the token id 45, but BertForSequenceClassification has 45 tokens"):
        prepared({"text": ["w99"], "label": [0]}, tokenizer=other)
    with pytest.raises(UsageError, match="captured without a tokenizer beside it; pass tokenizer="):
        prepare(table(3), labelled(), None, TrainOptions())


def test_padding_is_what_the_model_was_captured_with() -> None:
    tokenizer = words()
    tokenizer.padding_side = "left"
    config = bert_config(pad_token_id=1)
    assert (pad_like(tokenizer, config).pad_token, pad_like(tokenizer, config).padding_side) == ("[UNK]", "right")
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("[PAD]", "left")
    config.pad_token_id, tokenizer.pad_token, tokenizer.eos_token = None, None, "[SEP]"
    assert pad_like(tokenizer, config).pad_token == "[SEP]"
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="neither a padding nor an end-of-text token"):
        pad_like(tokenizer, config)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "t.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"reading parquet needs pyarrow; pip install 'lorafx\[parquet\]'") as caught:
        read_table(file)
    assert isinstance(caught.value, LorafxError)


# ---- what a causal model learns


def speaking() -> Any:
    """A tokenizer of whole words without brackets, whose end-of-text token is [SEP] (3)."""
    tokenizer = words()
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.eos_token = "[SEP]"
    return tokenizer


def causal(columns: Any, tokenizer: Any = None, **options: Any) -> list[dict[str, Any]]:
    ready = prepared(columns, captured(gpt2), tokenizer or speaking(), **options).rows
    return [ready[row] for row in range(len(ready))]


def test_a_causal_model_learns_to_end() -> None:
    whole, ended = causal({"text": ["w1 w2", "w3 w4 [SEP]"]})
    assert whole == {"input_ids": [6, 7, 3], "attention_mask": [1, 1, 1], "labels": [6, 7, 3]}
    assert ended["labels"] == [8, 9, 3], "written out by hand: not twice"
    assert causal({"text": ["w1 w2"]}, end_of_text=False)[0]["labels"] == [6, 7]
    assert causal({"text": ["w1"]})[0]["labels"] == [6, 3]


def test_a_text_that_was_cut_does_not_end() -> None:
    rows = causal({"text": ["w1 w2 w3 w4", "w1 w2 w3", "w1 w2"]}, max_length=3)
    assert [row["labels"] for row in rows] == [[6, 7, 8], [6, 7, 8], [6, 7, 3]]
    bracketed = words()
    bracketed.eos_token = "[SEP]"  # which this tokenizer puts after every text, cut or not
    rows = causal({"text": ["w1 w2 w3 w4", "w1"]}, bracketed, max_length=4)
    assert [row["labels"] for row in rows] == [[2, 6, 7, 8], [2, 6, 3]]


def test_an_encoder_decoder_learns_to_end() -> None:
    sizes: dict[str, Any] = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    config = hf.T5Config(**{**sizes, "vocab_size": 45, "decoder_start_token_id": 0, "eos_token_id": 3})
    program = capture(hf.T5ForConditionalGeneration(config))
    columns = {"text": ["w1 w2", "w3"], "label": ["w9", "w8 w7 w6"]}
    ready = prepared(columns, program, speaking(), max_length=3)
    assert ready.rows.features["labels"] == [[14, 3], [13, 12, 11]]
    assert ready.rows.features["input_ids"] == [[6, 7], [8]]
    assert ready.cut == 1


PROMPTS: dict[str, list[Any]] = {"prompt": ["w1 w2", "w3"], "completion": ["w4", "w5 w6"]}


def test_a_causal_model_learns_what_follows_a_prompt() -> None:
    rows = causal(PROMPTS, text="prompt", label="completion")
    assert [row["input_ids"] for row in rows] == [[6, 7, 9, 3], [8, 10, 11, 3]]
    assert [row["labels"] for row in rows] == [[-100, -100, 9, 3], [-100, 10, 11, 3]]
    assert [row["attention_mask"] for row in rows] == [[1] * 4] * 2
    bracketed = words()  # [CLS] before and [SEP] after: around prompt and completion, not between them
    rows = causal(PROMPTS, bracketed, text="prompt", label="completion")
    assert [row["input_ids"] for row in rows] == [[2, 6, 7, 9, 3], [2, 8, 10, 11, 3]]
    assert [row["labels"] for row in rows] == [[-100, -100, -100, 9, 3], [-100, -100, 10, 11, 3]]
    assert causal(PROMPTS, text="prompt", label="completion", end_of_text=False)[0]["labels"] == [-100, -100, 9]


def test_a_completion_is_tokenised_as_it_follows_its_prompt() -> None:
    vocabulary = {"a": 0, "b": 1, " ": 2, " b": 3, "ab": 4, "[PAD]": 5}
    pieces = Tokenizer(models.BPE(vocabulary, [(" ", "b"), ("a", "b")]))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]")
    texts = Texts(table_of({"p": ["a", "a"], "c": [" b", "b"]}), tokenizer, Cuts(9))
    inputs, labels = texts.continued("p", "c")
    assert inputs["input_ids"] == [[0, 3], [0, 1]], "the second would join its prompt, whose token the model is given"
    assert labels == [[-100, 3], [-100, 1]]


def test_a_prompt_that_leaves_no_room_is_refused_with_its_row() -> None:
    with pytest.raises(
        ArtifactError, match="row 1: 'prompt' has 2 of 2 tokens: nothing of 'completion' is left to learn; raise"
    ):
        causal(PROMPTS, text="prompt", label="completion", max_length=2)


def test_a_completion_that_was_cut_does_not_end() -> None:
    assert [r["labels"] for r in causal(PROMPTS, text="prompt", label="completion", max_length=3)] == [
        [-100, -100, 9],
        [-100, 10, 11],
    ]


def test_what_a_label_is_to_a_language_model_is_said_not_guessed() -> None:
    both: dict[str, list[Any]] = {"text": ["w1 w2"], "label": ["w3"]}
    with pytest.raises(UsageError, match="data: the column 'label' holds texts: say label='label' to learn them as"):
        causal(both)
    assert causal(both, label="label")[0]["labels"] == [-100, -100, 8, 3]
    assert causal(both, label="")[0]["labels"] == [6, 7, 3]
    assert causal({"text": ["w1 w2"], "label": [1]})[0]["labels"] == [6, 7, 3], "numbers continue no text"
    with pytest.raises(UsageError, match="learns what follows one text: leave text_pair out, or label"):
        causal({**PROMPTS, "other": ["", ""]}, text="prompt", text_pair="other", label="completion")
    with pytest.raises(ArtifactError, match="no column 'completions'"):
        causal(PROMPTS, text="prompt", label="completions")
    with pytest.raises(UsageError, match="BertForMaskedLM learns from 'text' alone: leave label out"):
        prepared(both, capture(masked(), inputs=example(True)), label="label")


# ---- what is cut is said


def test_rows_that_are_cut_are_counted_aloud(caplog: pytest.LogCaptureFixture) -> None:
    columns = {"text": ["w1 " * 20, "w1", "w1 " * 9], "label": [0, 1, 0]}
    assert prepared(columns, max_length=8).cut == 2
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("lorafx")]
    expected = (
        "data: 2 of 3 rows were cut to max_length = 8 tokens, the longest has 22; raise max_length (--max-length)"
    )
    assert line.startswith(expected)
    caplog.clear()
    assert prepared({"text": ["w1 " * 100], "label": [0]}, max_length=999).cut == 1
    assert f"were cut to the {POSITIONS} tokens the model holds, the longest has 102" in caplog.text
    caplog.clear()
    assert prepared(columns, max_length=22).cut == 0
    assert not [record for record in caplog.records if record.name.startswith("lorafx")]


# ---- numbers as a table writes them


@pytest.mark.parametrize("written", ["1_0", "0x1", "1e0", "1.0", "\u0661", "\u00b9", "1 0"])
def test_what_only_python_reads_as_an_integer_is_none(written: str) -> None:
    with pytest.raises(ArtifactError, match=rf"row 2: label '{written}' is not an integer, as other labels are"):
        prepared({"text": ["w1", "w2"], "label": ["0", written]})


def test_class_names_may_look_like_pythons_integers() -> None:
    program = labelled()
    assert prepared({"text": ["w1", "w2"], "label": ["1_0", "0_1"]}, program).rows.features["labels"] == [1, 0]
    assert program.config.id2label == {0: "0_1", 1: "1_0"}
    assert prepared({"text": ["w1", "w2"], "label": [" 1", "+0"]}).rows.features["labels"] == [1, 0]


@pytest.mark.parametrize("written", ["1_0", "nan", "inf", "1e999", "", float("nan"), float("inf"), [1.0]])
def test_regression_learns_finite_numbers_alone(written: Any) -> None:
    program = captured(bert, num_labels=1)
    good = ["-1", "2.5", ".5", "1e-3", 3, True]
    ready = prepared({"text": ["w1"] * 6, "label": good}, program)
    assert ready.rows.features["labels"] == [-1.0, 2.5, 0.5, 0.001, 3.0, 1.0]
    with pytest.raises(ArtifactError, match=r"row 2: label .* is not a number"):
        prepared({"text": ["w1", "w2"], "label": ["1", written]}, program)


# ---- rows of model inputs


def token_rows(shorter: int = 0) -> list[dict[str, Any]]:
    rows = []
    for length in (3, 5, 2):
        ids = list(range(5, 5 + length))
        labels = [-100, *[number % 2 for number in ids[1:]]][: length - shorter]
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return rows


def gathered(program: Program, rows: list[dict[str, Any]], tokenizer: Any = None) -> Any:
    return prepare(rows, program, tokenizer or words(), TrainOptions()).collator(rows)


@pytest.mark.parametrize("build", [tokens, masked, gpt2])
def test_labels_of_tokens_are_padded(build: Callable[[], nn.Module]) -> None:
    program = captured(gpt2) if build is gpt2 else capture(build())
    batch = gathered(program, token_rows())
    assert batch["labels"].tolist() == [[-100, 0, 1, -100, -100], [-100, 0, 1, 0, 1], [-100, 0, -100, -100, -100]]
    assert batch["input_ids"].tolist()[2] == [5, 6, 0, 0, 0]
    assert batch["attention_mask"].tolist()[2] == [1, 1, 0, 0, 0]


def test_an_encoder_decoders_labels_have_a_length_of_their_own() -> None:
    sizes: dict[str, Any] = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    config = hf.T5Config(**{**sizes, "vocab_size": 45, "decoder_start_token_id": 0, "eos_token_id": 3})
    rows = [{"input_ids": [5, 6], "labels": [7]}, {"input_ids": [5], "labels": [7, 8, 9]}]
    batch = gathered(capture(hf.T5ForConditionalGeneration(config)), rows)
    assert batch["labels"].tolist() == [[7, -100, -100], [7, 8, 9]]
    assert batch["decoder_input_ids"].tolist() == [[0, 7, 0], [0, 7, 8]]


def test_rows_that_fit_nothing_are_refused_in_a_line() -> None:
    with pytest.raises(UsageError, match="a row has 2 labels for 3 tokens; give one a token, -100 where there"):
        gathered(capture(tokens()), token_rows(shorter=1))
    spans = [{"input_ids": [5, 6], "labels": [1, 0]}, {"input_ids": [5], "labels": [1]}]
    with pytest.raises(UsageError, match="rows differ in the length of 'labels'; pass a collator that pads them"):
        Collator(hf.DataCollatorWithPadding(words()))(spans)
    with pytest.raises(UsageError, match="rows differ in the length of 'input_ids'; pass a collator that pads them"):
        Collator(hf.default_data_collator)(token_rows())
