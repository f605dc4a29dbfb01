"""An export for generation whose cache nobody could pass on is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lorafx.errors import CaptureError
from lorafx.proof.exported import check_cache


def exported(**graphs: tuple[list[str], list[str]]) -> Any:
    """Components with these inputs and outputs."""

    def component(inputs: list[str], outputs: list[str]) -> Any:
        named = [[SimpleNamespace(name=name) for name in names] for names in (inputs, outputs)]
        return SimpleNamespace(program=SimpleNamespace(graph=SimpleNamespace(inputs=named[0], outputs=named[1])))

    return SimpleNamespace(components={name: component(*ends) for name, ends in graphs.items()})


def test_graphs_want_what_something_gives() -> None:
    prefill = (["input_ids"], ["logits", "cache.0.keys", "output.cache.0.values"])
    decode = ["input_ids", "input.cache.0.keys", "input.cache.0.values"]
    check_cache(exported(prefill=prefill, decode=(decode, ["logits"])))
    check_cache(exported(model=(["input_ids", "input.cache.0.keys"], ["logits"])))
    with pytest.raises(CaptureError, match=r"its decode graph wants input\.cache\.0\.window, which nothing gives"):
        check_cache(exported(prefill=prefill, decode=([*decode, "input.cache.0.window"], ["logits"])))
    early = (["input_ids", "input.cache.0.window"], [*prefill[1], "output.cache.0.window"])
    with pytest.raises(CaptureError, match=r"its prefill graph wants input\.cache\.0\.window, which nothing gives"):
        check_cache(exported(prefill=early, decode=([*decode, "input.cache.0.window"], ["logits"])))
