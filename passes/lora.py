"""Insert a trainable low-rank branch beside each selected weight (LoRA)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from ..base import Method, Promise, option
from ..edit import Edit
from ..errors import UsageError
from ..program import Program
from ..site import Site

aten = torch.ops.aten


def pattern_value(pattern: Mapping[str, int | float], module: str, default: float) -> float:
    """The value of the first key that names ``module``, as in PEFT: by a suffix of its path, or by a regex."""
    matches = (value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module))
    return next(matches, default)


def kaiming(tensor: Tensor) -> None:
    """Kaiming-uniform with a = √5, as the reference implementation initialises A."""
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


@dataclass(frozen=True)
class Lora(Method):
    """Insert a trainable low-rank branch beside each selected weight.

    Before: ``y = W x + b``
    After: ``y = W x + b + B (s · A drop(x))`` with ``s = alpha / rank`` (``alpha / √rank`` with rslora)

    A: (rank, in) Kaiming-uniform, B: (out, rank) zero, both fp32. For an embedding, A reads the one-hot index; for a
    convolution A has the kernel and B is 1×1. The scale acts on the rank-r activation: the same maths as on the output
    at rank/out of the traffic.

    Keeps: the outputs, bit by bit, since B = 0. Does nothing where no target matches (and says so).
    Source: Hu et al. 2021, arXiv 2106.09685, eq. 3; rslora: Kalajdzievski 2023, arXiv 2312.03732.
    """

    promise: ClassVar[Promise] = Promise.EXACT
    kinds: ClassVar[tuple[str, ...]] = ("linear", "addmm", "embedding", "conv2d")

    rank: int = option(8, "rank of the update")
    alpha: float = option(8.0, "scale: the branch is multiplied by alpha / rank")
    dropout: float = option(0.0, "dropout before A while training")
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead")
    rank_pattern: dict[str, int] = option({}, "rank of particular modules, by name or regular expression")
    alpha_pattern: dict[str, float] = option({}, "alpha of particular modules, by name or regular expression")
    trainable: tuple[str, ...] = option(("auto",), "modules that train in full; auto: a classification head")

    def rank_of(self, site: Site) -> int:
        """The rank at ``site``; UsageError when it exceeds what the weight can hold."""
        rank = int(pattern_value(self.rank_pattern, site.module, self.rank))
        limit = min(site.out_features, site.in_features)
        if not 0 < rank <= limit:
            raise UsageError(f"{self.pass_name()}: rank {rank} at {site.module}, whose weight allows 1 to {limit}")
        return rank

    def scale_of(self, site: Site) -> float:
        """The factor s at ``site``."""
        alpha = pattern_value(self.alpha_pattern, site.module, self.alpha)
        rank = self.rank_of(site)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def refuse(self, program: Program, site: Site) -> str | None:
        if site.kind == "conv2d" and _conv_groups(site.node) != 1:
            return "grouped convolutions are not handled"
        if any(f"{site.module}.".startswith(f"{path}.") for path in self._in_full(program)):
            return "trains in full"
        return super().refuse(program, site)

    def _in_full(self, program: Program) -> tuple[str, ...]:
        named = (path for name in self.trainable if name != "auto" for path in program.modules_named(name))
        return (*named, *(program.default_trainable() if "auto" in self.trainable else ()))

    def rewrite(self, edit: Edit, site: Site) -> None:
        rank, scale = self.rank_of(site), self.scale_of(site)
        with edit.after(site.node):
            hidden, up = _BRANCHES[site.kind](edit, site, rank, self.dropout)
            if scale != 1.0:
                hidden = edit.call(aten.mul.Tensor, hidden, scale)
            delta = edit.cast(up(hidden), site.node.meta["val"].dtype)
            edit.replace(site.node, edit.call(aten.add.Tensor, site.node, delta))

    def finish(self, edit: Edit) -> None:
        for name in self.trainable:
            if name != "auto" and not edit.train(edit.program.modules_named(name)):
                raise UsageError(f"{self.pass_name()}: trainable module {name!r} has no parameters in this model")
        edit.train(self._in_full(edit.program))


def _input(edit: Edit, site: Site, weight: fx.Node, dropout: float) -> fx.Node:
    value = edit.cast(site.input, weight.meta["val"].dtype)
    return edit.call(aten.dropout.default, value, dropout, True) if dropout > 0 else value


def _linear(edit: Edit, site: Site, rank: int, dropout: float):
    a = edit.parameter(site, "lora_A.weight", (rank, site.in_features), kaiming)
    b = edit.parameter(site, "lora_B.weight", (site.out_features, rank))
    hidden = edit.call(aten.linear.default, _input(edit, site, a, dropout), a)
    return hidden, lambda value: edit.call(aten.linear.default, value, b)


def _embedding(edit: Edit, site: Site, rank: int, dropout: float):
    # Zero A and normal B, the other way round than a linear: the reference implementation's choice for embeddings.
    a = edit.parameter(site, "lora_embedding_A", (rank, site.in_features))
    b = edit.parameter(site, "lora_embedding_B", (site.out_features, rank), nn.init.normal_)
    hidden = edit.call(aten.embedding.default, edit.call(aten.t.default, a), site.input)
    return hidden, lambda value: edit.call(aten.linear.default, value, b)


def _conv2d(edit: Edit, site: Site, rank: int, dropout: float):
    kernel = tuple(edit.program.tensor(site.parameter).shape[1:])
    a = edit.parameter(site, "lora_A.weight", (rank, *kernel), kaiming)
    b = edit.parameter(site, "lora_B.weight", (site.out_features, rank, 1, 1))
    geometry = site.node.args[3:]
    hidden = edit.call(aten.conv2d.default, _input(edit, site, a, dropout), a, None, *geometry)
    return hidden, lambda value: edit.call(aten.conv2d.default, value, b)


def _conv_groups(node: fx.Node) -> object:
    return node.args[6] if len(node.args) > 6 else 1


_BRANCHES = {"linear": _linear, "addmm": _linear, "embedding": _embedding, "conv2d": _conv2d}
