"""Passes are found by their files and by entry points, listed without imports, and refused with a reason."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from lorafx.base import Pass
from lorafx.errors import UsageError
from lorafx.passes.lora import Lora
from lorafx.recipes import registry

PASSES = Path(registry.__file__).parents[1] / "passes"


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    """The entry points of other packages; a test fills the list."""
    found: list[EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    registry.known.cache_clear()
    registry.pass_class.cache_clear()
    yield found
    registry.known.cache_clear()
    registry.pass_class.cache_clear()


def test_every_file_is_a_pass_of_its_name(plugins: list[EntryPoint]) -> None:
    files = {file.stem.replace("_", "-") for file in PASSES.glob("*.py") if file.stem != "__init__"}
    assert set(registry.known()) == files
    for name in files:
        cls = registry.pass_class(name)
        assert issubclass(cls, Pass)
        assert cls.pass_name() == name
        assert registry.summary(name)
    assert registry.pass_class("lora") is Lora


def test_listing_imports_neither_torch_nor_the_passes() -> None:
    code = (
        "import sys\nfrom lorafx.recipes.registry import known, summary\n"
        "assert [summary(name) for name in known()]\n"
        "assert not {'torch', 'transformers', 'lorafx.passes.lora'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_misspelt_name_is_met_with_the_nearest(plugins: list[EntryPoint]) -> None:
    with pytest.raises(UsageError, match=r"unknown pass 'lroa' \(did you mean 'lora'\?\); `lorafx passes` lists them"):
        registry.pass_class("lroa")


def test_a_plugin_cannot_take_a_name_that_is_taken(plugins: list[EntryPoint]) -> None:
    plugins.append(EntryPoint("lora", "other.lora:Lora", registry.GROUP))
    with pytest.raises(UsageError, match=r"plug-in pass 'lora' \(other.lora:Lora\) has the name of lorafx.passes.lora"):
        registry.known()


def test_two_plugins_cannot_have_one_name(plugins: list[EntryPoint]) -> None:
    plugins += [EntryPoint("mine", f"{package}.mine:Mine", registry.GROUP) for package in ("first", "second")]
    with pytest.raises(UsageError, match=r"\(second.mine:Mine\) has the name of first.mine:Mine"):
        registry.known()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("lorafx.passes.lora:Lora", "is in a file called 'lora'; give both the same name"),
        ("lorafx.passes.lora:Nothing", "lorafx.passes.lora:Nothing is not a pass"),
        ("lorafx.passes.lora:option", "is not a pass (a frozen dataclass under lorafx.base.Pass)"),
        ("no_such_package.mine:Mine", "cannot be imported: No module named 'no_such_package'"),
        ("lorafx.errors", "lorafx.errors defines no pass"),
    ],
)
def test_what_is_no_pass_is_refused_when_used(value: str, message: str, plugins: list[EntryPoint]) -> None:
    plugins.append(EntryPoint("mine", value, registry.GROUP))
    assert registry.known()["mine"] == value
    with pytest.raises(UsageError) as caught:
        registry.pass_class("mine")
    assert message in str(caught.value)
