"""The laws every pass keeps, as classes that a test file derives one from.

Each pass is applied to the models once, for all laws that only read the result. The models are those of
:mod:`.models`: as captured, with random adapters, with these ready for evaluation, and with half the channels closed.
"""

from __future__ import annotations

import inspect
import json
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from ..base import Method, Pass, Promise
from ..frontend.load import load
from ..graph.program import ROLES
from ..graph.tree import named_tensors
from ..parity.promises import VerifyEach
from ..passes.lora import Lora
from ..passes.magnitude import Magnitude
from ..passes.to_eval import ToEval
from ..pipeline import fold, run
from ..proof.verify import verify
from ..public import Program
from ..recipes import registry
from ..recipes.recipe import Recipe, parse_options, pass_dict
from ..recipes.registry import in_recipes, options
from .captures import of_folder, own, shared
from .models import FAMILIES, captured, randomised, saved
from .strategies import options_of

#: Linear weights with biases; fused Conv1D weights and a tied output; convolutions.
MODELS = ("bert", "gpt2", "vit")

every_model = pytest.mark.parametrize("model", MODELS)


@shared
def stages(model: str) -> dict[str, Program]:
    """A model as captured, with random adapters, with these made ready for evaluation, and with closed channels."""
    base = captured(model)
    adapted = randomised(run(base, [Lora(rank=2, targets=("all-linear", "role:embedding"))]))
    return {"captured": base, "adapted": adapted, "evaluating": run(adapted, [ToEval()]), "zeros": _with_zeros(base)}


def _with_zeros(program: Program) -> Program:
    """The evaluation graph with half the neurons closed, and half of the columns of every query weight zero."""
    closed = run(program, [ToEval(), Magnitude(targets="role:ffn.down", keep=0.5)])
    for site in closed.sites():
        if site.role in ("attn.query", "attn.qkv"):
            weight = own(closed.root, site.parameter)
            with torch.no_grad():
                (weight if site.kind == "addmm" else weight.T)[: site.in_features // 2] = 0.0
    return closed


def cases(step: Pass, model: str) -> list[Program]:
    """The programs that a pass is tried on: a method on those that train."""
    return [p for p in stages(model).values() if not (isinstance(step, Method) and p.stage == "eval")]


_made: dict[tuple[type[Pass], str, str], list[tuple[Program, Program]]] = {}


def results(step: Pass, model: str) -> list[tuple[Program, Program]]:
    """Each case with the result of the pass, run once for all laws that only read it."""
    key = (type(step), json.dumps(pass_dict(step), sort_keys=True), model)
    if key not in _made:
        _made[key] = [(program, run(program, [step])) for program in cases(step, model)]
    return _made[key]


def forget() -> None:
    """Drop the results that are kept."""
    _made.clear()


def snapshot(program: Program) -> tuple[Any, ...]:
    """Everything that a pass must not change by accident: graph, roles, values, what trains."""
    tensors = {name: (id(value), value._version, value.requires_grad) for name, value in named_tensors(program.root)}
    changes = dict(program.config_changes)
    return str(program.graph), dict(program.roles), tensors, program.history, changes, program.stage


def without_name(table: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a pass in a recipe."""
    return {key: value for key, value in table.items() if key != "name"}


def held(program: Program) -> int:
    """How many numbers a program holds, under every name: folding what was learned on one of two tied tensors has to
    untie them."""
    return sum(value.numel() for _, value in program.root.named_parameters(remove_duplicate=False))


@cache
def _weightless(below: Path) -> Path:
    """A folder that holds a config alone."""
    folder = below / "lorafx-config"
    config: Any = captured("bert").source.model.config
    config.save_pretrained(folder)
    return folder


@contextmanager
def as_installed(cls: type[Pass]) -> Iterator[None]:
    """Recipes know a pass by its name within the block, as they do one of a package that is installed."""
    name = cls.pass_name()
    if name in registry.known():
        yield
        return
    names = {**registry.known(), name: f"{cls.__module__}:{cls.__qualname__}"}
    try:
        with mock.patch.object(registry, "known", return_value=names):
            yield
    finally:
        registry.pass_class.cache_clear()  # it may have found the pass meanwhile


class PassLaws:
    """What holds for every pass. Derive a test class of one of the two below, which have the others, and set ``step``.

    Attributes:
        step: the class of the pass
        options: make it rewrite something in models as small as these; its defaults if not given
    """

    step: ClassVar[type[Pass]]
    options: ClassVar[Mapping[str, Any]] = {}

    @pytest.fixture
    def subject(self) -> Pass:
        """The pass with its options."""
        return self.step(**self.options)

    # ---- declarations

    def test_options_survive_toml(self, subject: Pass) -> None:
        cls, name = type(subject), subject.pass_name()

        @settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
        @given(options_of(cls))
        def survive(values: dict[str, Any]) -> None:
            step = parse_options(cls, values, name)
            again = tomllib.loads(Recipe((step,)).to_toml())
            if in_recipes(step):
                assert Recipe.parse(again).passes == (step,)
            else:  # of a package that is not installed
                assert parse_options(cls, without_name(again["pass"][0]), name) == step

        survive()

    def test_every_option_is_declared_in_full(self, subject: Pass) -> None:
        cls = type(subject)
        assert pass_dict(cls()) == {"name": cls.pass_name()}, "every option has a default, and the name is the file's"
        assert vars(cls)["__dataclass_params__"].frozen
        hash_free = {key for key, value in vars(cls()).items() if isinstance(value, list)}
        assert not hash_free, "a list in a pass can be changed from outside: use a tuple"
        hints = typing.get_type_hints(cls)
        for key, field in options(cls).items():
            assert re.fullmatch(r"\S.*[^.\s]", field.metadata["help"]), f"{key} needs one help line, no full stop"
            allows_none = type(None) in typing.get_args(hints[key])
            assert getattr(cls(), key) is None or not allows_none, f"{key}: TOML has no null: None is the default"

    def test_the_docstring_tells_the_contract(self, subject: Pass) -> None:
        cls = type(subject)
        first, blank, *rest = inspect.cleandoc(cls.__doc__ or "").splitlines()
        assert re.fullmatch(r"[A-Z][a-z]+\b.*\.", first), "one sentence"
        assert not re.match(r"\w+(ing|[^s]s) ", first), "in the imperative: Fold, not Folds or Folding"
        assert blank == ""
        body = "\n".join(rest)
        for start in ("Before: ", "After: ", "Keeps: ", "Source: "):
            assert re.search(rf"^{start}\S", body, re.MULTILINE), f"no {start.strip()}"
        assert re.search(r"\b[Dd]oes nothing\b", body), "when it does nothing"
        exact = re.search(r"^Keeps:.*\bbit by bit\b", body, re.MULTILINE)
        assert (exact is not None) == (cls.promise is Promise.EXACT), "the promise is what the docstring says"
        module = inspect.getmodule(cls)
        assert module is not None
        assert inspect.getdoc(module), "the module's first line is what `lorafx passes` shows"

    # ---- behaviour

    @every_model
    def test_selecting_changes_nothing(self, subject: Pass, model: str) -> None:
        for program in cases(subject, model):
            before = snapshot(program)
            first, second = subject.sites(program), subject.sites(program)
            assert snapshot(program) == before
            assert list(map(str, first.taken)) == list(map(str, second.taken))
            said = [[(str(miss.site), miss.reason) for miss in found.missed] for found in (first, second)]
            assert said[0] == said[1]

    @every_model
    def test_running_leaves_the_old_program_alone(self, subject: Pass, model: str) -> None:
        for program in cases(subject, model):
            before = snapshot(program)
            run(program, [subject])
            assert snapshot(program) == before

    @every_model
    def test_the_numeric_promise_is_kept(self, subject: Pass, model: str) -> None:
        for program in cases(subject, model):
            run(program, [subject], [VerifyEach()])
            run(program, [subject], [VerifyEach(double=True)])

    @every_model
    def test_the_history_is_honest(self, subject: Pass, model: str) -> None:
        for program, result in results(subject, model):
            applied = result.history[-1]
            selection = subject.sites(program)
            assert result.history[:-1] == program.history
            assert applied.step == subject
            assert applied.taken[: len(selection.taken)] == tuple(map(str, selection.taken))
            assert [miss.reason for miss in applied.missed] == [miss.reason for miss in selection.missed]
            assert all(miss.reason for miss in applied.missed)
            said = {tensor for entry in applied.inserted for tensor in entry.tensors.values()}
            new = set(dict(named_tensors(result.root))) - set(dict(named_tensors(program.root)))
            if isinstance(subject, Method):
                assert new == said, "what a method says it inserted is exactly what is new"
                modules = {entry.module for entry in applied.inserted} - {""}  # without what belongs to the pass itself
                assert modules == {site.module for site in selection.taken}
            else:
                assert not said, "a compiler pass inserts nothing to be trained"
                assert held(result) <= held(program), "a compiler pass never makes the model larger"

    @every_model
    def test_every_tensor_has_a_role_and_every_node_a_value(self, subject: Pass, model: str) -> None:
        for _, result in results(subject, model):
            assert set(result.roles) == {tensor for tensor, _ in named_tensors(result.root)} - {"clock"}
            assert set(result.roles.values()) <= set(ROLES)
            for node in result.graph.nodes:
                assert node.op == "output" or "val" in node.meta, f"{node} has no fake value"
                assert node.op in ("placeholder", "output") or node.users or node.is_impure(), f"{node} is dead"

    @every_model
    def test_only_what_is_inserted_or_asked_for_trains(self, subject: Pass, model: str) -> None:
        for program, result in results(subject, model):
            if isinstance(subject, Method):
                biases = getattr(subject, "train_biases", False)
                asked = {key for key in result.trainable() if biases and key.endswith(".bias")}
                frozen = [key for key in result.trainable() if result.roles[key] in ("base", "unread")]
                assert set(frozen) <= asked, "the base is frozen"
            else:
                assert result.trainable().keys() <= program.trainable().keys()


class RewriteLaws(PassLaws):
    """What holds for a pass that is not a method: above all, that a second time changes nothing more."""

    @every_model
    def test_a_second_time_changes_nothing_more(self, subject: Pass, model: str) -> None:
        for _, once in results(subject, model):
            assert not subject.sites(once).taken
            assert str(run(once, [subject]).graph) == str(once.graph)


class MethodLaws(PassLaws):
    """What holds for a method: it may stand in a recipe twice, trains, folds away, and can be saved."""

    @every_model
    def test_a_method_trains_and_folds_away(self, subject: Pass, model: str) -> None:
        base = stages(model)["captured"]
        program = randomised(run(base, [subject]))
        inserted = {name for entry in program.history[-1].inserted for name in entry.tensors.values()}
        for name in program.names("gate"):  # half open: a gate that is open for certain passes no gradient on
            program.load({name: torch.linspace(-0.1, 0.1, len(program.tensor(name)))})
        outputs = program.module().train()(**FAMILIES[model].inputs(2, 7))
        losses = [value.square().mean() for value in outputs.values() if isinstance(value, torch.Tensor)]
        torch.stack(losses).sum().backward()
        gradients = [value.grad for name, value in program.trainable().items() if name in inserted]
        assert gradients
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
        folded = fold(program)
        assert set(folded.roles) == set(base.roles)
        assert verify(program, folded).ok

    @every_model
    def test_a_run_is_loaded_as_it_was_saved(
        self, subject: Pass, model: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        program = randomised(run(of_folder(saved(model, tmp_path_factory.getbasetemp())), [subject]))
        with as_installed(type(subject)):
            program.save(tmp_path / "run")
            again = load(tmp_path / "run")
        assert again.roles == program.roles
        assert again.trainable().keys() == program.trainable().keys()
        assert all(torch.equal(again.tensor(key), value) for key, value in program.learned().items())
        assert verify(program, again).max_abs == 0.0

    def test_without_weights_it_begins_as_with_them(
        self, subject: Pass, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """On the meta device a method has its values, except those computed from weights: a run has them once it is
        opened with weights."""
        inserted = ("adapter", "gate", "statistic")
        below = tmp_path_factory.getbasetemp()
        program = run(of_folder(_weightless(below), task="text-classification", meta=True), [subject])
        assert program.history[-1].inserted
        if not any(program.tensor(key).is_meta for key in program.names(*inserted)):
            return
        base = of_folder(saved("bert", below), task="text-classification", meta=True)
        with as_installed(type(subject)):
            run(base, [subject]).save(tmp_path / "run")
            opened = load(tmp_path / "run")
        assert not any(opened.tensor(key).is_meta for key in opened.names(*inserted))
