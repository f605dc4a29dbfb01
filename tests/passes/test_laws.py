"""The laws every pass keeps (:mod:`lorafx.testing`), built-in or plug-in: a new pass is tested here by existing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import lorafx
from lorafx.base import Method, Pass, Promise, SitePass
from lorafx.graph.edit import Edit
from lorafx.graph.site import Site
from lorafx.parity.promises import VerifyEach
from lorafx.passes.lora import Lora
from lorafx.passes.tidy import Tidy
from lorafx.pipeline import run
from lorafx.recipes.registry import known, pass_class
from lorafx.testing.laws import MethodLaws, RewriteLaws, cases, every_model, forget, stages
from tests import zoo
from tests.plugin_install import installed

PLUGINS = ("ia3",)
NAMES = [*known(), *PLUGINS]
METHODS = [*(name for name in known() if issubclass(pass_class(name), Method)), *PLUGINS]
OTHERS = [name for name in NAMES if name not in METHODS]
#: Where a pass's defaults depend on what pays, the option that has it work on models as small as these.
EAGER: dict[str, dict[str, Any]] = {"gather-columns": {"when": "always"}}


@pytest.fixture(scope="module", autouse=True)
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with installed(tmp_path_factory.mktemp("plugin")):
        yield
    forget()


def made(name: str) -> Pass:
    return pass_class(name)(**EAGER.get(name, {}))


class TestMethods(MethodLaws):
    @pytest.fixture(params=METHODS)
    def subject(self, request: pytest.FixtureRequest) -> Pass:
        return made(request.param)


class TestOthers(RewriteLaws):
    @pytest.fixture(params=OTHERS)
    def subject(self, request: pytest.FixtureRequest) -> Pass:
        return made(request.param)


def test_the_laws_cover_every_pass_there_is() -> None:
    assert set(known()) == set(NAMES)
    assert {name for name in NAMES if issubclass(pass_class(name), Method)} == set(METHODS)


@every_model
@pytest.mark.parametrize("name", ["dead-channels", "gather-columns", "fold-affine", "to-eval"])
def test_the_laws_meet_models_on_which_a_pass_has_work(name: str, model: str) -> None:
    step = made(name)
    assert any(step.sites(program).taken for program in cases(step, model))


# ---- how passes stand together


def test_a_method_freezes_the_base_wherever_it_stands() -> None:
    passes = [Tidy(), Lora(rank=2)]
    program = run(stages("bert")["captured"], passes)
    assert {program.roles[key] for key in program.trainable()} == {"adapter", "head"}


def test_what_a_method_trains_goes_on_training_under_the_next() -> None:
    passes = [Lora(rank=2, trainable=("auto", "LayerNorm")), pass_class("ia3")()]
    program = run(stages("bert")["captured"], passes)
    assert {program.roles[key] for key in program.trainable()} == {"adapter", "head", "base"}
    assert all("LayerNorm" in key for key in program.trainable() if program.roles[key] == "base")


def test_a_pass_leaves_alone_what_an_earlier_one_inserted() -> None:
    program = run(stages("bert")["captured"], [Lora(rank=2), Lora(rank=3, targets="query")])
    program = zoo.randomised(program)
    first, second = program.history
    assert {entry.module for entry in second.inserted} < {entry.module for entry in first.inserted}
    assert [miss.reason for miss in second.missed].count("inserted by an earlier pass") == 4
    folded = lorafx.fold(program)
    assert set(folded.roles) == set(stages("bert")["captured"].roles)
    assert lorafx.verify(program, folded).ok


class Liar(SitePass):
    """Claims to keep every bit, and doubles what it finds."""

    promise = Promise.EXACT

    def rewrite(self, edit: Edit, site: Site) -> None:
        with edit.after(site.node):
            edit.replace(site.node, edit.call(torch.ops.aten.mul.Tensor, site.node, 2.0))


def test_a_pass_that_breaks_its_promise_is_caught() -> None:
    with pytest.raises(lorafx.errors.ParityError, match=r"promised exact outputs"):
        run(stages("bert")["captured"], [Liar(targets="query")], [VerifyEach()])
