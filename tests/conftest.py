"""Fixtures every test file may use: real weights and text, fetched once by `examples.assets`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _settle() -> None:
    """Set what torch and transformers read from the environment on import, in subprocesses too."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a test never asks a model hub for anything
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # forking after a parallel tokenisation warns
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))


_settle()

from examples import assets  # noqa: E402  (after the settings above)


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
