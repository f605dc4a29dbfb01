"""The class that opens a checkpoint, as people are told it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from lorafx.models.checkpoint import read_config
from lorafx.models.tasks import auto_class_of
from tests import zoo


@pytest.mark.parametrize(
    ("architecture", "kind", "opened"),
    [
        ("BertForSequenceClassification", "bert", "AutoModelForSequenceClassification"),
        ("GPT2LMHeadModel", "gpt2", "AutoModelForCausalLM"),
        ("T5ForConditionalGeneration", "t5", "AutoModelForSeq2SeqLM"),
        ("BertModel", "bert", "AutoModel"),
        ("WhisperForConditionalGeneration", "whisper", "AutoModelForSpeechSeq2Seq"),
        ("FunnelBaseModel", "funnel", "AutoModel"),
        ("BertLMHeadModel", "bert", "AutoModelForCausalLM"),
        ("BertOfOnesOwn", "bert", "BertOfOnesOwn"),
    ],
)
def test_the_class_that_opens_what_a_config_names(architecture: str, kind: str, opened: str) -> None:
    assert auto_class_of({"architectures": [architecture], "model_type": kind}) == opened


def test_a_model_with_code_of_its_own_is_opened_as_its_config_says() -> None:
    own = {"AutoConfig": "modeling.OwnConfig", "AutoModelForCausalLM": "modeling.Own"}
    assert auto_class_of({"architectures": ["Own"], "model_type": "own", "auto_map": own}) == "AutoModelForCausalLM"
    assert auto_class_of({"model_type": "bert"}) is None


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit"])
def test_it_opens_what_was_written(name: str, tmp_path: Path) -> None:
    model: Any = zoo.build(name)
    model.save_pretrained(tmp_path)
    opened = getattr(hf, str(auto_class_of(read_config(tmp_path))))
    assert type(opened.from_pretrained(tmp_path)) is type(model)
