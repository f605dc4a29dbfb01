"""Notices of tracers and converters are kept back by their words while lorafx is at work, and nothing else is."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorafx
from lorafx.frontend.notices import NOTICES, without_notices
from lorafx.passes.lora import Lora
from tests import zoo

TORCH, TRANSFORMERS, GENERATION = NOTICES


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What the loggers of the notices say aloud."""
    handler = Heard()
    for name in NOTICES:
        logging.getLogger(name).addHandler(handler)
    yield handler.lines
    for name in NOTICES:
        logging.getLogger(name).removeHandler(handler)


def test_an_export_says_nothing_that_a_user_can_do_nothing_about(
    heard: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="lorafx.frontend.notices")
    lorafx.export(lorafx.rewrite(zoo.captured("bert"), [Lora(rank=2)]), tmp_path / "onnx", check=False)
    assert heard == []
    assert "Failed to infer the signature" in caplog.text, "and what was kept back is in our own log"


@pytest.mark.parametrize(
    ("logger", "words", "filled"),
    [
        (TORCH, "torchvision is not installed. Skipping %s", ("torchvision::nms",)),
        (TORCH, "Failed to infer the signature for function '%s' because '%s'", ("f", "name 'TReal' is not defined")),
        (TRANSFORMERS, "OnnxExporter is experimental and patches many backend internals; behaviour may differ", ()),
        (GENERATION, "Both `max_new_tokens` (=2) and `max_length`(=20) seem to have been set.", ()),
    ],
)
def test_a_notice_is_kept_back_only_meanwhile(
    logger: str, words: str, filled: tuple[str, ...], heard: list[str]
) -> None:
    with without_notices():
        logging.getLogger(logger).warning(words, *filled)
    assert heard == []
    logging.getLogger(logger).warning(words, *filled)
    assert heard == [words % filled]


def test_anything_else_is_said_all_the_same(heard: list[str]) -> None:
    said = "'%s' does not have a 'default' overload. This could be an error in specifying the op name. Ignoring."
    with without_notices():
        logging.getLogger(TORCH).warning(said, "a::b")
        logging.getLogger(TORCH).error("no translation of %s", "torchvision is not installed. Skipping x")
        with pytest.warns(FutureWarning, match="another"):
            warnings.warn("another thing is deprecated", FutureWarning, stacklevel=1)
    assert len(heard) == 2


def test_an_error_leaves_no_filter_behind() -> None:
    with pytest.raises(ZeroDivisionError), without_notices():
        raise ZeroDivisionError
    assert not any(logging.getLogger(name).filters for name in NOTICES)
