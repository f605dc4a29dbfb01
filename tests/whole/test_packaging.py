"""What is installed is what the repository holds: linked passes, command, licence, one ONNX Runtime."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lorafx

ROOT = Path(__file__).resolve().parents[2]


def build(source: Path, kind: str, out: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=60)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return Parser().parsestr(wheel.read(f"{info(wheel)}/METADATA").decode())


def info(wheel: zipfile.ZipFile) -> str:
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    return folder


def contents(wheel: zipfile.ZipFile, prefix: str) -> dict[str, bytes]:
    return {name: wheel.read(name) for name in wheel.namelist() if name.startswith(prefix)}


def folder(path: Path, prefix: str) -> dict[str, bytes]:
    files = [file for file in path.rglob("*.py") if not file.is_relative_to(ROOT / "lorafx" / "passes")]
    return {prefix + file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def test_wheel_holds_the_passes_of_the_top_level_folder(wheel: zipfile.ZipFile) -> None:
    expected = folder(ROOT / "passes", "lorafx/passes/")
    assert contents(wheel, "lorafx/passes/") == expected
    assert "lorafx/passes/lora.py" in expected


def test_wheel_holds_lorafx_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0] for name in wheel.namelist()} == {"lorafx", info(wheel)}
    assert folder(ROOT / "lorafx", "lorafx/").items() <= contents(wheel, "lorafx/").items()


def test_wheel_built_from_the_sdist_is_the_same(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    with tarfile.open(build(ROOT, "sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    with zipfile.ZipFile(build(source, "wheel", tmp_path / "wheel")) as second:
        assert contents(second, "lorafx/") == contents(wheel, "lorafx/")


def test_passes_is_a_relative_link() -> None:
    assert (ROOT / "lorafx" / "passes").readlink() == Path("../passes")


def test_passes_under_another_name_is_refused() -> None:
    command = [sys.executable, "-c", "import passes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: 'passes' is not an import name of this folder: write `import lorafx.passes`"
    )


def test_metadata_states_version_licence_and_command(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert metadata["Version"] == lorafx.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    licence = wheel.read(f"{info(wheel)}/licenses/LICENSE")
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert b"Apache License\n" in licence
    assert b"END OF TERMS AND CONDITIONS" in licence
    assert wheel.read(f"{info(wheel)}/entry_points.txt").decode() == ("[console_scripts]\nlorafx = lorafx.cli:main\n")


@pytest.mark.parametrize(
    ("system", "machine", "runtime"),
    [
        ("Linux", "x86_64", "onnxruntime-gpu"),
        ("Windows", "AMD64", "onnxruntime-gpu"),
        ("Linux", "aarch64", "onnxruntime"),
        ("Windows", "ARM64", "onnxruntime"),
        ("Darwin", "arm64", "onnxruntime"),
        ("Darwin", "x86_64", "onnxruntime"),
    ],
)
def test_exactly_one_onnx_runtime_in_every_environment(
    metadata: Message, system: str, machine: str, runtime: str
) -> None:
    environment = {"platform_system": system, "platform_machine": machine, "extra": ""}
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    named = [r.name for r in required if r.marker is None or r.marker.evaluate(environment)]
    assert [name for name in named if name.startswith("onnxruntime")] == [runtime]


def test_the_list_for_cpus_is_what_is_required_with_the_other_onnx_runtime(
    wheel: zipfile.ZipFile, metadata: Message
) -> None:
    """On a machine for which the GPU build is the default; elsewhere the two are the same."""
    environment = {"platform_system": "Linux", "platform_machine": "x86_64", "extra": ""}
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    needed = {r.name: r.specifier for r in required if r.marker is None or r.marker.evaluate(environment)}
    needed["onnxruntime"] = needed.pop("onnxruntime-gpu")
    lines = wheel.read("lorafx/requirements-cpu.txt").decode().splitlines()
    listed = [Requirement(line) for line in lines if not line.startswith("#")]
    assert {r.name: r.specifier for r in listed} == needed
    assert all(r.marker is None for r in listed)


def test_the_page_on_installing_names_every_extra(metadata: Message) -> None:
    page = (ROOT / "docs" / "how-to" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `lorafx\[(\w+)\]` \|", page, re.MULTILINE)) == set(
        metadata.get_all("Provides-Extra", [])
    )


def test_importing_lorafx_to_find_the_list_needs_nothing_installed() -> None:
    """``pip install --no-deps lorafx`` comes first, and then this asks for the list."""
    line = "import lorafx; print(*lorafx.__path__)"
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {line}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert (Path(done.stdout.strip()) / "requirements-cpu.txt").is_file()
    page = (ROOT / "docs" / "how-to" / "install.md").read_text(encoding="utf-8")
    assert f"pip install -r \"$(python -c '{line}')/requirements-cpu.txt\"" in page
