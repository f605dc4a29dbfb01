"""Tasks from tables: what models are given to learn, what is refused and how, what evaluation measures."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
import transformers as hf
from torch import nn

import lorafx
from lorafx.errors import ArtifactError, UsageError
from lorafx.frontend.capture import capture
from lorafx.models.checkpoint import open_model
from lorafx.passes.lora import Lora
from lorafx.public import Program
from lorafx.recipes.options import TrainOptions
from lorafx.training.answers import word_f1
from lorafx.training.data import prepare, splits
from lorafx.training.fit import train
from lorafx.training.metrics import ACCURACY, F1, RMSE, entities, entity_f1, metric_of
from lorafx.training.rows import Prepared
from tests.captures import shared
from tests.small import adapted, bert, bert_config, captured, example, table, words


def prepared(data: Any, program: Program, tokenizer: Any = None, **options: Any) -> Prepared:
    like = options.pop("like", None)
    return prepare(data, program, tokenizer or words(), TrainOptions(**options), like=like)


def configured(build: Any = bert, **changes: Any) -> Program:
    """A shared capture under a config of its own: class names are recorded there."""
    program = captured(build, num_labels=changes.get("num_labels", 2))
    model = copy.copy(program.source.model)
    model.config = bert_config(**changes)  # type: ignore[assignment]
    return dataclasses.replace(program, source=dataclasses.replace(program.source, model=model))


def tagger(**changes: Any) -> nn.Module:
    return hf.BertForTokenClassification(bert_config(**changes))


def several() -> Program:
    return configured(num_labels=3, problem_type="multi_label_classification")


# ---- several labels a row


def test_lists_of_labels_are_sets_of_classes() -> None:
    program = several()
    ready = prepared({"text": ["w1", "w2", "w3"], "label": [["b", "a"], [], '["c"]']}, program)
    assert ready.rows.features["labels"] == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert program.config.id2label == {0: "a", 1: "b", 2: "c"}
    batch = ready.collator([ready.rows[0], ready.rows[1]])
    assert batch["labels"].dtype is torch.float32
    held_out = prepared({"text": ["w1"], "label": [["c"]]}, program, like=ready)
    assert held_out.rows.features["labels"] == [[0.0, 0.0, 1.0]]
    numbered = prepared({"text": ["w1"], "label": [[2, 0]]}, several())
    assert numbered.rows.features["labels"] == [[1.0, 0.0, 1.0]]


def test_columns_of_0_and_1_are_labels_called_like_them() -> None:
    program = several()
    columns = {"text": ["w1", "w2"], "rude": ["0", "1"], "late": [1, 0], "odd": [0, 0]}
    ready = prepared(columns, program, label="rude, late,odd")
    assert ready.rows.features["labels"] == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    assert program.config.id2label == {0: "rude", 1: "late", 2: "odd"}, "in the order that was given"
    again = prepared(columns, program, label="odd,rude,late", like=ready)
    assert again.rows.features["labels"] == ready.rows.features["labels"]
    with pytest.raises(ArtifactError, match="data, row 2: 'rude' is '7', neither 0 nor 1"):
        prepared({**columns, "rude": ["1", "7"]}, several(), label="rude,late,odd")
    with pytest.raises(ArtifactError, match="no column 'lost'"):
        prepared(columns, several(), label="rude,lost")
    with pytest.raises(ArtifactError, match="'other' is none of the classes: rude, late, odd"):
        prepared({**columns, "other": [0, 1]}, program, label="rude,other", like=ready)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", ["b"]], "row 1: 'label' is 'a', not a list"),
        ([["a"], [0]], "row 1: label 'a' is not an integer, as other labels are"),
        ([[0], [3]], "row 2: label 3, but the head has 3 classes, 0 to 2"),
        ([["a", "b"], ["c", "d"]], "4 classes in 'label' (a, b, c, d), but the head has 3"),
        ([["a"], None], "row 2: no value for 'label'"),
    ],
)
def test_labels_that_are_no_sets_are_refused(labels: list[Any], message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        prepared({"text": ["w1", "w2"], "label": labels}, several())
    assert message in str(caught.value)


def test_f1_of_several_labels_is_counted_over_all_of_them() -> None:
    logits = torch.tensor([[2.0, -1.0, 3.0], [-1.0, -2.0, 0.5]])
    labels = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    chosen = F1.reduce(logits, torch.from_numpy(labels)).numpy()
    found = F1.compute(SimpleNamespace(predictions=chosen, label_ids=labels))
    # Two right of three found and three wanted; by label 1, 0 and 2/3; the second row is right as a whole.
    assert found == pytest.approx({"f1": 2 * 2 / 6, "f1_macro": (1 + 0 + 2 / 3) / 3, "exact": 0.5})
    assert F1.score(np.zeros((1, 2)), np.zeros((1, 2))) == 0.0


# ---- numbers


def test_the_error_of_numbers_is_in_their_own_unit() -> None:
    predictions, labels = np.array([1.0, 2.0, 5.0]), np.array([1.0, 4.0, 3.0])
    found = RMSE.compute(SimpleNamespace(predictions=predictions, label_ids=labels))
    assert found["rmse"] == pytest.approx((8 / 3) ** 0.5)
    # By hand: deviations -5/3, -2/3, 7/3 and -5/3, 4/3, 1/3 give 24/9 over the root of 78/9 times 42/9.
    assert found["pearson"] == pytest.approx((24 / 9) / (78 / 9 * 42 / 9) ** 0.5)
    assert RMSE.compute(SimpleNamespace(predictions=np.ones(2), label_ids=np.array([0.0, 2.0]))) == {"rmse": 1.0}
    assert metric_of(configured(num_labels=1)) is RMSE


def test_several_numbers_a_row_are_refused() -> None:
    program = configured(num_labels=2, problem_type="regression")
    with pytest.raises(UsageError, match="learns 2 numbers a row, which no column holds; set num_labels = 1"):
        prepared({"text": ["w1"], "label": [1]}, program)
    assert metric_of(program) is None


# ---- tags


TAGS: dict[str, list[Any]] = {"tokens": [["w1", "w2", "w3"], ["w4"]], "tags": [["B-X", "I-X", "O"], ["O"]]}


def splitting() -> Any:
    """A tokenizer that makes two tokens of words that begin with ``ww``."""
    tokenizer = words()
    from tokenizers import Regex, pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex("w[0-9]+"), "isolated")]
    )
    return tokenizer


def test_the_first_token_of_a_word_learns_its_tag() -> None:
    program = configured(tagger, num_labels=3)
    ready = prepared({"tokens": [["w1w2", "w3"]], "tags": [["B-X", "O"]]}, program, splitting())
    assert ready.rows[0]["input_ids"] == [2, 6, 7, 8, 3]
    assert ready.rows[0]["labels"] == [-100, 0, -100, 1, -100]
    assert program.config.id2label == {0: "B-X", 1: "O", 2: "LABEL_2"}


def test_words_may_be_texts_with_spaces_between() -> None:
    written = {"text": ["w1 w2 w3", '["w4"]'], "label": ["B-X I-X O", "O"]}
    one = prepared(written, configured(tagger, num_labels=3), text="text", label="label")
    other = prepared(TAGS, configured(tagger, num_labels=3))
    assert one.rows.features == other.rows.features
    batch = one.collator([one.rows[0], one.rows[1]])
    assert batch["labels"].tolist() == [[-100, 0, 1, 2, -100], [-100, 2, -100, -100, -100]]


def test_words_that_are_cut_are_counted() -> None:
    ready = prepared(TAGS, configured(tagger, num_labels=3), max_length=4)
    assert ready.cut == 1
    assert ready.rows[0]["labels"] == [-100, 0, 1, -100]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tags": [["B-X", "O"], ["O"]]}, "row 1: 3 words in 'tokens' and 2 tags in 'tags'; give every word one"),
        ({"tokens": [["w1", "w2", "w3"], []]}, "row 2: 'tokens' has no words"),
        ({"tokens": [["w1", "", "w3"], ["w4"]]}, "row 1: 'tokens' has the word '', which is not a text"),
        ({"tokens": [["w1", None, "w3"], ["w4"]]}, "row 1: 'tokens' has the word None, which is not a text"),
        ({"tags": [["B-X", 1, "O"], ["O"]]}, "row 1: label 'B-X' is not an integer, as other labels are"),
        ({"tags": [[0, 1, 3], [0]]}, "row 1: label 3, but the head has 3 classes"),
        ({"tags": [[0, 1, 2], 5]}, "row 2: 'tags' is 5, not a list"),
    ],
)
def test_tags_that_fit_no_words_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        prepared({**TAGS, **changes}, configured(tagger, num_labels=3))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-A I-A O B-A", {("A", 0, 2), ("A", 3, 4)}),
        ("B-A B-A I-B", {("A", 0, 1), ("A", 1, 2), ("B", 2, 3)}),
        ("I-A I-A O I-B", {("A", 0, 2), ("B", 3, 4)}),
        ("B-A I-A E-A S-A O", {("A", 0, 3), ("A", 3, 4)}),
        ("O O", set()),
    ],
)
def test_entities_are_what_conlleval_reads(tags: str, expected: set[Any]) -> None:
    assert entities(tags.split()) == expected


def test_f1_of_entities_wants_kind_and_both_ends() -> None:
    metric = entity_f1({0: "O", 1: "B-A", 2: "I-A", 3: "B-B"})
    labels = np.array([[-100, 1, 2, 0, -100], [-100, 3, 0, 1, -100]])
    predictions = np.array([[1, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    # Found: A 0-2 (right), A 0-1 (B was wanted), A 2-3 (right). Wanted three.
    assert metric.score(predictions, labels) == pytest.approx(2 * 2 / 6)
    assert metric.beside is not None
    assert metric.beside(predictions, labels) == {"accuracy": 5 / 6}


def test_tags_without_entities_are_counted_one_by_one() -> None:
    program = configured(tagger, num_labels=3)
    prepared({"tokens": [["w1", "w2"]], "tags": [["NOUN", "VERB"]]}, program)
    assert metric_of(program) is ACCURACY
    prepared(TAGS, program := configured(tagger, num_labels=3))
    found = metric_of(program)
    assert found is not None
    assert found.name == "f1"


# ---- what a task says in the config


def test_a_task_is_said_in_the_config(tiny_checkpoint: Path) -> None:
    model, _ = open_model(tiny_checkpoint, "multi-label-classification", {"num_labels": 4})
    assert model.config.problem_type == "multi_label_classification"  # type: ignore[union-attr]
    assert model.config.num_labels == 4  # type: ignore[union-attr]
    for meta in (False, True):
        model, _ = open_model(tiny_checkpoint, "regression", {}, meta=meta)
        assert (model.config.problem_type, model.config.num_labels) == ("regression", 1)  # type: ignore[union-attr]


def test_rows_of_one_class_teach_nothing_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    table = {"text": ["w1", "w2", "w3"], "label": [1, 1, 1]}
    train(adapted(), table, tokenizer=words(), progress=False, max_steps=1)
    assert "all 3 rows are of one class (LABEL_1), so there is nothing to tell apart" in caplog.text


@pytest.mark.parametrize(("trainable", "said"), [((), 1), (("auto",), 0)])
def test_a_new_head_that_no_pass_trains_is_said(
    trainable: tuple[str, ...], said: int, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A method of one's own trains what it inserts; the head that the task asked for is random, and stays so."""
    base = lorafx.capture(tiny_checkpoint, task="text-classification", num_labels=3)
    program = lorafx.rewrite(base, [Lora(rank=2, targets="query", trainable=trainable)])
    train(program, {"text": ["w1", "w2", "w3"], "label": [0, 1, 2]}, tokenizer=words(), progress=False, max_steps=1)
    assert caplog.text.count("classifier.bias was drawn at random and does not train") == said


# ---- where tables come from


def test_frames_of_pandas_are_tables() -> None:
    rows = table(6)
    frame = pandas.DataFrame(rows)
    assert prepared(frame, captured()).rows.features == prepared(rows, captured()).rows.features
    frame.loc[3, "text"] = None
    with pytest.raises(ArtifactError, match="data, row 4: no value for 'text'"):
        prepared(frame, captured())
    number = pandas.DataFrame({"text": ["w1", "w2"], "label": [0.5, float("nan")]})
    with pytest.raises(ArtifactError, match="data, row 2: no value for 'label'"):
        prepared(number, captured(bert, num_labels=1))
    lists = pandas.DataFrame({"tokens": [["w1", "w2"]], "tags": [np.array([0, 1])]})
    assert prepared(lists, configured(tagger, num_labels=3)).rows[0]["labels"] == [-100, 0, 1, -100]
    twice = pandas.DataFrame([["w1", "w2", 0]], columns=["text", "text", "label"])
    with pytest.raises(ArtifactError, match="data: two columns are called 'text'"):
        prepared(twice, captured())


def test_a_frame_of_model_inputs_is_read_as_a_table() -> None:
    frame = pandas.DataFrame({"input_ids": [[2, 6, 3]], "text": ["w1"], "label": [1]})
    assert prepared(frame, captured()).rows[0]["input_ids"] == [2, 6, 3]


def named(names: list[str], labels: list[int]) -> datasets.Dataset:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"text": [f"w{row}" for row in range(len(labels))], "label": labels}, features)


def test_a_datasets_class_names_are_recorded() -> None:
    program = configured()
    ready = prepared(named(["neg", "pos"], [1, 0, 1]), program)
    assert program.config.id2label == {0: "neg", 1: "pos"}, "in the dataset's order"
    assert ready.rows.features["labels"] == [1, 0, 1]
    held_out = prepared(named(["pos", "neg"], [0, 1]), program, like=ready)
    assert held_out.rows.features["labels"] == [1, 0], "another dataset numbers them otherwise"
    known = configured(id2label={0: "pos", 1: "neg"}, label2id={"pos": 0, "neg": 1})
    assert prepared(named(["neg", "pos"], [1, 0]), known).rows.features["labels"] == [0, 1], "so may a checkpoint"
    with pytest.raises(ArtifactError, match="row 2: label -1, but the head has 2 classes"):
        prepared(named(["neg", "pos"], [1, -1]), configured())


def test_a_dict_of_datasets_is_training_and_evaluation() -> None:
    parts: Any = {
        name: datasets.Dataset.from_dict(table(4, seed)) for seed, name in enumerate(["train", "test", "validation"])
    }
    assert splits(datasets.DatasetDict(parts), None) == (parts["train"], parts["validation"])
    del parts["validation"]
    assert splits(datasets.DatasetDict(parts), None) == (parts["train"], parts["test"])
    assert splits(datasets.DatasetDict(parts), "other.csv") == (parts["train"], "other.csv")
    assert splits({"text": ["w1"]}, None) == ({"text": ["w1"]}, None)
    with pytest.raises(UsageError, match="data has the parts 'test', and none called 'train'"):
        splits(datasets.DatasetDict({"test": parts["test"]}), None)
    with pytest.raises(UsageError, match="eval_data has the parts 'train', 'test'; give one of them"):
        splits("train.csv", datasets.DatasetDict(parts))


def test_own_metrics_get_the_whole_outputs() -> None:
    seen: list[tuple[int, ...]] = []

    def compute(prediction: Any) -> dict[str, float]:
        seen.append((*prediction.predictions.shape, *prediction.label_ids.shape))
        return {"ones": float(prediction.label_ids.mean())}

    parts = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(table(8, seed)) for seed, name in enumerate(["train", "test"])}
    )
    options: dict[str, Any] = {"tokenizer": words(), "progress": False, "max_steps": 1, "batch_size": 4}
    result = train(adapted(), parts, compute_metrics=compute, **options)
    assert set(seen) == {(8, 2, 8)}
    assert result.metrics["eval_ones"] == np.mean(parts["test"]["label"])
    assert "eval_accuracy" not in result.metrics
    assert result.metric is None
    with pytest.raises(UsageError, match="compute_metrics measures evaluation data; give eval_data, or leave it out"):
        train(adapted(), table(8), compute_metrics=compute, **options)


# ---- answers


CONTEXTS = ["w5 w6 w7 w8 w9", "w1 w2 w1"]
ASKED: dict[str, list[Any]] = {
    "question": ["w30", "w31 w32"],
    "context": CONTEXTS,
    "answers": [{"text": ["w7 w8", "w7"], "answer_start": [6, 6]}, {"text": [], "answer_start": []}],
}


@shared
def answering() -> Program:
    torch.manual_seed(0)
    return capture(hf.BertForQuestionAnswering(bert_config()), inputs=example(True))


def asked(changes: dict[str, Any] | None = None, **options: Any) -> Prepared:
    return prepared({**ASKED, **(changes or {})}, answering(), **{"stride": 1, **options})


def test_an_answer_is_its_first_and_last_token() -> None:
    ready = asked()
    # [CLS] w30 [SEP] w5 w6 w7 w8 w9 [SEP]; of no answer the first token.
    assert ready.rows[0]["input_ids"] == [2, 35, 3, 10, 11, 12, 13, 14, 3]
    assert [(row["start_positions"], row["end_positions"]) for row in map(ready.rows.__getitem__, (0, 1))] == [
        (5, 6),
        (0, 0),
    ]
    assert ready.collator([ready.rows[0], ready.rows[1]])["start_positions"].tolist() == [5, 0]


def test_long_contexts_are_read_in_windows_that_overlap() -> None:
    ready = asked(max_length=7)
    windows = [ready.rows[row] for row in range(len(ready.rows))]
    assert [row["input_ids"][3:-1] for row in windows[:2]] == [[10, 11, 12], [12, 13, 14]]
    # The answer is whole in the second alone.
    assert [row["start_positions"] for row in windows[:2]] == [0, 3]
    assert [row["end_positions"] for row in windows[:2]] == [0, 4]
    assert ready.cut == 0


def test_a_text_alone_is_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    ready = asked({"answers": ["w7 w8", "w1"], "answer_start": [None, "6"]})
    assert ready.rows.features["start_positions"] == [5, 6]
    assert "more than once" not in caplog.text
    again = asked({"answers": ["w7 w8", "w1"]})
    assert again.rows.features["start_positions"] == [5, 4]
    assert "1 of 2 answers stand in their contexts more than once, and the first place is learned" in caplog.text
    written = asked({"answers": ['{"text": ["w7"], "answer_start": [6]}', ""]})
    assert written.rows.features["end_positions"] == [5, 0]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["w7", "w9"], "row 2: the answer 'w9' is not in its context"),
        ([{"text": ["w7"], "answer_start": [5]}, ""], "row 1: the answer 'w7' does not stand at character 5"),
        (
            [{"text": ["w7"], "answer_start": []}, ""],
            "row 1: 'answers' is {'text': ['w7'], 'answer_start': []}, neither",
        ),
        ([7, ""], "row 1: 'answers' is 7, neither a text nor text and answer_start as SQuAD's are"),
        ([{"text": [" "], "answer_start": [2]}, ""], "row 1: the answer ' ' is not a text"),
        ([{"text": ["w7"], "answer_start": ["x"]}, ""], "row 1: 'answer_start' is 'x', not a number"),
    ],
)
def test_answers_that_are_in_no_context_are_refused(answers: list[Any], message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        asked({"answers": answers})
    assert message in str(caught.value)


def test_a_question_leaves_room_for_its_context() -> None:
    with pytest.raises(
        ArtifactError, match=r"row 2: 'question' has 2 tokens, which leave of 6 no more than windows share"
    ):
        asked(max_length=6)


def logits_of(ready: Prepared, spans: list[tuple[int, int, float]]) -> np.ndarray:
    """Logits that point at one span of each window, so strongly, and below nothing at the first token."""
    widest = max(len(row["input_ids"]) for row in map(ready.rows.__getitem__, range(len(ready.rows))))
    logits = np.full((len(spans), 2, widest), -9.0)
    for window, (start, end, strength) in enumerate(spans):
        logits[window, 0, start] = logits[window, 1, end] = strength
    return logits


def test_the_best_span_of_all_windows_is_the_answer() -> None:
    ready = asked({"question": ["w30", "w31"]}, max_length=7)
    metric = ready.metric
    assert metric is not None
    assert metric.beside is not None
    assert len(ready.rows) == 3
    exact = logits_of(ready, [(4, 4, 1.0), (3, 4, 2.0), (0, 0, 5.0)])
    assert metric.score(exact, None) == 1.0
    assert metric.beside(exact, None) == {"exact": 1.0}
    # The other window is surer: "w6", which is no answer; and an answer where there is none.
    wrong = logits_of(ready, [(4, 4, 3.0), (3, 4, 2.0), (4, 4, 5.0)])
    assert metric.score(wrong, None) == 0.0
    # Too long by one of three words: two of three are right, for the longer of two answers.
    long = logits_of(ready, [(0, 0, 1.0), (3, 5, 2.0), (0, 0, 5.0)])
    assert metric.score(long, None) == pytest.approx((0.8 + 1) / 2)
    assert metric.beside(long, None) == {"exact": 0.5}
    # Never the question, nor an end before the start.
    assert metric.score(logits_of(ready, [(1, 1, 9.0), (3, 4, 2.0), (0, 0, 5.0)]), None) == 1.0


def test_answers_are_compared_as_squad_does() -> None:
    assert word_f1("The Film!", "a film") == 1.0
    assert word_f1("old film", "new film reel") == pytest.approx(2 * 1 / 5)
    assert word_f1("", "film") == 0.0


def test_outputs_of_training_and_evaluation_are_both_ends() -> None:
    columns = {name: values * 3 for name, values in ASKED.items()}
    options: dict[str, Any] = {
        "tokenizer": words(),
        "progress": False,
        "max_steps": 2,
        "batch_size": 4,
        "accumulate": 2,
    }
    result = train(adapted(answering()), columns, eval_data=columns, stride=1, eval_batch_size=4, **options)
    assert set(result.metrics) >= {"eval_loss", "eval_f1", "eval_exact"}
    assert result.metric == "f1"
