"""The laws every pass keeps, built-in or from a plug-in: a new pass is tested here by existing."""

from __future__ import annotations

import inspect
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorafx
from lorafx.base import Method, Pass, Promise, SitePass
from lorafx.graph.edit import Edit
from lorafx.graph.site import Site
from lorafx.graph.tree import named_tensors
from lorafx.parity.promises import VerifyEach
from lorafx.passes.lora import Lora
from lorafx.passes.magnitude import Magnitude
from lorafx.passes.tidy import Tidy
from lorafx.passes.to_eval import ToEval
from lorafx.pipeline import run
from lorafx.public import Program
from lorafx.ranges import Range, range_of
from lorafx.recipes.recipe import Recipe, parse_options, pass_dict
from lorafx.recipes.registry import known, options, pass_class
from tests import zoo
from tests.captures import of_folder, shared
from tests.plugin_install import installed
from tests.small import own

PLUGINS = ("ia3",)
NAMES = [*known(), *PLUGINS]
#: Linear weights with biases; fused Conv1D weights and a tied output; convolutions.
MODELS = ("bert", "gpt2", "vit")

METHODS = [*(name for name in known() if issubclass(pass_class(name), Method)), *PLUGINS]
OTHERS = [name for name in NAMES if name not in METHODS]
#: Where a pass's defaults depend on what pays, the option that has it work on models as small as these.
EAGER: dict[str, dict[str, Any]] = {"gather-columns": {"when": "always"}}

every_pass = pytest.mark.parametrize("name", NAMES)
every_method = pytest.mark.parametrize("name", METHODS)
every_other = pytest.mark.parametrize("name", OTHERS)
every_model = pytest.mark.parametrize("model", MODELS)


@pytest.fixture(scope="module", autouse=True)
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with installed(tmp_path_factory.mktemp("plugin")):
        yield
    results.cache_clear()


def test_the_laws_cover_every_pass_there_is() -> None:
    assert set(known()) == set(NAMES)
    assert {name for name in NAMES if issubclass(pass_class(name), Method)} == set(METHODS)


# ---- declarations

STRINGS = st.text(st.characters(exclude_categories=["Cs"]))


def values_of(hint: Any, within: Range | None = None) -> st.SearchStrategy[Any]:
    """Values of an option's type, out of the closed set of types an option may have, and inside its range."""
    if within is not None:
        hint = next(
            arg for arg in (hint, *typing.get_args(hint)) if arg in (int, float, dict[str, int], dict[str, float])
        )
        if typing.get_origin(hint) is dict:
            return st.dictionaries(STRINGS, values_of(typing.get_args(hint)[1], within), max_size=4)
        return numbers_in(hint, within)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values_of(arg) for arg in args if arg is not type(None)])
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple:
        return st.lists(values_of(args[0]), max_size=4).map(tuple)
    if origin is dict:
        return st.dictionaries(values_of(args[0]), values_of(args[1]), max_size=4)
    plain = {
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: STRINGS,
    }
    return plain[hint]


def numbers_in(kind: type, within: Range) -> st.SearchStrategy[Any]:
    low = within.least if within.least is not None else within.above
    high = within.most if within.most is not None else within.below
    if kind is int:
        drawn = st.integers(-(2**63) if low is None else int(low), 2**63 - 1 if high is None else int(high))
    else:
        drawn = st.floats(low, high, allow_nan=False, allow_infinity=False)
    return drawn.filter(lambda value: within.flaw(value) is None)


def options_of(cls: type[Pass]) -> st.SearchStrategy[dict[str, Any]]:
    hints = typing.get_type_hints(cls)
    drawn = {key: values_of(hints[key], range_of(field)) for key, field in options(cls).items()}
    # What a pass checks beyond ranges: noise is what finegates' penalty is about.
    return st.fixed_dictionaries({}, optional=drawn).filter(lambda given: given.get("noise") != 0)


@every_pass
@given(data=st.data())
def test_options_survive_toml(name: str, data: st.DataObject) -> None:
    cls = pass_class(name)
    given_values = data.draw(options_of(cls))
    step = parse_options(cls, given_values, name)
    assert Recipe.parse(tomllib.loads(Recipe((step,)).to_toml())).passes == (step,)


@every_pass
def test_every_option_is_declared_in_full(name: str) -> None:
    cls = pass_class(name)
    assert pass_dict(cls()) == {"name": name}, "every option has a default, and the name is the file's"
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    hash_free = {key for key, value in vars(cls()).items() if isinstance(value, list)}
    assert not hash_free, "a list can be changed behind the back of whoever holds the pass: use a tuple"
    hints = typing.get_type_hints(cls)
    for key, field in options(cls).items():
        assert re.fullmatch(r"\S.*[^.\s]", field.metadata["help"]), f"{key} needs one help line without a full stop"
        allows_none = type(None) in typing.get_args(hints[key])
        assert getattr(cls(), key) is None or not allows_none, f"{key}: TOML has no null, so None must be the default"


@every_pass
def test_the_docstring_tells_the_contract(name: str) -> None:
    cls = pass_class(name)
    text = inspect.cleandoc(cls.__doc__ or "")
    first, blank, *rest = text.splitlines()
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


@shared
def stages(model: str) -> dict[str, Program]:
    """A model as captured, with random adapters, and with these made ready for evaluation."""
    captured = zoo.captured(model)
    adapted = zoo.randomised(run(captured, [Lora(rank=2, targets=("all-linear", "role:embedding"))]))
    evaluating = run(adapted, [ToEval()])
    return {"captured": captured, "adapted": adapted, "evaluating": evaluating, "zeros": with_zeros(captured)}


def with_zeros(program: Program) -> Program:
    """The evaluation graph with half the neurons closed, and half of what every query reads zero."""
    closed = run(program, [ToEval(), Magnitude(targets="role:ffn.down", keep=0.5)])
    for site in closed.sites():
        if site.role in ("attn.query", "attn.qkv"):
            weight = own(closed.root, site.parameter)
            with torch.no_grad():
                (weight if site.kind == "addmm" else weight.T)[: site.in_features // 2] = 0.0
    return closed


def meets(step: Pass, program: Program) -> bool:
    return not (isinstance(step, Method) and program.stage == "eval")


def cases(name: str, model: str) -> Iterator[tuple[Pass, Program]]:
    step = pass_class(name)(**EAGER.get(name, {}))
    yield from ((step, program) for program in stages(model).values() if meets(step, program))


@cache
def results(name: str, model: str) -> list[tuple[Pass, Program, Program]]:
    """Each case with what the pass makes of it, run once for all laws that only look at the result."""
    return [(step, program, run(program, [step])) for step, program in cases(name, model)]


@every_model
@pytest.mark.parametrize("name", ["dead-channels", "gather-columns", "fold-affine", "to-eval"])
def test_the_laws_meet_models_on_which_a_pass_has_work(name: str, model: str) -> None:
    assert any(step.sites(program).taken for step, program in cases(name, model))


def snapshot(program: Program) -> tuple[Any, ...]:
    """All that a pass could change without leave: graph, roles, values, what trains."""
    tensors = {name: (id(value), value._version, value.requires_grad) for name, value in named_tensors(program.root)}
    return (
        str(program.graph),
        dict(program.roles),
        tensors,
        program.history,
        dict(program.config_changes),
        program.stage,
    )


@every_pass
@every_model
def test_selecting_changes_nothing(name: str, model: str) -> None:
    for step, program in cases(name, model):
        before = snapshot(program)
        first, second = step.sites(program), step.sites(program)
        assert snapshot(program) == before
        assert list(map(str, first.taken)) == list(map(str, second.taken))
        assert [(str(miss.site), miss.reason) for miss in first.missed] == [
            (str(miss.site), miss.reason) for miss in second.missed
        ]


@every_pass
@every_model
def test_running_leaves_the_old_program_alone(name: str, model: str) -> None:
    for step, program in cases(name, model):
        before = snapshot(program)
        run(program, [step])
        assert snapshot(program) == before


@every_pass
@every_model
def test_the_numeric_promise_is_kept(name: str, model: str) -> None:
    for step, program in cases(name, model):
        run(program, [step], [VerifyEach()])
        run(program, [step], [VerifyEach(double=True)])


@every_pass
@every_model
def test_the_history_is_honest(name: str, model: str) -> None:
    for step, program, result in results(name, model):
        applied = result.history[-1]
        selection = step.sites(program)
        assert result.history[:-1] == program.history
        assert applied.step is step
        assert applied.taken[: len(selection.taken)] == tuple(map(str, selection.taken))
        assert [miss.reason for miss in applied.missed] == [miss.reason for miss in selection.missed]
        assert all(miss.reason for miss in applied.missed)
        said = {tensor for entry in applied.inserted for tensor in entry.tensors.values()}
        new = set(dict(named_tensors(result.root))) - set(dict(named_tensors(program.root)))
        if isinstance(step, Method):
            assert new == said, "what a method says it inserted is exactly what is new"
            modules = {entry.module for entry in applied.inserted} - {""}  # without what belongs to the pass as a whole
            assert modules == {site.module for site in selection.taken}
        else:
            assert not said, "a compiler pass inserts nothing to be trained"
            assert held(result) <= held(program), "a compiler pass never makes the model larger"


def held(program: Program) -> int:
    # Under every name: folding what was learned on one of two tied tensors has to untie them.
    return sum(value.numel() for _, value in program.root.named_parameters(remove_duplicate=False))


@every_pass
@every_model
def test_every_tensor_has_a_role_and_every_node_a_value(name: str, model: str) -> None:
    for _, _, result in results(name, model):
        assert set(result.roles) == {tensor for tensor, _ in named_tensors(result.root)} - {"clock"}
        assert set(result.roles.values()) <= set(lorafx.graph.program.ROLES)
        for node in result.graph.nodes:
            assert node.op == "output" or "val" in node.meta, f"{node} has no fake value"
            assert node.op in ("placeholder", "output") or node.users or node.is_impure(), f"{node} is dead"


@every_other  # a method may stand in a recipe twice: two adapters are two adapters
@every_model
def test_a_second_time_changes_nothing_more(name: str, model: str) -> None:
    for step, _, once in results(name, model):
        assert not step.sites(once).taken
        assert str(run(once, [step]).graph) == str(once.graph)


@every_pass
@every_model
def test_only_what_is_inserted_or_asked_for_trains(name: str, model: str) -> None:
    for step, program, result in results(name, model):
        if isinstance(step, Method):
            biases = getattr(step, "train_biases", False)
            asked = {key for key in result.trainable() if biases and key.endswith(".bias")}
            frozen = [key for key in result.trainable() if result.roles[key] in ("base", "unread")]
            assert set(frozen) <= asked, "the base is frozen"
        else:
            assert result.trainable().keys() <= program.trainable().keys()


@every_method
@every_model
def test_a_method_trains_and_folds_away(name: str, model: str) -> None:
    step = pass_class(name)()
    program = zoo.randomised(run(stages(model)["captured"], [step]))
    inserted = {name for entry in program.history[-1].inserted for name in entry.tensors.values()}
    for name in program.names("gate"):  # half open: a gate that is open for certain passes no gradient on
        program.load({name: torch.linspace(-0.1, 0.1, len(program.tensor(name)))})
    rewritten = program.module().train()
    inputs = zoo.ZOO[model].inputs(2, 7)
    losses = [value.square().mean() for value in rewritten(**inputs).values() if isinstance(value, torch.Tensor)]
    torch.stack(losses).sum().backward()
    gradients = [value.grad for name, value in program.trainable().items() if name in inserted]
    assert gradients
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    folded = lorafx.fold(program)
    assert set(folded.roles) == set(stages(model)["captured"].roles)
    assert lorafx.verify(program, folded).ok


@every_method
@every_model
def test_a_run_is_loaded_as_it_was_saved(
    name: str, model: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    step = pass_class(name)()
    program = zoo.randomised(lorafx.rewrite(of_folder(checkpoint(model)), [step]))
    program.save(tmp_path / "run")
    again = lorafx.load(tmp_path / "run")
    assert again.roles == program.roles
    assert again.trainable().keys() == program.trainable().keys()
    assert all(torch.equal(again.tensor(key), value) for key, value in program.learned().items())
    assert lorafx.verify(program, again).max_abs == 0.0


@pytest.fixture(scope="module")
def weightless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a config alone."""
    folder = tmp_path_factory.mktemp("configs")
    zoo.build("bert").config.save_pretrained(folder)  # type: ignore[operator, union-attr]
    return folder


@every_method
def test_on_the_meta_device_it_needs_no_weights(name: str, weightless: Path) -> None:
    step = pass_class(name)()
    program = run(of_folder(weightless, task="text-classification", meta=True), [step])
    assert program.history[-1].inserted
    assert not any(program.tensor(key).is_meta for key in program.names("adapter", "gate", "statistic"))


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
