"""Fixtures every test file may use: real weights and text, fetched once by `examples.assets`."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest


def _settle() -> None:
    """Set what torch and transformers read from the environment on import, in subprocesses too."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a test never asks a model hub for anything
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # forking after a parallel tokenisation warns
    workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    if workers is not None:  # more threads than cores wait for each other, and take twice the time
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = os.environ.get("OMP_NUM_THREADS", "")
        most = max(1, cores // int(workers))
        os.environ["OMP_NUM_THREADS"] = str(min(most, int(wanted) if wanted.isdigit() else most))


_settle()

from hypothesis import HealthCheck, settings  # noqa: E402  (after the settings above)

from examples import assets  # noqa: E402

# A busy machine is no failure: what a test may cost is judged by nobody's clock.
settings.register_profile("lorafx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lorafx")


#: The files that take minutes, longest first as they were last timed. xdist hands files out whole, in the order of
#: collection: one of these begun last would keep one worker busy alone.
LONGEST = (
    "passes/test_dead_channels.py",
    "passes/test_dead_sublayers.py",
    "whole/test_families.py",
    "whole/test_random_graphs.py",
    "backends/test_clients.py",
    "whole/test_readme.py",
    "docs/test_docs.py",
    "whole/test_examples.py",
    "whole/test_matrix.py",
    "whole/test_tasks.py",
    "passes/test_laws.py",
    "commands/test_cli.py",
    "passes/test_method_laws.py",
    "formats/test_store.py",
    "editing/test_editing.py",
    "training/test_sharding.py",
    "backends/test_encoder_decoder.py",
    "formats/test_layered.py",
    "whole/test_kill.py",
    "whole/test_real.py",
    "backends/test_quantized.py",
    "backends/test_decoder.py",
    "training/test_training.py",
    "training/test_method_training.py",
    "training/test_duties.py",
    "training/test_schedule_ends.py",
    "training/test_interrupt.py",
)


def pytest_report_header(config: pytest.Config) -> str:
    """What the tests run on, at the top of every log."""
    names = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "peft", "accelerate")
    return ", ".join(f"{name} {found}" for name in names if (found := _installed(name)))


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def pytest_configure(config: pytest.Config) -> None:
    """Keep the order below: xdist would begin with the files of most tests, and end with those of few long ones."""
    config.option.loadscopereorder = False
    gc.set_threshold(
        10_000, 10, 100
    )  # traces make millions of objects of few cycles; each file's garbage goes at its end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those that have slow tests."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    if missing := [str(path) for path in places if not path.is_file()]:
        raise pytest.UsageError(f"LONGEST in tests/conftest.py names what is not there: {', '.join(missing)}")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (places.get(item.path, len(places)), item.path not in slow))


def pytest_collection_finish() -> None:
    _set_aside()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """What one test traced, fixtures included, others need not: but for the tests of tracing."""
    if "lorafx.frontend.capture" not in sys.modules or item.path.parent.name == "frontend":
        return (yield)
    from tests.traces import traced_once

    with traced_once():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """A test that changed a capture others share has failed, whatever it asserted."""
    yield
    if nextitem is None or nextitem.path != item.path:
        _clear_away()
    _set_aside()
    if captures := sys.modules.get("lorafx.testing.captures"):  # not imported here: it imports torch, which not every
        captures.check()  # test needs


_seen = 0
#: How many files are done.
_files = 0


def _clear_away() -> None:
    """At the end of a file: what it left goes. What stays (captures and traces, for the files after it) is millions of
    objects by and by, and left out of every later search, too, until twice as many files are done: some of it has gone
    out of use by then."""
    global _files
    _files += 1
    if _files.bit_count() == 1:
        gc.unfreeze()
    gc.collect()
    gc.freeze()


def _set_aside() -> None:
    """Leave what was imported out of every search for garbage: half a million objects that stay to the end. A trainer
    asks for such a search whenever it begins, which took nine tenths of a short training."""
    global _seen
    if len(sys.modules) > _seen + 300:  # a few times in a whole run
        gc.collect()
        gc.freeze()
        _seen = len(sys.modules)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of the real MiniLM encoder."""
    return assets.minilm()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the real SmolLM2-135M decoder, fp32."""
    return assets.smollm2()


@pytest.fixture(scope="session")
def movies() -> Path:
    """CSV file of the 8,530 labelled movie sentences."""
    return assets.movies()


@pytest.fixture(scope="session")
def movie_split() -> tuple[Path, Path]:
    """Train and test CSV files of the movie sentences, 7,030 and 1,500 rows."""
    return assets.movie_split()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of the small random models of ``tests.zoo``, by family, each written once. Spoil a copy."""
    from tests.zoo import build

    @cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp("checkpoints") / name
        build(name).save_pretrained(path)  # type: ignore[operator]
        return path

    return folder


WORDS = ["the", "a", "film", "movie", "was", "is", "good", "great", "fine", "bad", "dull", "poor", "very", "not"]
WORDS += ["plot", "cast", "and", "but", "of", "in", "it"]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer BERT encoder with a tokenizer of its own, as a real checkpoint is laid out."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-bert"
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=48,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CSV file of 64 short labelled sentences that a tiny model can learn."""
    import random

    rng = random.Random(0)
    rows = []
    for number in range(64):
        label = number % 2
        word = rng.choice(["good", "great", "fine"] if label else ["bad", "dull", "poor"])
        rows.append(f"the {rng.choice(['film', 'movie', 'plot'])} was {rng.choice(['very ', ''])}{word},{label}")
    file = tmp_path_factory.mktemp("tables") / "train.csv"
    file.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return file
