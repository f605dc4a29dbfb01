"""Sentence encoders: pooled as sentence-transformers pools, trained on pairs, measured by what they find."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch.nn.functional import cosine_similarity

import lorafx
from lorafx.errors import ArtifactError, UsageError
from lorafx.formats.companions import copy_companions
from lorafx.models.checkpoint import open_model
from lorafx.models.sentences import Pooling, as_encoder, pair_loss, pooling_of
from lorafx.public import Program
from lorafx.recipes.options import TrainOptions
from lorafx.training.data import prepare
from lorafx.training.fit import train
from lorafx.training.pairs import FOUND, SIMILAR, spearman
from lorafx.training.rows import Prepared
from tests.captures import of_folder, shared
from tests.small import WORDS, adapted, bert_config, example, words

PAIRS: dict[str, list[Any]] = {"text": ["w1", "w2 w3", "w4"], "text_pair": ["w5 w6", "w7", "w8"]}


@shared
def encoder() -> Program:
    torch.manual_seed(0)
    return lorafx.capture(as_encoder(hf.BertModel(bert_config()), Pooling()), inputs=example(True))


def prepared(columns: Any, **options: Any) -> Prepared:
    return prepare(columns, encoder(), words(), TrainOptions(**options))


# ---- pooling


def test_pooling_is_the_mean_of_what_is_no_padding() -> None:
    states = torch.tensor([[[3.0, 0.0], [1.0, 4.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert Pooling(normalise=False)(states, mask).tolist() == [[2.0, 2.0]]
    assert Pooling()(states, mask)[0].tolist() == pytest.approx([0.5**0.5, 0.5**0.5])
    assert Pooling("cls", normalise=False)(states, mask).tolist() == [[3.0, 0.0]]
    assert Pooling(normalise=False)(states[:, :2], None).tolist() == [[2.0, 2.0]]


def test_an_encoder_keeps_its_class_name_and_its_weights() -> None:
    kind: Any = hf.BertModel
    plain = kind(bert_config())
    names = list(plain.state_dict())
    model: Any = as_encoder(plain, Pooling())
    assert type(model).__name__ == "BertModel"
    assert isinstance(model, hf.BertModel)
    assert list(model.state_dict()) == names
    inputs = example(True)
    with torch.no_grad():
        embeddings = model.eval()(**inputs)
        states = kind.forward(model, **inputs).last_hidden_state
    assert list(embeddings) == ["sentence_embedding"]
    assert torch.equal(embeddings.sentence_embedding, Pooling()(states, inputs["attention_mask"]))
    sizes: dict[str, Any] = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    writes = hf.T5Model(hf.T5Config(vocab_size=45, **sizes))
    with pytest.raises(UsageError, match="T5Model gives no vector for every token of a text"):
        as_encoder(writes, Pooling())


def written(folder: Path, modules: Any, pooling: Any) -> Path:
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def entry(kind: str, path: str = "") -> dict[str, str]:
    return {"path": path, "type": f"sentence_transformers.models.{kind}"}


PLAIN = [entry("Transformer"), entry("Pooling", "1_Pooling")]


def test_the_pooling_of_a_folder_is_kept(tmp_path: Path) -> None:
    assert pooling_of(tmp_path, asked=False) is None
    assert pooling_of(tmp_path, asked=True) == Pooling()
    cls = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    assert pooling_of(written(tmp_path, PLAIN, cls), asked=False) == Pooling("cls", normalise=False)
    normal = [*PLAIN, entry("Normalize", "2_Normalize")]
    assert pooling_of(written(tmp_path, normal, {"pooling_mode": "mean"}), asked=True) == Pooling("mean")


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        (
            [*PLAIN, entry("Dense", "2_Dense")],
            {"pooling_mode": "mean"},
            "it has a module Dense, which is not known here",
        ),
        (PLAIN, {"pooling_mode_max_tokens": True}, "it pools by pooling_mode_max_tokens; known: mean, cls"),
        (
            PLAIN,
            {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True},
            "it pools by pooling_mode_max_tokens",
        ),
        (PLAIN[:1], {}, "it pools nothing, which is not known here"),
        ({"a": 1}, {}, "no list of modules as sentence-transformers writes it"),
    ],
)
def test_a_pooling_that_is_not_known_is_refused(tmp_path: Path, modules: Any, pooling: Any, message: str) -> None:
    folder = written(tmp_path, modules, pooling)
    with pytest.raises(UsageError) as caught:
        pooling_of(folder, asked=True)
    assert message in str(caught.value)
    assert pooling_of(folder, asked=False) is None, "its encoder opens without"


def test_which_folders_open_as_sentence_encoders(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def outputs(folder: Path, task: str | None) -> list[str]:
        model, _ = open_model(folder, task, {})
        with torch.no_grad():
            return list(model.eval()(input_ids=torch.tensor([[2, 5, 3]])))

    assert outputs(tiny_checkpoint, "sentence-similarity") == ["sentence_embedding"]
    assert "last_hidden_state" in outputs(tiny_checkpoint, None)
    program = of_folder(tiny_checkpoint, task="sentence-similarity")
    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    copy_companions(program, tmp_path)
    assert json.loads((tmp_path / "1_Pooling" / "config.json").read_text()) == {
        "word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False
    }  # fmt: skip
    assert [one["type"].rpartition(".")[2] for one in json.loads((tmp_path / "modules.json").read_text())] == [
        "Transformer", "Pooling", "Normalize"
    ]  # fmt: skip
    assert outputs(tmp_path, None) == ["sentence_embedding"]
    assert "last_hidden_state" in outputs(tmp_path, "feature-extraction")
    assert outputs(tmp_path, "text-classification") == ["logits"]
    (tmp_path / "bare").mkdir()
    copy_companions(of_folder(tmp_path, task="feature-extraction"), tmp_path / "bare")
    assert (tmp_path / "bare" / "vocab.txt").is_file()
    assert not [path for path in ("modules.json", "1_Pooling") if (tmp_path / "bare" / path).exists()], (
        "it pools nothing"
    )


# ---- what pairs are given


def test_pairs_stand_side_by_side() -> None:
    ready = prepared(PAIRS)
    assert ready.rows[1] == {
        "input_ids": [[2, 7, 8, 3], [2, 12, 3]], "attention_mask": [[1] * 4, [1] * 3],
        "token_type_ids": [[0] * 4, [0] * 3], "labels": [2, 3],
    }  # fmt: skip
    batch = ready.collator([ready.rows[0], ready.rows[1]])
    assert batch["input_ids"].tolist() == [[[2, 6, 3, 0], [2, 10, 11, 3]], [[2, 7, 8, 3], [2, 12, 3, 0]]]
    assert batch["labels"].tolist() == [[0, 1], [2, 3]]
    module = encoder().module().eval()
    with torch.no_grad():
        both = module(**batch).sentence_embedding
        second = module(input_ids=torch.tensor([[2, 12, 3]]), attention_mask=torch.ones(1, 3, dtype=torch.long))
    assert both.shape == (2, 2, 32)
    # Padding changes the order of sums alone.
    torch.testing.assert_close(both[1, 1], second.sentence_embedding[0], atol=1e-6, rtol=0)


def test_wanted_cosines_are_labels() -> None:
    columns = {"a": ["w1", "w2"], "b": ["w3", "w4"], "score": [0.5, "-1"]}
    ready = prepared(columns, text="a", text_pair="b", label="score")
    assert ready.collator([ready.rows[0], ready.rows[1]])["labels"].tolist() == [0.5, -1.0]
    with pytest.raises(ArtifactError, match="row 1: label 5 is not a cosine, which lies between -1 and 1; scale"):
        prepared({**columns, "score": [5, 1]}, text="a", text_pair="b", label="score")
    with pytest.raises(UsageError, match="there is a column 'label': say label='label' to learn it as the cosine"):
        prepared({**PAIRS, "label": [1, 0, 1]})
    assert prepared({**PAIRS, "label": [1, 0, 1]}, label="").rows[0]["labels"] == [0, 1]
    with pytest.raises(UsageError, match="batch_size = 1: a pair is told from the others of its batch"):
        prepared(PAIRS, batch_size=1)


# ---- the loss


def pairs(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 2, 8, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def test_the_loss_of_a_pair_is_of_finding_it_in_the_batch() -> None:
    embeddings = pairs(3)
    labels = torch.tensor([[0, 1], [2, 3], [4, 5]])
    cosines = torch.stack([cosine_similarity(embeddings[row, 0][None], embeddings[:, 1]) for row in range(3)])
    wanted = (torch.logsumexp(20 * cosines, 1) - 20 * cosines.diagonal()).mean()
    torch.testing.assert_close(pair_loss(embeddings, labels), wanted)
    # Accumulated over micro-batches it is the same mean: 6 of 12 numbers of texts are in this one.
    torch.testing.assert_close(pair_loss(embeddings, labels, num_items_in_batch=12), wanted / 2)


def test_a_text_is_no_negative_of_what_belongs_to_it() -> None:
    embeddings = pairs(3)
    labels = torch.tensor([[0, 1], [2, 1], [0, 4]])  # the first row's second text again; its first text again
    loss = pair_loss(embeddings, labels)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    assert gradient.isfinite().all()
    alone = pair_loss(embeddings[:1], labels[:1])
    assert float(alone.detach()) == 0.0, "nothing to tell it from"
    # Rows two and three belong to the first, not to each other.
    scores = 20 * cosine_similarity(embeddings[1:, 0][:, None], embeddings[None, 1:, 1], dim=-1)
    others = torch.nn.functional.cross_entropy(scores, torch.arange(2), reduction="sum")
    torch.testing.assert_close(loss, others / 3)


def test_the_loss_of_a_wanted_cosine_is_its_squared_error() -> None:
    embeddings, labels = pairs(4), torch.tensor([1.0, 0.0, -1.0, 0.5])
    wanted = (cosine_similarity(embeddings[:, 0], embeddings[:, 1]) - labels).square().mean()
    torch.testing.assert_close(pair_loss(embeddings, labels), wanted)
    torch.testing.assert_close(pair_loss(embeddings, labels, num_items_in_batch=8), wanted / 2)


# ---- what is measured


def test_what_is_found_at_once_is_counted() -> None:
    angles = np.array([[0.0, 0.1], [1.0, 1.2], [2.0, 1.1], [3.0, 0.1]])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], -1)
    labels = np.array([[0, 1], [2, 3], [4, 5], [6, 7]])
    # The first finds its own (and the last's, equally near: not alone); the second is nearer to the third's 1.1; the
    # third finds 1.2 first, then its own; for the last its own is farthest, with the first's.
    found = FOUND.compute(SimpleNamespace(predictions=embeddings, label_ids=labels))
    assert found == pytest.approx({"recall_at_1": 0.0, "mrr": (1 / 2 + 1 / 2 + 1 / 2 + 1 / 4) / 4})
    labels[3, 1] = 1  # the last's second text is the first's: no other one to find
    found = FOUND.compute(SimpleNamespace(predictions=embeddings, label_ids=labels))
    assert found == pytest.approx({"recall_at_1": 1 / 4, "mrr": (1 + 1 / 2 + 1 / 2 + 1 / 3) / 4})


def test_ranks_are_correlated_as_spearman_does() -> None:
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 8.0, 27.0])) == pytest.approx(1.0)
    # By hand: ranks 1, 2.5, 2.5, 4 with 4, 3, 2, 1 give -4.5 over the root of 4.5 times 5.
    assert spearman(np.array([0, 5, 5, 9]), np.array([4, 3, 2, 1])) == pytest.approx(-4.5 / (4.5 * 5) ** 0.5)
    assert spearman(np.ones(3), np.arange(3)) == 0.0
    embeddings = np.array([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    assert SIMILAR.score(embeddings, np.array([0.9, 0.1])) == pytest.approx(1.0)


def test_pairs_are_learned() -> None:
    half = len(WORDS) // 2
    columns = {"text": WORDS[:half], "text_pair": WORDS[half:]}
    program = adapted(encoder())
    options: dict[str, Any] = {"tokenizer": words(), "progress": False, "max_steps": 40, "batch_size": 8}
    result = train(program, columns, eval_data=columns, learning_rate=2e-2, **options)
    before = next(entry for entry in result.history if "eval_recall_at_1" in entry)
    assert result.metric == "recall_at_1"
    assert result.metrics["eval_mrr"] > before["eval_mrr"]
    assert result.metrics["eval_loss"] < before["eval_loss"]
