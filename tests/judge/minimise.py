"""The smallest graph that fails: layers, zeros, then single lines are left out while it still fails in the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tests.judge.build import NAMES, Generated, Plan
from tests.judge.judge import SIZES, VOCABULARY, Verdict, build, example, judge


def minimise(plan: Plan, verdict: Verdict) -> Plan:
    """A plan that fails in the same way (kind and stage), of which no layer, zeroing or line can be left out."""
    plan = build(plan)[1]
    only = "" if verdict.stage in ("build", "capture") else verdict.stage
    tried: set[Plan] = set()
    changed = True
    while changed:
        changed = False
        for smaller in _smaller(plan):
            if smaller in tried:
                continue
            tried.add(smaller)
            found = judge(smaller, only)
            if (found.kind, found.stage) == (verdict.kind, verdict.stage):
                plan, changed = smaller, True
                break
    return plan


def _smaller(plan: Plan) -> Iterator[Plan]:
    """Plans with one thing less."""
    change = dataclasses.replace
    if not plan.result and not plan.replaced:  # lines are numbered anew when a layer goes
        for index in range(len(plan.layers)):
            yield change(plan, layers=plan.layers[:index] + plan.layers[index + 1 :])
    closings = plan.closings or frozenset()
    if closings:
        yield change(plan, closings=frozenset())
        for key in sorted(closings):
            yield change(plan, closings=closings - {key})
    model, _ = build(plan)
    shapes = _shapes(plan, model)
    names = list(shapes)
    result = model.body[-1].removeprefix("return ")
    for name in names:
        floating, rank = shapes[name][0][0], len(shapes[name][0][1])
        if name not in result.split() and name != "x" and floating and rank > 1:
            yield change(plan, result=name)
        if name == result:
            break
    for line in model.body[-2::-1]:
        name = line.partition(" = ")[0]
        if name in shapes and line.partition(" = ")[2] not in shapes:
            others = [other for other in names[: names.index(name)] if shapes[other] == shapes[name]]
            for other in others[-1:]:
                yield change(plan, replaced=(*plan.replaced, (name, other)))


def _shapes(plan: Plan, model: Generated) -> dict[str, tuple[Any, ...]]:
    """Whether each value of the forward is of floats, and its shapes for two inputs."""
    found: dict[str, list[Any]] = {}
    for batch, length in SIZES[1:]:
        names = {**NAMES, "s": model, "x": example(plan, batch, length)}
        for line in ["x = x", *model.body[:-1]]:
            exec(line, names)
            name = line.partition(" = ")[0]
            if isinstance(names.get(name), Tensor):
                found.setdefault(name, []).append((names[name].is_floating_point(), tuple(names[name].shape)))
    return {name: tuple(shapes) for name, shapes in found.items()}


def described(plan: Plan) -> str:
    """A script of the module of a plan, with the input it takes."""
    model, _ = build(plan)
    x = example(plan, *SIZES[0])
    made = f"torch.randint(0, {VOCABULARY}, {tuple(x.shape)})" if plan.tokens else f"torch.randn{tuple(x.shape)}"
    return f"# seed {plan.seed}; x = {made}; all in double(), eval()\n{model.source}"
