"""Installs the plug-in package under ``tests/plugin`` where one process, or one test session, sees it."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafx.recipes import registry

SOURCE = Path(__file__).parent / "plugin"


def install(folder: Path, package: Path = SOURCE) -> Path:
    """pip-install a package, the plug-in, below ``folder``; returns what to put on the import path."""
    # A copy, because building writes beside the sources.
    source = shutil.copytree(package, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder / "site"), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder / "site"


@contextmanager
def installed(folder: Path) -> Iterator[Path]:
    """The plug-in is there within the block, for this process too."""
    site = install(folder)
    sys.path.insert(0, str(site))
    _forget()
    try:
        yield site
    finally:
        sys.path.remove(str(site))
        for name in [name for name in sys.modules if name.startswith("lorafx_ia3")]:
            del sys.modules[name]
        _forget()


def _forget() -> None:
    importlib.invalidate_caches()
    registry.known.cache_clear()
    registry.pass_class.cache_clear()
