"""The low-rank branch beside a weight: what every method of the LoRA family inserts, and the few places where they
differ.

A branch computes ``delta = leave(B · s · g ⊙ A · x)``. A pass says the rank, the scale and the initial values, and may
multiply each rank by something (``each_rank``) or work on the result (``leave``); everything else is the same for all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ..base import Method, Promise, Selection, option
from ..errors import NoSitesError, UsageError, did_you_mean
from ..graph.edit import Edit
from ..graph.program import Program
from ..graph.site import STACK, Site
from ..graph.target import ALL_LINEAR, Target
from ..graph.tree import get_tensor, has_tensor, hooks_gradient
from .stacks import StackShape, stack_shape, update_stack

aten = torch.ops.aten


def named_by(key: str, module: str) -> bool:
    """Whether the key of a pattern names ``module``, as in PEFT: by a suffix of its path, or by a regex. UsageError for
    one that is none."""
    try:
        return re.fullmatch(rf"(.*\.)?({key})", module) is not None
    except (re.error, OverflowError) as error:
        raise UsageError(f"pattern {key!r}: not a regular expression: {error}") from None


def pattern_value(pattern: Mapping[str, int | float], module: str, default: float) -> float:
    """The value of the first key that :func:`names <named_by>` ``module``."""
    return next((value for key, value in pattern.items() if named_by(key, module)), default)


def kaiming(tensor: Tensor) -> None:
    """Kaiming-uniform with a = √5, as the reference implementation of LoRA initialises A."""
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


def _meant(key: str, taken: Iterable[Site]) -> str:
    """Which of the names of weights the key of a pattern may have meant."""
    ends = list(dict.fromkeys(site.module.rpartition(".")[2] for site in taken))
    return did_you_mean(key, ends) or f" (names here: {', '.join(ends[:6])})"


class _RankTooLargeError(UsageError):
    """A rank too large for a weight, though a lower one would do."""


@dataclass(frozen=True)
class LowRank(Method):
    """Base of the passes that insert ``y + B (s · A drop(x))``; subclasses define ``rank_of`` and ``scale_of``.

    A: (rank, in) Kaiming-uniform, B: (out, rank) zero, both fp32. For an embedding, A reads the one-hot index; for a
    convolution A has the kernel and B is 1×1. The scale acts on the rank-r activation: the same result as on the
    output, with rank/out of the memory traffic. A stack of matrices is updated itself (:mod:`.stacks`), by passes that
    name the kind.
    """

    promise: ClassVar[Promise] = Promise.EXACT

    dropout: float = option(0.0, "dropout before A while training", least=0, below=1)
    trainable: tuple[str, ...] = option(("auto",), "modules that train in full; auto: a classification head")

    # ---- chosen by a method

    @property
    def prunes(self) -> bool:
        """Whether the pass itself makes A or B sparse, so that no other may."""
        return False

    def rank_of(self, site: Site) -> int:
        """The rank at ``site``; UsageError when it exceeds what the weight can hold."""
        raise TypeError(f"{self.pass_name()} does not say its ranks: define rank_of()")

    def scale_of(self, site: Site) -> float:
        """The factor s at ``site``."""
        raise TypeError(f"{self.pass_name()} does not say its scale: define scale_of()")

    def factor_a(self, edit: Edit, site: Site, shape: tuple[int, ...]) -> fx.Node:
        """The node that reads A (rank, in)."""
        return edit.parameter(site, "lora_A.weight", shape, kaiming)

    def factor_b(self, edit: Edit, site: Site, shape: tuple[int, ...]) -> fx.Node:
        """The node that reads B (out, rank)."""
        return edit.parameter(site, "lora_B.weight", shape)

    def each_rank(self, edit: Edit, site: Site, ranks: int) -> fx.Node | None:
        """The node of the factors of ranks (ranks,), those of a stack's matrices one after another; None for no
        factors."""
        return None

    def leave(self, edit: Edit, site: Site, delta: fx.Node) -> fx.Node:
        """Change the branch's result (…, out) before it is added; a stack has no branch."""
        return delta

    # ---- shared by all

    def checked_rank(self, rank: int, site: Site) -> int:
        """``rank``, if ``site`` can hold it; UsageError with the site's name otherwise."""
        limit = min(site.out_features, site.in_features)
        if not 0 < rank <= limit:
            error = _RankTooLargeError if rank > 0 else UsageError
            raise error(f"{self.pass_name()}: rank {rank} at {site.module}, whose weight allows 1 to {limit}")
        return rank

    def refuse(self, program: Program, site: Site) -> str | None:
        if site.kind == "conv2d" and _conv_groups(site.node) != 1:
            return "grouped convolutions are not handled"
        if any(f"{site.module}.".startswith(f"{path}.") for path in self._in_full(program)):
            return "trains in full"
        reason = super().refuse(program, site) or self._too_small(site)
        if reason is None and site.kind == STACK and self.dropout > 0:
            raise UsageError(
                f"{self.pass_name()}: dropout = {self.dropout:g} at {site.module}, a stack of matrices, which are "
                "changed themselves and have no input to drop; set dropout = 0 or leave it out of targets"
            )
        return reason

    def _too_small(self, site: Site) -> str | None:
        """Why a weight that ``all-linear`` names cannot hold the rank (a gate with one output, say). For a weight named
        more specifically the user has to decide, so there it is an error."""
        item = Target.parse(self.targets).match(site)
        if item is None or item.kind != ALL_LINEAR:
            return None
        try:
            self.rank_of(site)
        except _RankTooLargeError as error:
            return str(error)
        return None

    def check_pattern(self, option: str, pattern: Mapping[str, Any], selection: Selection[Site]) -> None:
        """NoSitesError for a key of a pattern that names none of the weights taken."""
        for key in pattern:
            if any(named_by(key, site.module) for site in selection.taken):
                continue
            missed = [miss for miss in selection.missed if named_by(key, miss.site.module)]
            why = f"; {missed[0].site.module}: {missed[0].reason}" if missed else _meant(key, selection.taken)
            taken = len(selection.taken)
            raise NoSitesError(f"{self.pass_name()}: {option} {key!r} names none of {taken} weights taken{why}")

    def _in_full(self, program: Program) -> tuple[str, ...]:
        return modules_in_full(program, self.trainable)

    def rewrite(self, edit: Edit, site: Site) -> None:
        rank, scale = self.rank_of(site), self.scale_of(site)
        if site.reader is not None:
            with edit.before(site.reader):
                self._update(edit, site, stack_shape(edit.program, site, rank, scale))
            return
        with edit.after(site.node):
            delta = _BRANCHES[site.kind](self, edit, site, rank, scale)
            delta = edit.cast(self.leave(edit, site, delta), site.node.meta["val"].dtype)
            edit.replace(site.node, edit.call(aten.add.Tensor, site.node, delta))

    def _update(self, edit: Edit, site: Site, stack: StackShape) -> None:
        shape_a, shape_b = stack.factors(edit.program.tensor(site.parameter).shape)
        a, b = self.factor_a(edit, site, shape_a), self.factor_b(edit, site, shape_b)
        factor = self.each_rank(edit, site, shape_a[0])
        if factor is not None:
            a = edit.call(aten.mul.Tensor, a, edit.call(aten.unsqueeze.default, factor, 1))
        update_stack(edit, site, a, b, stack)

    def finish(self, edit: Edit) -> None:
        train_in_full(edit, self.trainable)


def modules_in_full(program: Program, trainable: tuple[str, ...]) -> tuple[str, ...]:
    """Paths of the modules an option ``trainable`` names; ``auto`` is a classification head."""
    named = (path for name in trainable if name != "auto" for path in program.modules_named(name))
    return (*named, *(program.default_trainable() if "auto" in trainable else ()))


def train_in_full(edit: Edit, trainable: tuple[str, ...]) -> None:
    """Make those modules train; UsageError for a name without parameters."""
    for name in trainable:
        if name != "auto" and not edit.train(edit.program.modules_named(name)):
            raise UsageError(f"{edit.step.pass_name()}: trainable module {name!r} has no parameters in this model")
    taken, model = edit.train(modules_in_full(edit.program, trainable)), edit.program.source.model
    hooked = next((name for name in taken if has_tensor(model, name) and hooks_gradient(get_tensor(model, name))), None)
    if hooked is not None:
        why = f"the model has a hook on the gradient of {hooked}, which a graph does not run"
        raise UsageError(f"{edit.step.pass_name()}: {why}; remove the hook, or leave {hooked} out of trainable")


def train_biases(edit: Edit, sites: Iterable[Site]) -> None:
    """Make the biases beside these weights train."""
    for site in sites:
        if site.bias is not None:
            edit.train_tensor(str(site.bias.target))


def _input(step: LowRank, edit: Edit, site: Site, weight: fx.Node) -> fx.Node:
    value = edit.cast(site.input, weight.meta["val"].dtype)
    return edit.call(aten.dropout.default, value, step.dropout, True) if step.dropout > 0 else value


def _scaled(step: LowRank, edit: Edit, site: Site, hidden: fx.Node, scale: float) -> fx.Node:
    factor = step.each_rank(edit, site, step.rank_of(site))
    hidden = hidden if factor is None else edit.call(aten.mul.Tensor, hidden, factor)
    return hidden if scale == 1.0 else edit.call(aten.mul.Tensor, hidden, scale)


def _linear(step: LowRank, edit: Edit, site: Site, rank: int, scale: float) -> fx.Node:
    a = step.factor_a(edit, site, (rank, site.in_features))
    b = step.factor_b(edit, site, (site.out_features, rank))
    hidden = edit.call(aten.linear.default, _input(step, edit, site, a), a)
    return edit.call(aten.linear.default, _scaled(step, edit, site, hidden, scale), b)


def _embedding(step: LowRank, edit: Edit, site: Site, rank: int, scale: float) -> fx.Node:
    # Zero A and normal B, the opposite of a linear layer: the reference implementation's choice for embeddings.
    a = edit.parameter(site, "lora_embedding_A", (rank, site.in_features))
    b = edit.parameter(site, "lora_embedding_B", (site.out_features, rank), nn.init.normal_)
    hidden = edit.call(aten.embedding.default, edit.call(aten.t.default, a), site.input)
    return edit.call(aten.linear.default, _scaled(step, edit, site, hidden, scale), b)


def _conv2d(step: LowRank, edit: Edit, site: Site, rank: int, scale: float) -> fx.Node:
    kernel = tuple(edit.program.tensor(site.parameter).shape[1:])
    a = step.factor_a(edit, site, (rank, *kernel))
    b = step.factor_b(edit, site, (site.out_features, rank, 1, 1))
    geometry = site.node.args[3:]
    hidden = edit.call(aten.conv2d.default, _input(step, edit, site, a), a, None, *geometry)
    return edit.call(aten.conv2d.default, _scaled(step, edit, site, hidden, scale), b)


def _conv_groups(node: fx.Node) -> object:
    return node.args[6] if len(node.args) > 6 else 1


_BRANCHES = {"linear": _linear, "addmm": _linear, "embedding": _embedding, "conv2d": _conv2d}


@dataclass(frozen=True)
class ExactLora(LowRank):
    """Plain LoRA whose rank and scale are given for each module by its path."""

    kinds: ClassVar[tuple[str, ...]] = (*_BRANCHES, STACK)

    ranks: Mapping[str, int] = option({}, "rank, by module path")
    scales: Mapping[str, float] = option({}, "factor, by module path")

    def refuse(self, program: Program, site: Site) -> str | None:
        return super().refuse(program, site) if site.module in self.ranks else "no rank was given"

    def rank_of(self, site: Site) -> int:
        return self.ranks[site.module]

    def scale_of(self, site: Site) -> float:
        return self.scales[site.module]
